# SPDX-License-Identifier: Apache-2.0
"""The comparison of drafters: intervals, claims, and that every drafter takes part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxdec
from experiments.drafter_zoo import measure
from experiments.drafter_zoo.arms import ARMS, CLAIMS, LEFT_OUT, Budget
from jaxdec.distillation import make_drafter
from jaxdec.drafting import KINDS


def row(tokens, passes):
  """The first token of every prompt comes from prefill."""
  return {"tokens_by_prompt": [t + 1 for t in tokens], "passes_by_prompt": passes}


def test_intervals_cover_the_mean_as_often_as_they_say():
  """Prompts drawn from a law with a known ratio: the interval holds it in about 95 % of cases."""
  rng, held = np.random.default_rng(0), 0
  for _ in range(200):
    passes = rng.integers(20, 60, 40)
    tokens = passes + rng.binomial(passes, 0.5)
    value, low, high = measure.tokens_per_step(row(tokens, passes))
    assert low <= value <= high
    held += low <= 1.5 <= high
  assert 0.88 <= held / 200 <= 0.99


def test_differences_are_paired():
  """Prompts that are hard for both drafters don't widen the interval of their difference."""
  passes = np.arange(20, 60)
  easy = np.linspace(1, 3, 40)
  one, other = row(passes * (easy + 0.1), passes), row(passes * easy, passes)
  value, low, high = measure.difference(one, other)
  assert (value, low, high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-9)
  spread = measure.tokens_per_step(one)
  assert spread[2] - spread[1] > 0.3  # alone they are wide


def test_verdicts():
  passes = np.full(30, 50)
  rows = {
    "hydra": row(passes * 2.0, passes), "medusa": row(passes * 1.5, passes),
    "hydra++": row(passes * 1.8, passes),
  }  # fmt: skip
  found = {r["claim"]: r["verdict"] for r in measure.order(rows, CLAIMS)}
  assert found == {"hydra > medusa": "holds", "hydra++ ≥ hydra": "violated"}
  assert measure.verdict(-0.1, 0.1, strict=True) == "undecided"
  assert measure.verdict(-0.1, 0.1, strict=False) == "not violated"


def test_speedup_model():
  assert measure.expected_speedup(3.0, 5, 0.1, 1.5) == pytest.approx(1.5)
  assert measure.expected_speedup(1.0, 0, 0.1, 1.0) == 1.0


def test_every_drafter_takes_part():
  """Each arm's settings make its drafter, and no registered drafter is forgotten."""
  config, budget = jaxdec.tiny().config, Budget(steps=1)
  made = {
    arm.kind: make_drafter(arm.job(budget, Path(".")), config) for arm in ARMS.values() if arm.kind
  }
  assert set(made) | set(LEFT_OUT) == set(KINDS)
  for arm in ARMS.values():
    assert sum(map(bool, (arm.kind, arm.trained_as in ARMS, arm.untrained))) == 1
  assert {name for claim in CLAIMS for name in claim[:2]} <= set(ARMS)
