# SPDX-License-Identifier: Apache-2.0
"""Packing: documents of any length into rows of T tokens, no token lost, none twice.

A document longer than T is cut into pieces of T and two remainders; pieces are then put into rows
by best-fit decreasing (at most 11/9 of the fewest rows possible, Johnson 1973; far less when most
pieces are full). Each piece is a segment of its own: its positions begin at 0 and it sees no
neighbour. The whole plan of an epoch is a pure function of (lengths, T, seed, epoch), so a restart
recomputes it, and any host reads any row.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
from jaxtyping import Bool, Integer

from jaxdec.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class PackPlan:
  """Rows of one epoch. Row r holds pieces `row_offsets[r]:row_offsets[r+1]`, left to right; piece p
  is the `piece_lengths[p]` tokens of the flat corpus from `piece_starts[p]` on."""

  piece_starts: Integer[np.ndarray, "pieces"]
  piece_lengths: Integer[np.ndarray, "pieces"]
  row_offsets: Integer[np.ndarray, "row_boundaries"]
  seq_len: int

  @property
  def num_rows(self) -> int:
    return len(self.row_offsets) - 1


def _draws(count: int, *entropy: int) -> np.ndarray:
  # Raw PCG64 output: unlike `permutation`, numpy promises never to change this stream.
  return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)


def cut(
  offsets: Integer[np.ndarray, "boundaries"],
  seq_len: int,
  *,
  first_cut: Integer[np.ndarray, "documents"] | None = None,
) -> tuple[Integer[np.ndarray, "pieces"], Integer[np.ndarray, "pieces"]]:
  """Starts and lengths of the pieces, in corpus order; no piece is longer than `seq_len` or empty.

  Args:
    offsets: document boundaries in the flat corpus.
    seq_len: T.
    first_cut: for each document, how many tokens its first piece takes (0 for T), where the
      document is longer than T; later cuts follow every T tokens.
  """
  starts, lengths = offsets[:-1].astype(np.int64), np.diff(offsets).astype(np.int64)
  long = lengths > seq_len
  head = np.zeros_like(lengths)
  if first_cut is not None:
    head = np.where(long, np.asarray(first_cut, np.int64) % seq_len, 0)
  rest = lengths - head
  counts = (head > 0) + -(-rest // seq_len)
  document = np.repeat(np.arange(len(lengths)), counts)
  rank = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
  h = head[document]
  begin = np.where(h > 0, np.where(rank == 0, 0, h + (rank - 1) * seq_len), rank * seq_len)
  end = np.where((h > 0) & (rank == 0), h, begin + seq_len)
  end = np.minimum(end, lengths[document])
  return starts[document] + begin, end - begin


def best_fit(lengths: Integer[np.ndarray, "pieces"], seq_len: int) -> list[list[int]]:
  """Best-fit decreasing: longest piece first, into the fullest row that still takes it.

  Ties go to the earlier piece and the row opened last, so the answer is a function of `lengths`.
  O(pieces): open rows are kept by free places, and a bit mask finds the least that suffices.
  """
  if len(lengths) and (lengths.max() > seq_len or lengths.min() < 1):
    raise ValueError(f"piece lengths must be in 1..{seq_len}, got up to {lengths.max()}")
  rows: list[list[int]] = []
  open_rows: dict[int, list[int]] = defaultdict(list)
  mask = 0
  for piece in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[piece])
    wide_enough = mask >> length
    if wide_enough:
      free = length + (wide_enough & -wide_enough).bit_length() - 1
      row = open_rows[free].pop()
      if not open_rows[free]:
        mask ^= 1 << free
    else:
      free, row = seq_len, len(rows)
      rows.append([])
    rows[row].append(piece)
    if free > length:
      open_rows[free - length].append(row)
      mask |= 1 << (free - length)
  return rows


def plan_epoch(
  offsets: Integer[np.ndarray, "boundaries"],
  seq_len: int,
  *,
  seed: int = 0,
  epoch: int = 0,
  shuffle: bool = True,
  random_cuts: bool = True,
) -> PackPlan:
  """The rows of one epoch and their order.

  With `random_cuts` a long document is cut elsewhere in each epoch, so that no token is always the
  one without context. With `shuffle` rows come in random order, else by their earliest piece.
  """
  if seq_len < 2:
    raise UserError(f"seq_len must be at least 2, got {seq_len}")
  first_cut = None
  if random_cuts:
    first_cut = (_draws(len(offsets) - 1, seed, epoch, 0) % np.uint64(seq_len)).astype(np.int64)
  starts, lengths = cut(offsets, seq_len, first_cut=first_cut)
  rows = best_fit(lengths, seq_len)
  if shuffle:
    order = np.argsort(_draws(len(rows), seed, epoch, 1), kind="stable").tolist()
  else:
    order = sorted(range(len(rows)), key=lambda r: min(rows[r]))
  rows = [rows[r] for r in order]
  pieces = np.array([p for row in rows for p in row], dtype=np.int64)
  row_offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
  return PackPlan(starts[pieces], lengths[pieces], row_offsets, seq_len)


def fill_rows(
  tokens: Integer[np.ndarray, "tokens"],
  plan: PackPlan,
  rows: range | Integer[np.ndarray, "B"],
  labels: Bool[np.ndarray, "tokens"] | None = None,
) -> dict[str, Integer[np.ndarray, "B T"] | Bool[np.ndarray, "B T"]]:
  """The batch of these rows; a row number past the end is a row of padding.

  tokens: int32, 0 where there is padding. segment_ids: 1, 2, ... within a row, 0 where there is
  padding. positions: from 0 within a segment. loss_mask: whether this token counts as a label; not
  the first of a segment, which nothing predicts, nor one that `labels` rule out.
  """
  shape = (len(rows), plan.seq_len)
  batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
  batch["loss_mask"] = np.zeros(shape, np.bool_)
  for b, row in enumerate(rows):
    if row >= plan.num_rows:
      continue
    at = 0
    begin, end = plan.row_offsets[row], plan.row_offsets[row + 1]
    for segment, piece in enumerate(range(begin, end), start=1):
      start, length = plan.piece_starts[piece], plan.piece_lengths[piece]
      here = slice(at, at + length)
      batch["tokens"][b, here] = tokens[start : start + length]
      batch["segment_ids"][b, here] = segment
      batch["positions"][b, here] = np.arange(length)
      counted = True if labels is None else labels[start + 1 : start + length]
      batch["loss_mask"][b, at + 1 : at + length] = counted
      at += length
  return batch
