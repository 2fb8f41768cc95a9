# SPDX-License-Identifier: Apache-2.0
"""FlexSP's planner: the integer program against brute force, and what every plan must satisfy."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdec.errors import UserError
from jaxdec.parallel.flexsp import (
  CostModel,
  Group,
  Plan,
  Planner,
  blaster,
  gpt_7b,
  lower_bound,
  milp,
  static,
)
from jaxdec.parallel.flexsp.buckets import Buckets, bucket
from jaxdec.parallel.flexsp.plan import _spread


def model(**changes) -> CostModel:
  """Numbers with which every degree is best for some length."""
  values = {
    "a1": 1e-3, "a2": 0.05, "b1": 3.0, "bandwidth": {2: 4.0, 4: 3.0, 8: 0.8},
    "bytes_per_token": 2.0**17, "cap": 100,
  }  # fmt: skip
  return CostModel(**{**values, **changes})


def brute_force(lengths, devices, costs) -> float:
  """Every multiset of degrees, every assignment of sequences to its groups."""
  best = np.inf
  lengths = np.asarray(lengths)
  for degrees in static.multisets(devices):
    if len(degrees) > len(lengths):
      continue
    where = np.array(list(itertools.product(range(len(degrees)), repeat=len(lengths))))
    slowest = np.zeros(len(where))
    for index, degree in enumerate(degrees):
      inside = where == index
      tokens = inside @ lengths
      time = costs.b1 + inside @ costs.time(lengths, degree)
      allowed = inside.any(axis=1) & (tokens <= costs.cap * degree)
      slowest = np.maximum(slowest, np.where(allowed, time, np.inf))
    best = min(best, slowest.min())
  return best


def cases(count, *, seed, most=6):
  rng = np.random.default_rng(seed)
  for _ in range(count):
    devices = int(rng.choice([2, 4, 8]))
    number = int(rng.integers(1, most + 1))
    # Some all-to-alls so dear that leaving devices idle would be better, were it allowed.
    costs = model(
      a1=float(rng.choice([0, 1e-3, 1e-2])), b1=float(rng.choice([0, 3.0, 30.0])),
      bytes_per_token=2.0 ** float(rng.choice([17, 22])),
    )  # fmt: skip
    room = devices * costs.cap
    lengths = np.minimum(rng.lognormal(4, 1, number).astype(int) + 1, room)
    while lengths.sum() > room:
      lengths = np.maximum(lengths // 2, 1)
    yield lengths.tolist(), devices, costs


def histogram(lengths):
  return tuple(zip(*(x.tolist() for x in np.unique(lengths, return_counts=True))))


def test_milp_equals_brute_force_and_greedy_is_near():
  """Also: neither is below the lower bound, and the greedy groups exist where any do."""
  excess = []
  for lengths, devices, costs in cases(24, seed=0):
    expected = brute_force(lengths, devices, costs)
    found = milp.solve(histogram(lengths), devices, costs, gap=0.0)
    assert found.status == "optimal"
    np.testing.assert_allclose(found.time, expected, rtol=1e-6)
    assert sum(d for d, _ in found.groups) == devices
    assert expected * (1 - 1e-3) <= found.bound <= expected * (1 + 1e-6)
    assert lower_bound(lengths, devices, costs) <= expected * (1 + 1e-9)
    time, groups = static.greedy(lengths, devices, costs)
    assert sum(d for d, _ in groups) == devices
    assert time >= expected * (1 - 1e-9)
    excess.append(time / expected - 1)
  assert np.mean(excess) < 0.01 and max(excess) < 0.15, excess


@pytest.mark.slow
def test_milp_equals_brute_force_on_more_cases():
  excess = []
  for lengths, devices, costs in cases(300, seed=1):
    expected = brute_force(lengths, devices, costs)
    found = milp.solve(histogram(lengths), devices, costs, gap=0.0)
    np.testing.assert_allclose(found.time, expected, rtol=1e-6)
    excess.append(static.greedy(lengths, devices, costs)[0] / expected - 1)
  assert np.mean(excess) < 0.005 and max(excess) < 0.15, excess


def test_lower_bound_by_hand():
  """800 tokens need all 8 devices; 50 and 60 are cheapest, in device-time, on one."""
  costs = model(a1=0.0)
  longest = 0.05 * 800 / 8 + 800 / 8 / 8 / 0.8
  assert lower_bound([800], 8, costs) == pytest.approx(3 + longest)
  # The area of two sequences on one device each, and the longest on the fastest degree, two.
  assert lower_bound([50, 60], 2, costs) == pytest.approx(3 + 0.05 * 110 / 2)
  assert lower_bound([50, 60], 8, costs) == pytest.approx(
    3 + min(0.05 * 60 / d + 60 / 8 / d / bw for d, bw in ((1, np.inf), (2, 4), (4, 3), (8, 0.8)))
  )


def test_a_plan_takes_the_solvers_groups_where_they_are_better():
  lengths = [146, 121, 174, 94, 119]
  greedy = Planner(devices=8, model=model(), method="greedy").plan(lengths)
  best = Planner(devices=8, model=model()).plan(lengths)
  assert len(best.micro_batches) == 1
  assert best.time == pytest.approx(brute_force(lengths, 8, model())) and best.time < greedy.time


def test_sequences_of_a_bucket_are_dealt_out_to_its_groups():
  buckets = Buckets((10, 40), ((3, 0, 5), (1, 2)))
  solution = milp.Solution("optimal", 1.0, ((1, (1, 0)), (1, (2, 1)), (2, (0, 1))))
  assert _spread(buckets, solution) == ((1, (3,)), (1, (0, 5, 1)), (2, (2,)))


def test_bound_from_the_greedy_groups_cuts_nothing():
  for lengths, devices, costs in cases(6, seed=2):
    upper, _ = static.greedy(lengths, devices, costs)
    found = milp.solve(histogram(lengths), devices, costs, gap=0.0, upper=upper)
    np.testing.assert_allclose(found.time, brute_force(lengths, devices, costs), rtol=1e-6)


def test_milp_says_infeasible():
  assert milp.solve(((101, 8),), 8, model()).status == "infeasible"
  assert milp.solve(((100, 8),), 8, model()).status == "optimal"


def test_large_problems_drop_candidates():
  small = ((10, 3), (150, 1))
  assert milp.candidates(small, 4, model()) == (1, 1, 1, 1, 2, 2, 4)
  large = (*((10 + i, 1) for i in range(40)), (790, 1), (1500, 2))
  # D = 16, two sequences need it: of 64 devices 32 are left for lower degrees.
  found = milp.candidates(large, 64, model())
  assert [found.count(d) for d in (1, 2, 4, 8, 16, 32, 64)] == [32, 16, 8, 4, 4, 2, 1]


def test_multisets_are_all_of_them():
  assert [len(static.multisets(n)) for n in (1, 2, 4, 8, 16, 32, 64)] == [
    1, 2, 4, 10, 36, 202, 1828,
  ]  # fmt: skip
  assert all(sum(s) == 32 for s in static.multisets(32))
  assert len(set(static.multisets(64))) == 1828


def test_climbing_is_nearly_as_good_as_trying_all_multisets():
  rng = np.random.default_rng(6)
  costs = gpt_7b(32)
  excess = []
  for _ in range(12):
    lengths = rng.lognormal(8, 1.7, int(rng.integers(1, 60))).astype(int) + 1
    while lengths.sum() >= 32 * costs.cap:
      lengths = lengths // 2 + 1
    all_of_them, _ = static.greedy(lengths, 32, costs)
    time, groups = static.climb(lengths, 32, costs)
    assert sum(d for d, _ in groups) == 32
    excess.append(time / all_of_them - 1)
  assert min(excess) >= 0 and np.mean(excess) < 0.02 and max(excess) < 0.1, excess


def test_a_plan_for_256_devices():
  costs = gpt_7b(256)
  lengths = np.random.default_rng(7).lognormal(9, 1.5, 100).astype(int) + 1
  check_plan(Planner(devices=256, model=costs, method="greedy").plan(lengths), 256)


lengths_on_8 = st.lists(st.integers(1, 800), min_size=1, max_size=40)


def check_plan(plan, devices):
  assert sorted(s for g in itertools.chain(*plan.micro_batches) for s in g.sequences) == list(
    range(len(plan.lengths))
  )
  for groups, time in zip(plan.micro_batches, plan.times):
    assert sorted(r for g in groups for r in g.ranks) == list(range(devices))
    for group in groups:
      assert group.ranks[0] % group.degree == 0 and len(group.sequences)
      assert group.ranks == tuple(range(group.ranks[0], group.ranks[0] + group.degree))
      tokens = sum(plan.lengths[s] for s in group.sequences)
      assert tokens <= plan.model.cap * group.degree
      assert max(plan.lengths[s] for s in group.sequences) <= plan.model.cap * group.degree
      parts = [plan.model.time(plan.lengths[s], group.degree) for s in group.sequences]
      assert plan.model.b1 + sum(parts) <= time * (1 + 1e-9)
  assert plan.time >= plan.bound * (1 - 1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths_on_8)
def test_every_greedy_plan_is_feasible(lengths):
  check_plan(Planner(devices=8, model=model(), method="greedy").plan(lengths), 8)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_every_milp_plan_is_feasible_and_no_worse_than_greedy(lengths):
  planner = Planner(devices=4, model=model(), time_limit=0.5)
  plan = planner.plan(lengths)
  check_plan(plan, 4)
  greedy = Planner(devices=4, model=model(), method="greedy").plan(lengths)
  assert plan.time <= greedy.time * (1 + 1e-9)
  assert plan.time <= planner.static(lengths).time * 1.2


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 60))
def test_buckets_round_the_least_for_their_number(lengths, start, free):
  limit = sum(lengths) + free
  found = bucket(lengths, limit, start=start)
  assert sorted(itertools.chain(*found.members)) == list(range(len(lengths)))
  assert list(found.bounds) == sorted(set(found.bounds))
  for bound, members, low in zip(found.bounds, found.members, (0, *found.bounds)):
    assert all(low < lengths[i] <= bound for i in members)
  assert 2 * found.tokens <= sum(lengths) + limit

  def least(count):
    values = sorted(set(lengths))
    return min(
      sum(min(b for b in (*tops, values[-1]) if b >= s) for s in lengths)
      for tops in itertools.combinations(values[:-1], min(count, len(values)) - 1)
    )

  used = len(found.bounds)
  assert used == min(used, len(set(lengths))) and found.tokens == least(used)
  # One bucket fewer is either below the start or rounds too much.
  assert used <= start or 2 * least(used - 1) > sum(lengths) + limit


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_split_has_the_least_largest_run(lengths, data):
  parts = data.draw(st.integers(1, len(lengths)))
  runs = blaster.split(lengths, parts)
  assert len(runs) == parts and all(runs)
  flat = list(itertools.chain(*runs))
  assert sorted(flat) == list(range(len(lengths)))
  ordered = sorted(lengths, reverse=True)
  assert [lengths[i] for i in flat] == ordered
  best = min(
    max(sum(ordered[a:b]) for a, b in zip((0, *cuts), (*cuts, len(lengths))))
    for cuts in itertools.combinations(range(1, len(lengths)), parts - 1)
  )
  assert max(sum(lengths[i] for i in run) for run in runs) == best


def test_blaster_takes_the_fastest_count_and_raises_an_unsolvable_one():
  lengths = [10] * 12
  asked = []

  def solve(splits):
    tasks = {task for split in splits for task in split}
    asked.extend(tasks)
    # Only micro-batches of one sequence can be done, so all five first counts fail.
    return {task: (1.0, task) if len(task) == 1 else (np.inf, None) for task in tasks}

  runs, solutions = blaster.blast(lengths, 60, solve)
  assert len(runs) == 12 and solutions == [(10,)] * 12
  assert max(map(len, asked)) == 4  # 3 x 40 is the first split below 60: 2 x 60 is not below

  def square(splits):
    return {task: (len(task) ** 2 + 7, task) for split in splits for task in split}

  runs, _ = blaster.blast(lengths, 60, square)
  # sum over m of (12 / m)^2 + 7: least for 4 or 5 micro-batches, and 4 is first
  assert len(runs) == 4


def test_a_sequence_too_long_for_all_devices_is_refused():
  planner = Planner(devices=8, model=model())
  for call in (planner.plan, planner.static):
    with pytest.raises(UserError, match=r"sequence 1 has 801 tokens.*8 devices.*100 tokens.*800"):
      call([5, 801, 3])
  assert len(planner.plan([800, 800, 3]).micro_batches) == 3


@pytest.mark.parametrize(
  "call, sentence",
  [
    (lambda: Planner(devices=6, model=model()), "power of two, got 6"),
    (lambda: Planner(devices=8, model=model(), method="mipl"), "did you mean 'milp'"),
    (lambda: Planner(devices=8, model=model()).plan([]), "non-empty list"),
    (lambda: Planner(devices=8, model=model()).plan([3, 0]), "sequence 1 has 0 tokens"),
    (lambda: Planner(devices=8, model=model()).plan([1.5]), "whole numbers"),
    (lambda: Planner(devices=16, model=model()).plan([9]), "no bandwidth for groups of 16"),
    (
      lambda: Planner(devices=8, model=model()).static([300], degree=2),
      r"degree of 2 cannot serve sequences of up to 300 tokens.*use one of 4, 8",
    ),
    (lambda: model(a1=-1.0), "a1 must be"),
    (lambda: model(cap=0), "cap must be"),
    (lambda: model(bandwidth={2: 0.0}), "bandwidth of degree 2"),
    (lambda: gpt_7b(1, memory_mib=80 * 1024), "no room for a token"),
  ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, sentence):
  with pytest.raises(UserError, match=sentence):
    call()


@pytest.mark.parametrize(
  "groups, sentence",
  [
    ([Group((0,), (0,))], "each of its 2 sequences once"),
    ([Group((0,), (0, 1)), Group((1,), (1,))], "each of its 2 sequences once"),
    ([Group((0, 1), (0,)), Group((1,), (1,))], "share no device"),
    ([Group((0,), (0,)), Group((9,), (1,))], "share no device"),
    ([Group((0, 1, 2), (0, 1))], "1, 2, 4"),
    ([Group((0,), (0, 1)), Group((1,), ())], "needs sequences"),
    ([Group((0,), (0, 1))], "120 tokens are given to 1 devices"),
  ],
)
def test_an_impossible_plan_cannot_be_made(groups, sentence):
  lengths = (70, 50) if "120" in sentence else (60, 30)
  with pytest.raises(UserError, match=sentence):
    Plan(4, lengths, model(), (tuple(groups),))


def test_plans_are_deterministic_and_solved_once_per_histogram():
  rng = np.random.default_rng(3)
  lengths = rng.choice([10, 40, 90, 180], 10).tolist()
  planner = Planner(devices=4, model=model(), time_limit=None, node_limit=200)
  first = planner.plan(lengths)
  solved = planner.solved
  shuffled = [lengths[i] for i in rng.permutation(10)]
  again = planner.plan(shuffled)
  assert planner.solved == solved > 0
  assert again.time == first.time and planner.plan(lengths) == first
  assert Planner(devices=4, model=model(), time_limit=None, node_limit=200).plan(lengths) == first
  assert "static, degree" in first.report(planner.static(lengths))


@pytest.mark.slow
def test_a_batch_on_16_devices_with_the_solver():
  costs = gpt_7b(16)
  lengths = (np.random.default_rng(8).lognormal(8.5, 1.5, 48).astype(int) + 1).tolist()
  planner = Planner(devices=16, model=costs, time_limit=2.0)
  best = planner.plan(lengths)
  check_plan(best, 16)
  greedy = Planner(devices=16, model=costs, method="greedy").plan(lengths)
  assert planner.solved > 0
  assert best.bound <= best.time <= greedy.time <= best.time * 1.05
  assert greedy.time < planner.static(lengths, degree=16).time


@pytest.mark.slow
def test_processes_find_the_same_plan():
  lengths = np.random.default_rng(4).integers(1, 300, 12).tolist()
  plans = [
    Planner(devices=4, model=model(), time_limit=None, node_limit=50, processes=n).plan(lengths)
    for n in (1, 2)
  ]
  assert plans[0] == plans[1]


def test_static_plans_use_one_degree_and_flexible_ones_are_faster():
  rng = np.random.default_rng(5)
  costs = gpt_7b(16)
  lengths = np.minimum(rng.lognormal(8, 1.6, 60).astype(int) + 1, 120_000).tolist()
  planner = Planner(devices=16, model=costs, method="greedy")
  fixed = planner.static(lengths)
  assert len({g.degree for groups in fixed.micro_batches for g in groups}) == 1
  assert planner.plan(lengths).time < fixed.time
  assert fixed.time <= planner.static(lengths, degree=16).time


def test_planning_does_not_load_scipy():
  code = (
    "import json, sys, jaxdec, jaxdec.parallel.flexsp as f\n"
    "m = f.gpt_7b(8)\n"
    "f.Planner(devices=8, model=m, method='greedy').plan([5, 6])\n"
    "heavy = ('scipy', 'jaxdec.parallel.flexsp.execute')\n"
    "print(json.dumps([name for name in heavy if name in sys.modules]))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == []
