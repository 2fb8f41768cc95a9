# SPDX-License-Identifier: Apache-2.0
"""A batch cut into micro-batches, and the number of micro-batches that is fastest in sum.

Micro-batches take sequences of like length, so that long ones share large groups and short ones
need none; FlexSP, arXiv 2412.01523, section 4.3 (the sequence blaster).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Lengths of the sequences of a micro-batch, longest first.
Task = tuple[int, ...]
# Counts of micro-batches tried together.
_TRIES = 5


def split(lengths: Sequence[int], parts: int) -> list[tuple[int, ...]]:
  """Longest first, cut into ``parts`` runs whose largest token sum is least.

  The least largest sum is found by bisection over the (whole) sums; a run closes where the next
  sequence would exceed it, or where each sequence left must open a run of its own.

  Returns:
    Indices into ``lengths``, for each run; no run is empty.
  """
  lengths = np.asarray(lengths, np.int64)
  if not 1 <= parts <= len(lengths):
    raise ValueError(f"{len(lengths)} sequences cannot be cut into {parts} runs")
  order = np.lexsort((np.arange(len(lengths)), -lengths))
  sizes = lengths[order]
  ends = np.cumsum(sizes)

  def runs(limit: int) -> list[int]:
    """Ends of the runs, each filled up to ``limit``."""
    found, start = [], 0
    while start < len(sizes):
      before = ends[start - 1] if start else 0
      start = int(np.searchsorted(ends, before + limit, side="right"))
      found.append(start)
    return found

  low, high = max(int(sizes[0]), -(-int(ends[-1]) // parts)), int(ends[-1])
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if len(runs(middle)) <= parts else (middle + 1, high)
  result, start = [], 0
  for part in range(parts):
    before = ends[start - 1] if start else 0
    stop = int(np.searchsorted(ends, before + low, side="right"))
    stop = min(stop, len(sizes) - (parts - part - 1))
    result.append(tuple(order[start:stop].tolist()))
    start = stop
  return result


def blast(
  lengths: Sequence[int],
  room: int,
  solve: Callable[[list[list[Task]]], Mapping[Task, tuple[float, Any]]],
) -> tuple[list[tuple[int, ...]], list[Any]]:
  """The split whose micro-batches, each solved by itself, take the least time in sum.

  The count starts at ``ceil(tokens / room)``, rises until every micro-batch has less than ``room``
  tokens (exactly ``room``: only a single sequence), and five counts from there on are tried; where
  none is solvable, the next five.

  Args:
    room: tokens that fit on all devices; no sequence is longer.
    solve: gets five splits at once (for each, the lengths of its micro-batches), so that it may
      work on them side by side and leave out what cannot win; returns ms (inf: cannot be done) and
      solution of every micro-batch.

  Returns:
    Sequences (indices) and the solution of each micro-batch.
  """
  lengths = np.asarray(lengths, np.int64)
  first = max(1, math.ceil(int(lengths.sum()) / room))

  def fits(run: tuple[int, ...]) -> bool:
    tokens = int(lengths[list(run)].sum())
    return tokens < room or (tokens == room and len(run) == 1)

  while first < len(lengths) and not all(fits(run) for run in split(lengths, first)):
    first += 1
  while first <= len(lengths):
    last = min(first + _TRIES, len(lengths) + 1)
    splits = [split(lengths, parts) for parts in range(first, last)]
    sizes = [[tuple(lengths[list(run)].tolist()) for run in runs] for runs in splits]
    answers = solve(sizes)
    totals = [sum(answers[task][0] for task in runs) for runs in sizes]
    best = int(np.argmin(totals))
    if math.isfinite(totals[best]):
      return splits[best], [answers[task][1] for task in sizes[best]]
    first = last
  raise AssertionError("a single sequence of at most `room` tokens always has a solution")
