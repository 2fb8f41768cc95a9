# SPDX-License-Identifier: Apache-2.0
"""Groups without a solver: longest sequence first, over every multiset of degrees.

``greedy`` finds, in milliseconds, heterogeneous groups about as good as the integer program's; it
bounds the program from above and stands in for it. With one multiset of equal degrees the same
rule is the plain static plan that everybody runs, the baseline of every report.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from jaxdec.parallel.flexsp.cost import CostModel, degrees

Groups = tuple[tuple[int, tuple[int, ...]], ...]

# Every multiset is tried up to so many devices.
_ALL_UP_TO = 64
# Rows of the table of multisets that are worked on together; bounds its memory.
_BLOCK = 2048


@functools.cache
def multisets(devices: int) -> tuple[tuple[int, ...], ...]:
  """Every multiset of powers of two with sum N, each in descending order.

  36 for N = 16, 202 for 32, 1,828 for 64.
  """

  def below(total: int, top: int) -> list[tuple[int, ...]]:
    if top == 1:
      return [(1,) * total]
    found = []
    for count in range(total // top, -1, -1):
      found += [(top,) * count + rest for rest in below(total - count * top, top // 2)]
    return found

  return tuple(below(devices, degrees(devices)[-1]))


def assign(
  lengths: Sequence[int],
  sets: Sequence[Sequence[int]],
  model: CostModel,
  *,
  idle: bool = False,
) -> tuple[float, Groups]:
  """The best of the given multisets of degrees, each filled longest sequence first.

  Every sequence goes to the group that has room for it and then the least time; ties to the lower
  index. The last ones, and so the shortest, go to groups that would stay empty. All multisets are
  filled side by side, one sequence at a time.

  Args:
    lengths: tokens of each sequence.
    sets: degrees of the groups, for each multiset.
    idle: whether a group may stay empty.

  Returns:
    ms of the slowest group, and for each used group its degree and sequences (indices into
    ``lengths``); ``(inf, ())`` where no multiset has room.
  """
  lengths = np.asarray(lengths, np.int64)
  order = np.lexsort((np.arange(len(lengths)), -lengths))
  best = (float("inf"), None, None)
  if not idle:
    sets = [multiset for multiset in sets if len(multiset) <= len(lengths)]
  for start in range(0, len(sets), _BLOCK):
    block = sets[start : start + _BLOCK]
    time, chosen = _fill(lengths[order], block, model, idle)
    row = int(np.argmin(time))
    if time[row] < best[0]:
      best = (float(time[row]), block[row], chosen[:, row])
  time, found, chosen = best
  if found is None:
    return time, ()
  groups = []
  for index, degree in enumerate(found):
    inside = order[chosen == index]
    if len(inside):
      groups.append((degree, tuple(inside.tolist())))
  return time, tuple(groups)


def slowest(lengths: Sequence[int], sets: Sequence[Sequence[int]], model: CostModel) -> np.ndarray:
  """ms of the slowest group of each multiset, as ``assign`` fills it; inf where there is no room or
  a group stays empty."""
  lengths = np.sort(np.asarray(lengths, np.int64))[::-1]
  blocks = (sets[start : start + _BLOCK] for start in range(0, len(sets), _BLOCK))
  return np.concatenate([_fill(lengths, block, model, False)[0] for block in blocks])


def _fill(lengths, sets, model, idle):
  """Slowest group's ms ``[M]`` and the group of each sequence ``[n, M]`` for all multisets."""
  width = max(len(s) for s in sets)
  # [M, P]: degree 0 where a multiset has fewer groups
  table = np.array([tuple(s) + (0,) * (width - len(s)) for s in sets])
  kinds, kind = np.unique(table, return_inverse=True)
  kind = kind.reshape(table.shape)
  values, which = np.unique(lengths, return_inverse=True)
  cost = np.stack(
    [model.time(values, int(d)) if d else np.full(len(values), np.inf) for d in kinds], axis=1
  )
  room = table * model.cap
  busy = np.full(table.shape, model.b1)
  rows = np.arange(len(sets))
  chosen = np.empty((len(lengths), len(sets)), np.int16)
  possible = np.ones(len(sets), bool)
  vacant = table > 0
  for n, length in enumerate(lengths):
    after = busy + cost[which[n]][kind]
    after[room < length] = np.inf
    if not idle:
      # As many sequences left as empty groups: each must go to one.
      last = np.flatnonzero(np.count_nonzero(vacant, axis=1) >= len(lengths) - n)
      after[last] = np.where(vacant[last], after[last], np.inf)
    index = np.argmin(after, axis=1)
    time = after[rows, index]
    fits = np.isfinite(time)
    possible &= fits
    busy[rows, index] = np.where(fits, time, busy[rows, index])
    room[rows, index] -= np.where(fits, length, 0)
    vacant[rows, index] &= ~fits
    chosen[n] = index
  if not idle:
    possible &= ~np.any(vacant, axis=1)
  used = (table > 0) & ~vacant
  return np.where(possible, np.max(np.where(used, busy, 0.0), axis=1), np.inf), chosen


def greedy(lengths: Sequence[int], devices: int, model: CostModel) -> tuple[float, Groups]:
  """The best multiset of all (of those ``climb`` looks at, above 64 devices: 128 have 27,338).

  Never without an answer where the tokens fit on N devices at all, because one group of N takes
  everything.
  """
  if devices > _ALL_UP_TO:
    return climb(lengths, devices, model)
  return assign(lengths, multisets(devices), model)


def climb(lengths: Sequence[int], devices: int, model: CostModel) -> tuple[float, Groups]:
  """From equal groups uphill, eight multisets at a time.

  A move gives devices from groups of one degree to groups of another, 1, 2, 4, ... of the wider
  ones at a time; the best eight multisets met so far are moved from, until none is new.
  """
  known = degrees(devices)
  times: dict[tuple[int, ...], float] = {}
  moved_from: set[tuple[int, ...]] = set()
  ahead = [(d,) * (devices // d) for d in known]
  while ahead:
    times |= zip(ahead, slowest(lengths, ahead, model))
    best = sorted(times, key=lambda multiset: (times[multiset], multiset))[:8]
    starts = [multiset for multiset in best if multiset not in moved_from]
    moved_from.update(starts)
    moves = (move for multiset in starts for move in _moves(multiset, known))
    ahead = [move for move in dict.fromkeys(moves) if move not in times]
  return assign(lengths, best[:1], model)


def _moves(multiset: tuple[int, ...], known: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
  counts = {degree: multiset.count(degree) for degree in known}
  for giving, taking in itertools.permutations(known, 2):
    amount = max(giving, taking)
    while amount <= giving * counts[giving]:
      after = {**counts}
      after[giving] -= amount // giving
      after[taking] += amount // taking
      yield tuple(d for d in reversed(known) for _ in range(after[d]))
      amount *= 2


def single_degree(
  lengths: Sequence[int], devices: int, model: CostModel, degree: int
) -> tuple[float, Groups]:
  """N / d equal groups, of which some may stay empty: the static plan of one micro-batch."""
  return assign(lengths, [(degree,) * (devices // degree)], model, idle=True)
