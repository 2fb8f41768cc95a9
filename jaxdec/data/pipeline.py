# SPDX-License-Identifier: Apache-2.0
"""Batches for the trainer: a Grain dataset whose iterator can be stopped and resumed anywhere.

Batch k of an epoch is rows kB..(k+1)B-1 of that epoch's plan; every process takes some of P equal
parts of it. The order is therefore the same on any number of processes, and the state is two
numbers and a fingerprint, the same on every process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import grain
import numpy as np

from jaxdec.data.corpus import Corpus, tokenize_documents
from jaxdec.data.documents import Document
from jaxdec.data.packing import PackPlan, fill_rows, plan_epoch
from jaxdec.data.share import Share
from jaxdec.errors import UserError

Batch = dict[str, np.ndarray]


class PackedDataset(grain.IterDataset[Batch]):
  """Packed batches of a tokenised corpus; see `make_dataset` for the arguments."""

  def __init__(
    self,
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    shuffle: bool = True,
    random_cuts: bool | None = None,
    num_epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    share: Share | None = None,
  ):
    super().__init__()
    if len(corpus.tokens) == 0:
      raise UserError(
        "there is no document in this source and split; give more text or another split"
      )
    share = Share.choose(share, process_index, process_count)
    if batch_size < 1 or batch_size % share.of:
      raise UserError(
        f"batch_size is over all processes and must be a positive multiple of their number "
        f"{share.of}, got {batch_size}"
      )
    if seed < 0:
      raise UserError(f"seed must be 0 or more, got {seed}")
    if num_epochs is not None and num_epochs < 1:
      raise UserError(f"num_epochs must be at least 1, or None without end, got {num_epochs}")
    if seq_len < 2:
      raise UserError(f"seq_len must be at least 2, got {seq_len}")
    self.corpus, self.batch_size, self.seq_len, self.seed = corpus, batch_size, seq_len, seed
    self.shuffle, self.num_epochs = shuffle, num_epochs
    self.random_cuts = shuffle if random_cuts is None else random_cuts
    self.share = share
    # What the order of batches depends on; not the processes, and not when it ends.
    order = [corpus.fingerprint, batch_size, seq_len, seed, shuffle, self.random_cuts]
    self.fingerprint = hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16]

  def plan(self, epoch: int) -> PackPlan:
    """The rows of an epoch, of all processes."""
    return plan_epoch(
      self.corpus.offsets,
      self.seq_len,
      seed=self.seed,
      epoch=epoch,
      shuffle=self.shuffle,
      random_cuts=self.random_cuts,
    )

  def batches_in_epoch(self, epoch: int = 0) -> int:
    """How many batches an epoch has; the last is filled up with rows of padding."""
    return -(-self.plan(epoch).num_rows // self.batch_size)

  def __iter__(self) -> PackedIterator:
    return PackedIterator(self)


class PackedIterator(grain.DatasetIterator[Batch]):
  """Iterator over `PackedDataset`; `get_state` is JSON and the same on every process."""

  def __init__(self, dataset: PackedDataset):
    super().__init__()
    self.dataset = dataset
    self._epoch, self._batch = 0, 0
    self._planned: tuple[int, PackPlan] | None = None

  @property
  def epoch(self) -> int:
    """The epoch that the next batch belongs to, unless the current one has just ended."""
    return self._epoch

  def _plan(self) -> PackPlan:
    if self._planned is None or self._planned[0] != self._epoch:
      self._planned = (self._epoch, self.dataset.plan(self._epoch))
    return self._planned[1]

  def __next__(self) -> Batch:
    d = self.dataset
    if d.num_epochs is not None and self._epoch >= d.num_epochs:
      raise StopIteration
    plan = self._plan()
    if self._batch * d.batch_size >= plan.num_rows:
      self._epoch, self._batch = self._epoch + 1, 0
      return next(self)
    rows = self._batch * d.batch_size + d.share.rows(d.batch_size)
    self._batch += 1
    return fill_rows(d.corpus.tokens, plan, rows, d.corpus.labels)

  def get_state(self) -> dict[str, Any]:
    return {"epoch": self._epoch, "batch": self._batch, "fingerprint": self.dataset.fingerprint}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `get_state` was called.

    Raises:
      UserError: if the state is of other data, another tokenizer, seed, batch size or row length.
    """
    if state.get("fingerprint") != self.dataset.fingerprint:
      raise UserError(
        "the saved position is of another data set (documents, tokenizer, seed, batch_size, "
        "seq_len, shuffle or random_cuts differ); resume with the settings the run began with"
      )
    self._epoch, self._batch = int(state["epoch"]), int(state["batch"])


def make_dataset(
  source: Corpus | Iterable[Document | str],
  tokenizer: Any = None,
  *,
  batch_size: int,
  seq_len: int,
  seed: int = 0,
  shuffle: bool = True,
  random_cuts: bool | None = None,
  num_epochs: int | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
  share: Share | None = None,
  eos_id: int | None = None,
  cache: str | os.PathLike | bool = True,
) -> PackedIterator:
  """A Grain iterator of packed batches, with exact `get_state` and `set_state`.

  A batch is a dict of arrays [rows read here, T]: tokens, segment_ids, positions (int32),
  loss_mask (bool); see `packing.fill_rows`. Every token of every document is in exactly one place
  of each epoch.

  Args:
    source: documents or texts (`open_source`, `python_stdlib.sources`), or a tokenised `Corpus`.
    tokenizer: needed unless `source` is a Corpus; closes each document with its end-of-text id.
    batch_size: rows over all processes.
    seq_len: T.
    seed: of cuts and order.
    shuffle: rows in random order, anew in each epoch.
    random_cuts: cut long documents elsewhere in each epoch; like `shuffle` if left out.
    num_epochs: ends after so many; None goes on for ever.
    process_index, process_count: which of as many equal parts of each batch is read here; by
      default JAX's, where it runs on several processes.
    share: the same for a mesh that deals out rows otherwise: ``jaxdec.parallel.batch_share(mesh)``.
    eos_id: instead of the tokenizer's own.
    cache: where tokenised text is kept; True for the default folder, False for nowhere.
  """
  if not isinstance(source, Corpus):
    if tokenizer is None:
      raise UserError("make_dataset needs a tokenizer for documents of text, got None")
    source = tokenize_documents(source, tokenizer, eos_id=eos_id, cache=cache)
  dataset = PackedDataset(
    source,
    batch_size=batch_size,
    seq_len=seq_len,
    seed=seed,
    shuffle=shuffle,
    random_cuts=random_cuts,
    num_epochs=num_epochs,
    process_index=process_index,
    process_count=process_count,
    share=share,
  )
  return iter(dataset)
