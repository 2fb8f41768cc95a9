# SPDX-License-Identifier: Apache-2.0
"""Sequence lengths rounded up to a few bounds, so that the assignment problem stays small.

Sorted lengths are cut into Q runs; every sequence of a run counts as long as its longest. Dynamic
programming finds the cut that adds the fewest tokens (FlexSP, arXiv 2412.01523, section 4.2).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Bounds in ascending order and, for each, the sequences it stands for (longest first)."""

  bounds: tuple[int, ...]
  members: tuple[tuple[int, ...], ...]

  @property
  def counts(self) -> tuple[int, ...]:
    return tuple(len(m) for m in self.members)

  @property
  def tokens(self) -> int:
    """Tokens after rounding up."""
    return sum(b * n for b, n in zip(self.bounds, self.counts))

  @property
  def histogram(self) -> tuple[tuple[int, int], ...]:
    """All that the assignment problem sees of a batch."""
    return tuple(zip(self.bounds, self.counts))


def bucket(lengths: Sequence[int], limit: int, *, start: int = 16) -> Buckets:
  """The fewest buckets, ``start`` at least, whose rounding takes at most half of the free room.

  ``sum(bound * count) <= (tokens + limit) / 2``. Where even that needs every distinct length, each
  is its own bucket and nothing is rounded.

  Args:
    lengths: of the sequences of a micro-batch, ``[n]``.
    limit: tokens that fit on all devices, ``N * cap``; at least ``sum(lengths)``.
  """
  lengths = np.asarray(lengths, np.int64)
  values, counts = np.unique(lengths, return_counts=True)
  size, total = len(values), int(lengths.sum())
  ends = np.concatenate([[0], np.cumsum(counts)])
  sums = np.concatenate([[0], np.cumsum(values * counts)])
  # waste[i, j]: tokens added where values i..j-1 become values[j-1]
  waste = np.where(
    np.arange(size + 1)[:, None] < np.arange(size + 1)[None],
    np.concatenate([[0], values])[None] * (ends[None] - ends[:, None])
    - (sums[None] - sums[:, None]),
    np.iinfo(np.int64).max // 4,
  )
  best = waste[0]  # one bucket for the first j values
  cuts: list[np.ndarray] = []
  used = 1
  while used < size and (used < start or 2 * (total + best[size]) > total + limit):
    table = best[:, None] + waste
    cuts.append(np.argmin(table, axis=0))
    best = np.min(table, axis=0)
    used += 1
  edges = [size]
  for cut in reversed(cuts):
    edges.append(int(cut[edges[-1]]))
  edges = [0, *reversed(edges)]
  order = np.lexsort((np.arange(len(lengths)), -lengths))
  bounds, members = [], []
  for low, high in itertools.pairwise(edges):
    inside = (lengths[order] >= values[low]) & (lengths[order] <= values[high - 1])
    bounds.append(int(values[high - 1]))
    members.append(tuple(order[inside].tolist()))
  return Buckets(tuple(bounds), tuple(members))
