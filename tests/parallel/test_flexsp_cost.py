# SPDX-License-Identifier: Apache-2.0
"""FlexSP's cost model: the formula by hand, and the fit of known coefficients."""

from __future__ import annotations

import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.parallel.flexsp import CostModel, Exchange, Step, fit, gpt_7b
from jaxdec.parallel.flexsp.cost import token_cap

COSTS = CostModel(
  a1=2e-6, a2=0.01, b1=7.0, bandwidth={2: 10.0, 4: 5.0}, bytes_per_token=2.0**16, cap=4096
)


def test_cost_of_a_sequence_by_hand():
  # (2e-6 * 10^6 + 0.01 * 1000) = 12; 1000 tokens x 64 KiB = 62.5 MiB
  assert float(COSTS.time(1000, 1)) == pytest.approx(12.0)
  assert float(COSTS.time(1000, 2)) == pytest.approx(6.0 + 62.5 / 2 / 10)
  assert float(COSTS.time(1000, 4)) == pytest.approx(3.0 + 62.5 / 4 / 5)
  assert COSTS.group_time([1000, 1000], 2) == pytest.approx(7 + 2 * (6.0 + 62.5 / 2 / 10))
  assert COSTS.group_time([], 2) == 0


def test_least_degree():
  assert [COSTS.least_degree(s) for s in (1, 4096, 4097, 8192, 8193, 16384, 16385)] == [
    1, 1, 2, 2, 4, 4, 8,
  ]  # fmt: skip


def test_paper_model():
  costs = gpt_7b(64)
  # 16 l h = 2 MiB a token; 1024 tokens on 2 devices: 1 GiB each over 154
  assert float(costs.time(1024, 2) - (5.128e-6 * 2**20 + 0.18396 * 1024) / 2) == pytest.approx(
    1024 / 154
  )
  # 72 GiB - 16 * 1024 * 7 / 64 MiB of states, 4.71 MiB a token
  assert costs.cap == int((72 * 1024 - 16 * 1024 * 7 / 64) / 4.71)


@pytest.mark.parametrize("zero, share", [(3, 1 / 8), (2, 7 / 64 + 1 / 8), (1, 6 / 64 + 2 / 8)])
def test_token_cap(zero, share):
  expected = int((80_000 - 16 * 1024 * 3 * share) // 2)
  assert (
    token_cap(memory_mib=80_000, params_billion=3, devices=8, activation_mib=2, zero=zero)
    == expected
  )


def measurements(costs, noise=0.0, seed=0):
  rng = np.random.default_rng(seed)

  def ms(value):
    return float(value * np.exp(noise * rng.standard_normal()))

  steps = [
    Step(lengths, degree, ms(costs.group_time(lengths, degree)))
    for degree in (1, 2, 4)
    for lengths in ((512,), (4096,), (512,) * 8, (2048, 1024), (16384,))
  ]
  exchanges = [
    # a latency of 0.2 ms, which is not bandwidth
    Exchange(degree, mib, ms(0.2 + mib / bandwidth))
    for degree, bandwidth in costs.bandwidth
    for mib in (1.0, 16.0, 64.0)
  ]
  return steps, exchanges


def test_fit_recovers_the_model():
  steps, exchanges = measurements(COSTS)
  found = fit(steps, exchanges, cap=COSTS.cap, bytes_per_token=COSTS.bytes_per_token)
  for name in ("a1", "a2", "b1"):
    assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=1e-6)
  assert dict(found.bandwidth) == pytest.approx(dict(COSTS.bandwidth), rel=1e-6)


def test_fit_of_noisy_steps_is_within_the_noise():
  steps, exchanges = measurements(COSTS, noise=0.02)
  found = fit(steps, exchanges, cap=COSTS.cap, bytes_per_token=COSTS.bytes_per_token)
  clean, _ = measurements(COSTS)
  errors = [found.group_time(x.lengths, x.degree) / x.ms - 1 for x in clean]
  assert max(map(abs, errors)) < 0.06


def test_fit_of_linear_layers_has_no_square():
  costs = CostModel(a1=0.0, a2=0.01, b1=7.0, cap=4096)
  steps = [s for s in measurements(costs)[0] if s.degree == 1]
  found = fit(steps, cap=4096, linear=True)
  assert found.a1 == 0 and found.a2 == pytest.approx(0.01) and found.b1 == pytest.approx(7)


def test_fit_never_gives_a_negative_coefficient():
  steps = [Step((100,), 1, 5.0), Step((200,), 1, 4.0), Step((400,), 1, 3.0)]
  found = fit(steps, cap=400)
  assert min(found.a1, found.a2, found.b1) >= 0


def test_fit_errors():
  steps, _ = measurements(COSTS)
  with pytest.raises(UserError, match="no bandwidth for groups of 2"):
    fit(steps, cap=4096, bytes_per_token=1.0)
  with pytest.raises(UserError, match="at least 3 different steps, got 2"):
    fit(steps[:2], cap=4096)
