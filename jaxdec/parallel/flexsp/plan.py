# SPDX-License-Identifier: Apache-2.0
"""From the lengths of a batch to micro-batches of groups: the planner.

    planner = Planner(devices=8, model=model)
    plan = planner.plan([1200, 40, 35, 800, 64, 7000])
    print(plan.report(planner.static(plan.lengths)))

Plans are made on the host, ahead of the step that runs them. Source: FlexSP, arXiv 2412.01523.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Literal

from jaxdec.errors import UserError, nearest
from jaxdec.parallel.flexsp import static
from jaxdec.parallel.flexsp.blaster import Task, blast
from jaxdec.parallel.flexsp.buckets import Buckets, bucket
from jaxdec.parallel.flexsp.cost import CostModel, check_lengths, degrees, lower_bound
from jaxdec.parallel.flexsp.milp import Histogram, Solution, solve

METHODS = ("milp", "greedy")


@dataclasses.dataclass(frozen=True)
class Group:
  """Devices that split each of these sequences.

  Attributes:
    ranks: consecutive device numbers, ``degree`` of them. sequences: indices into the batch.
  """

  ranks: tuple[int, ...]
  sequences: tuple[int, ...]

  @property
  def degree(self) -> int:
    return len(self.ranks)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Micro-batches, one after the other; in each, groups side by side.

  Raises:
    UserError: where a sequence is missing or twice, a group is empty, overlaps another or has no
      room, or its degree is not a power of two.
  """

  devices: int
  lengths: tuple[int, ...]
  model: CostModel
  micro_batches: tuple[tuple[Group, ...], ...]

  def __post_init__(self):
    seen = Counter(s for groups in self.micro_batches for g in groups for s in g.sequences)
    wrong = [s for s in {*range(len(self.lengths)), *seen} if seen[s] != 1]
    if wrong or any(s not in range(len(self.lengths)) for s in seen):
      raise UserError(
        f"a plan must hold each of its {len(self.lengths)} sequences once; it does not for "
        f"{sorted(wrong)[:8]}"
      )
    known = degrees(self.devices)
    for number, groups in enumerate(self.micro_batches):
      ranks = Counter(r for g in groups for r in g.ranks)
      if any(n > 1 or r not in range(self.devices) for r, n in ranks.items()):
        raise UserError(
          f"micro-batch {number}: groups must share no device of 0..{self.devices - 1}, got "
          f"{[g.ranks for g in groups]}"
        )
      for group in groups:
        tokens = sum(self.lengths[s] for s in group.sequences)
        if group.degree not in known or not tokens:
          raise UserError(
            f"micro-batch {number}: a group needs sequences and 1, 2, 4, ... devices, got {group}"
          )
        if tokens > self.model.cap * group.degree:
          raise UserError(
            f"micro-batch {number}: {tokens} tokens are given to {group.degree} devices with room "
            f"for {self.model.cap} tokens each"
          )

  def group_time(self, group: Group) -> float:
    """Predicted ms of one group."""
    return self.model.group_time((self.lengths[s] for s in group.sequences), group.degree)

  @property
  def times(self) -> tuple[float, ...]:
    """Predicted ms of each micro-batch: of its slowest group."""
    return tuple(max(map(self.group_time, groups)) for groups in self.micro_batches)

  @property
  def time(self) -> float:
    """Predicted ms of the batch."""
    return sum(self.times)

  @property
  def bound(self) -> float:
    """No groups are faster for this cut into micro-batches (ms)."""
    return sum(
      lower_bound([self.lengths[s] for g in groups for s in g.sequences], self.devices, self.model)
      for groups in self.micro_batches
    )

  def report(self, baseline: Plan | None = None) -> str:
    """The plan in words: predicted cost of each micro-batch, and against another plan."""
    lines = [
      f"{len(self.lengths)} sequences, {sum(self.lengths)} tokens on {self.devices} devices: "
      f"{self.time:.1f} ms predicted in {len(self.micro_batches)} micro-batches "
      f"(no groups: less than {self.bound:.1f} ms)"
    ]
    for number, (groups, time) in enumerate(zip(self.micro_batches, self.times)):
      parts = []
      for degree, count in Counter(g.degree for g in groups).items():
        sizes = [self.lengths[s] for g in groups if g.degree == degree for s in g.sequences]
        parts.append(f"{count} x {degree} ({len(sizes)} of {min(sizes)}..{max(sizes)} tokens)")
      lines.append(f"  {number}: {time:.1f} ms: {', '.join(parts)}")
    if baseline is not None:
      used = sorted({g.degree for groups in baseline.micro_batches for g in groups})
      lines.append(
        f"static, degree {', '.join(map(str, used))}: {baseline.time:.1f} ms predicted in "
        f"{len(baseline.micro_batches)} micro-batches; the plan takes "
        f"{self.time / baseline.time:.3f} of it"
      )
    return "\n".join(lines)


def _solve(
  histogram: Histogram, devices: int, model: CostModel, time_limit: float | None,
  node_limit: int | None, gap: float,
) -> Solution:  # fmt: skip
  """The integer program, bounded by the greedy groups for the same rounded lengths."""
  rounded = [bound for bound, count in histogram for _ in range(count)]
  upper, _ = static.greedy(rounded, devices, model)
  return solve(
    histogram, devices, model,
    upper=upper, time_limit=time_limit, node_limit=node_limit, gap=gap,
  )  # fmt: skip


def _spread(buckets: Buckets, solution: Solution) -> static.Groups:
  """The sequences of each bucket dealt out to the groups of a solution."""
  left = [list(members) for members in buckets.members]
  groups = []
  for degree, amounts in solution.groups:
    inside = []
    for members, amount in zip(left, amounts):
      inside += members[:amount]
      del members[:amount]
    groups.append((degree, tuple(inside)))
  return tuple(groups)


def _tasks(splits: list[list[Task]]) -> list[Task]:
  """The different micro-batches of several splits."""
  return list(dict.fromkeys(task for split in splits for task in split))


class Planner:
  """Plans batches for N devices; remembers what it solved.

  Args:
    devices: N, a power of two. model: costs and memory.
    method: ``milp``, or ``greedy`` alone. ``milp`` also computes the greedy groups, and keeps the
      better for every micro-batch.
    buckets: how many bounds to round lengths to, at least.
    processes: solve micro-batches in so many processes (which import the main module anew, as
      ``multiprocessing`` does with "spawn"); 1: in this one.
    time_limit, node_limit, gap: of each integer program, see ``milp.solve``. Where several
      processes plan the same batch, set ``node_limit`` and ``time_limit=None``, or plan in one.
  """

  def __init__(
    self,
    *,
    devices: int,
    model: CostModel,
    method: Literal["milp", "greedy"] = "milp",
    buckets: int = 16,
    processes: int = 1,
    time_limit: float | None = 10.0,
    node_limit: int | None = None,
    gap: float = 1e-3,
  ):
    degrees(devices)
    if method not in METHODS:
      raise UserError(
        f"method={method!r}{nearest(method, METHODS)} is not one of {', '.join(METHODS)}"
      )
    self.devices, self.model, self.method = devices, model, method
    self._buckets, self._processes = buckets, processes
    self._settings = (time_limit, node_limit, gap)
    self._solved: dict[tuple, Solution] = {}

  @property
  def solved(self) -> int:
    """Distinct bucket histograms solved so far."""
    return len(self._solved)

  def plan(self, lengths: Sequence[int]) -> Plan:
    """The plan with the least predicted time.

    Raises:
      UserError: a sequence that all devices together cannot hold.
    """
    return self._plan(lengths, self._flexible)

  def static(self, lengths: Sequence[int], *, degree: int | None = None) -> Plan:
    """The best plan in which every group of every micro-batch has the same degree.

    Args:
      degree: that degree; None: the best one among those that hold the longest sequence.

    Raises:
      UserError: a degree that is not known, or does not hold the longest sequence.
    """
    array = check_lengths(lengths, self.devices, self.model)
    least = self.model.least_degree(int(array.max()))
    allowed = [d for d in degrees(self.devices) if d >= least]
    if degree is not None and degree not in allowed:
      raise UserError(
        f"a static degree of {degree} cannot serve sequences of up to {array.max()} tokens with "
        f"room for {self.model.cap} tokens on each of {self.devices} devices; use one of "
        f"{', '.join(map(str, allowed))}"
      )
    plans = []
    for d in allowed if degree is None else [degree]:
      one = functools.partial(
        static.single_degree, devices=self.devices, model=self.model, degree=d
      )
      solver = lambda splits, one=one: {task: one(task) for task in _tasks(splits)}  # noqa: E731
      plans.append(self._plan(lengths, solver))
    return min(plans, key=lambda plan: plan.time)

  def _plan(self, lengths: Sequence[int], solver: Callable) -> Plan:
    array = check_lengths(lengths, self.devices, self.model)
    room = self.devices * self.model.cap
    micro_batches = []
    for run, groups in zip(*blast(array, room, solver)):
      placed, start = [], 0
      # Widest first: every group then begins at a multiple of its degree.
      for degree, inside in sorted(groups, key=lambda group: -group[0]):
        ranks = tuple(range(start, start + degree))
        placed.append(Group(ranks, tuple(run[i] for i in inside)))
        start += degree
      micro_batches.append(tuple(placed))
    return Plan(self.devices, tuple(array.tolist()), self.model, tuple(micro_batches))

  def _flexible(self, splits: list[list[Task]]) -> dict[Task, tuple[float, static.Groups]]:
    """Time and groups of each micro-batch."""
    answers = {t: static.greedy(t, self.devices, self.model) for t in _tasks(splits)}
    if self.method == "greedy":
      return answers
    # Not worth a solver: splits that cannot be the fastest any more, and groups that already are
    # within the gap of the lower bound.
    bounds = {task: lower_bound(task, self.devices, self.model) for task in answers}
    best = min(sum(answers[task][0] for task in split) for split in splits)
    hopeful = [split for split in splits if sum(bounds[task] for task in split) < best]
    open_tasks = {
      task: bucket(task, self.devices * self.model.cap, start=self._buckets)
      for task in _tasks(hopeful)
      if answers[task][0] > bounds[task] * (1 + self._settings[-1])
    }
    self._solve_new({b.histogram for b in open_tasks.values()} - self._solved.keys())
    for task, buckets in open_tasks.items():
      solution = self._solved[buckets.histogram]
      if not solution.groups:
        continue
      groups = _spread(buckets, solution)
      # Judged by the true lengths, which the rounded ones only bound.
      time = max(self.model.group_time([task[i] for i in inside], d) for d, inside in groups)
      if time < answers[task][0]:
        answers[task] = (time, groups)
    return answers

  def _solve_new(self, histograms: set) -> None:
    todo = sorted(histograms)
    work = [todo, *([x] * len(todo) for x in (self.devices, self.model, *self._settings))]
    if self._processes == 1 or len(todo) < 2:
      found = list(map(_solve, *work))
    else:
      with ProcessPoolExecutor(self._processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_solve, *work))
    self._solved.update(zip(todo, found))
