# SPDX-License-Identifier: Apache-2.0
"""Several corpora in given shares, row by row: deterministic, resumable, the same on any processes.

Row n of a run (n counts rows over all batches) comes from the corpus that is furthest behind its
share, ``argmax_s w_s (n + 1) - taken_s`` with ties to the first, so after n rows every corpus has
given ``n w_s`` of them, to within one where there are two and to within their number otherwise.
Each corpus goes through its own epochs, in the order it would have alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from typing import Any

import grain
import numpy as np

from jaxdec.data.corpus import Corpus
from jaxdec.data.packing import PackPlan, fill_rows
from jaxdec.data.pipeline import Batch, PackedDataset, make_dataset
from jaxdec.data.share import Share
from jaxdec.data.sources import open_source, parse_mixture
from jaxdec.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """Corpora and their shares of the rows (any positive numbers; only their ratios count)."""

  corpora: tuple[Corpus, ...]
  weights: tuple[float, ...]

  def __post_init__(self):
    if not self.corpora or len(self.corpora) != len(self.weights):
      raise UserError(
        f"a mixture needs one weight a source, got {len(self.weights)} for {len(self.corpora)}"
      )
    if not all(0 < w < math.inf for w in self.weights):
      raise UserError(f"the weights of a mixture must be positive numbers, got {self.weights}")

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of corpora and shares."""
    parts = [[c.fingerprint for c in self.corpora], self.shares.tolist()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

  @property
  def shares(self) -> np.ndarray:
    weights = np.asarray(self.weights, np.float64)
    return weights / weights.sum()


class MixedDataset(grain.IterDataset[Batch]):
  """Packed batches of a mixture; arguments as in ``make_dataset``."""

  def __init__(
    self, mixture: Mixture, *, batch_size: int, num_epochs: int | None = None, **options
  ):
    super().__init__()
    # Checks the arguments, and holds the settings of each corpus; batches are made here.
    self.parts = [
      PackedDataset(c, batch_size=batch_size, num_epochs=num_epochs, **options)
      for c in mixture.corpora
    ]
    self.mixture, self.batch_size, self.num_epochs = mixture, batch_size, num_epochs
    self.share: Share = self.parts[0].share
    order = [*(part.fingerprint for part in self.parts), mixture.fingerprint]
    self.fingerprint = hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16]

  def __iter__(self) -> MixedIterator:
    return MixedIterator(self)


class MixedIterator(grain.DatasetIterator[Batch]):
  """Iterator over ``MixedDataset``; ends with the first corpus that does, if any."""

  def __init__(self, dataset: MixedDataset):
    super().__init__()
    self.dataset = dataset
    count = len(dataset.parts)
    self._places = [(0, 0)] * count  # epoch and row of each corpus
    self._taken = [0] * count
    self._plans: list[tuple[int, PackPlan] | None] = [None] * count

  def _plan(self, source: int, epoch: int) -> PackPlan:
    kept = self._plans[source]
    if kept is None or kept[0] != epoch:
      self._plans[source] = kept = (epoch, self.dataset.parts[source].plan(epoch))
    return kept[1]

  def _draw(self) -> tuple[int, PackPlan, int] | None:
    """The next row: its corpus, the plan it is in, and its number there. None: at the end."""
    shares = self.dataset.mixture.shares
    source = int(np.argmax(shares * (sum(self._taken) + 1) - self._taken))
    epoch, row = self._places[source]
    plan = self._plan(source, epoch)
    if row >= plan.num_rows:
      epoch, row = epoch + 1, 0
      if self.dataset.num_epochs is not None and epoch >= self.dataset.num_epochs:
        return None
      plan = self._plan(source, epoch)
    self._places[source] = (epoch, row + 1)
    self._taken[source] += 1
    return source, plan, row

  def __next__(self) -> Batch:
    d = self.dataset
    drawn = [self._draw() for _ in range(d.batch_size)]
    if drawn[0] is None:
      raise StopIteration
    rows = [self._fill(drawn[i]) for i in d.share.rows(d.batch_size)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

  def _fill(self, drawn: tuple[int, PackPlan, int] | None) -> Batch:
    source, plan, row = drawn or (0, self._plan(0, 0), np.iinfo(np.int64).max)  # padding
    corpus = self.dataset.mixture.corpora[source]
    return fill_rows(corpus.tokens, plan, [row], corpus.labels)

  def get_state(self) -> dict[str, Any]:
    return {
      "places": [list(place) for place in self._places],
      "taken": list(self._taken),
      "fingerprint": self.dataset.fingerprint,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where ``get_state`` was called.

    Raises:
      UserError: the state is of another mixture, or other settings.
    """
    if state.get("fingerprint") != self.dataset.fingerprint:
      raise UserError(
        "the saved position is of another data set (a source, its weight, the tokenizer, seed, "
        "batch_size or seq_len differ); resume with the settings the run began with"
      )
    self._places = [(int(epoch), int(row)) for epoch, row in state["places"]]
    self._taken = [int(n) for n in state["taken"]]


def make_batches(source: Corpus | Mixture, **options: Any) -> grain.DatasetIterator[Batch]:
  """``make_dataset`` for a corpus or a mixture."""
  if isinstance(source, Mixture):
    return iter(MixedDataset(source, **options))
  return make_dataset(source, **options)


def load_source(name: str, split: str, tokenizer: Any) -> Corpus:
  """A split of one source: a folder of ``jaxdec regenerate``, conversations, or text."""
  from jaxdec.data.chat import chat_corpus, conversation_files, read_conversations
  from jaxdec.data.corpus import tokenize_documents
  from jaxdec.data.regenerated import is_regenerated, regenerated_corpus

  if is_regenerated(name):
    return regenerated_corpus(name, tokenizer, split)
  if files := conversation_files(name):
    found = itertools.chain.from_iterable(map(read_conversations, files))
    return chat_corpus(found, tokenizer, split)
  return tokenize_documents(open_source(name, split), tokenizer)


def load_data(data: str, split: str, tokenizer: Any) -> Corpus | Mixture:
  """A split of a source, or of a mixture of them (``parse_mixture``).

  A source that has nothing in ``split`` is left out of the mixture, but for training.

  Raises:
    UserError: unknown sources, damaged files, no text.
  """
  parts = [(w, load_source(name, split, tokenizer)) for w, name in parse_mixture(data)]
  if len(parts) == 1:
    return parts[0][1]
  if split != "train":
    parts = [(w, c) for w, c in parts if len(c.tokens)] or parts
  return Mixture(tuple(c for _, c in parts), tuple(w for w, _ in parts))
