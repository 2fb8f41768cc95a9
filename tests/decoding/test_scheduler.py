# SPDX-License-Identifier: Apache-2.0
"""The policy's promises, over random arrivals, finishes and cancellations."""

from __future__ import annotations

import random

import pytest

from jaxdec.decoding.scheduler import Scheduler

SIZES = dict(slots=3, width=4, chunk=8, queue=5)


@pytest.mark.parametrize("budget", [20, 33, 64])
@pytest.mark.parametrize("seed", range(4))
def test_invariants_hold_under_random_traffic(budget, seed):
  rng = random.Random(seed)
  skipped = {}

  def skip(id, slot):
    skipped[id] = rng.choice([0, 0, lengths[id] - 1])
    return skipped[id]

  scheduler = Scheduler(**SIZES, budget=budget, skip=skip)
  lengths, read, opened, admitted, live = {}, {}, [], [], set()
  for _step in range(400):
    for _ in range(rng.choice([0, 0, 1, 3])):
      name = len(lengths)
      lengths[name] = rng.randint(1, 50)
      if scheduler.full:
        with pytest.raises(ValueError, match="holds 5 requests"):
          scheduler.submit(name, lengths[name])
        continue
      scheduler.submit(name, lengths[name])
      admitted.append(name)
      live.add(name)
    before, waiting, free = dict(scheduler.decoding), len(scheduler.queue), len(scheduler.free)
    reading = scheduler.reading
    plan = scheduler.plan()
    # Decoding requests never wait, and the budget is never exceeded.
    assert plan.decode == tuple(before)
    assert plan.tokens == 4 * len(plan.decode) + 8 * len(plan.chunks) <= budget
    # Whatever can be read is read: at least one chunk, and all that the budget allows.
    if reading is not None or (waiting and free):
      assert plan.chunks
    if plan.tokens + 8 <= budget:
      assert scheduler.reading is None and not (scheduler.queue and scheduler.free)
    for chunk in plan.chunks:
      if chunk.first:
        opened.append(chunk.id)
        assert chunk.slot not in before and chunk.start == skipped[chunk.id]
        read[chunk.id] = chunk.start
      assert chunk.start == read[chunk.id] and 1 <= chunk.count <= 8
      read[chunk.id] += chunk.count
      assert chunk.last == (read[chunk.id] == lengths[chunk.id])
      assert chunk.last or chunk.count == 8
      assert not chunk.last or scheduler.decoding[chunk.slot] == chunk.id
    # Slots are conserved.
    taken = set(scheduler.decoding) | ({scheduler.reading.slot} if scheduler.reading else set())
    assert taken | set(scheduler.free) == set(range(3))
    assert len(taken) + len(scheduler.free) == 3
    for gone in [x for x in sorted(live) if rng.random() < 0.1]:
      live.discard(gone)
      if gone in scheduler.queue:
        admitted.remove(gone)  # cancelled before it got a slot
      where = {other: slot for slot, other in scheduler.decoding.items()}.get(gone)
      assert scheduler.release(gone) == where
  # First come, first served.
  assert opened == admitted[: len(opened)] and len(opened) > 50


def test_a_long_prompt_does_not_hold_up_decoding_and_moves_every_step():
  scheduler = Scheduler(**SIZES, budget=20)
  scheduler.submit(0, 3)
  assert [c.last for c in scheduler.plan().chunks] == [True]
  scheduler.submit(1, 80)
  for i in range(10):
    plan = scheduler.plan()
    assert plan.decode == (0,) and len(plan.chunks) >= 1, i
    if plan.chunks[-1].last:
      break
  assert scheduler.plan().decode == (0, 1)


def test_a_budget_too_small_for_the_slots_is_refused():
  with pytest.raises(ValueError, match="budget 19 < slots 3"):
    Scheduler(**SIZES, budget=19)
