# SPDX-License-Identifier: Apache-2.0
"""Settings as data draw what static settings draw."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler
from jaxdec.decoding.row_sampler import RowSampler
from jaxdec.decoding.sampling import request_keys

SAMPLERS = [
  Sampler(),
  Sampler(temperature=1.0),
  Sampler(temperature=0.7, top_k=5),
  Sampler(temperature=1.3, top_p=0.8),
  Sampler(temperature=0.31, top_k=40, top_p=0.95, min_p=0.02),
  Sampler(temperature=2.0, min_p=0.1, top_p=1 - 2**-24),  # the sum of all may be below that
  Sampler(temperature=0.0, top_k=2),
  Sampler(temperature=0.9, top_k=1000, top_p=1.0, min_p=0.0),
]
V = 97


def inputs(n, t):
  logits = 3 * jax.random.normal(jax.random.key(n), (n, t, V))
  logits = jnp.round(logits * 4) / 4  # ties, at the thresholds too
  positions = jnp.arange(n * t, dtype=jnp.int32).reshape(n, t)
  return logits, request_keys(list(range(n)), n), positions


def draws(sampler, logits, keys, positions):
  return (
    sampler.draw(logits[:, 0], keys, positions[:, 0]),
    sampler.draw(logits, keys, positions),
    sampler.draw_independently(logits, keys, positions),
    sampler.log_probs(logits),
  )


@functools.cache
def by_row():
  """Of all samplers, in one program: batches of one under each sampler; and all rows together."""
  n = len(SAMPLERS)
  arrays = inputs(n, 40)

  @jax.jit
  def compute(rows, *arrays):
    one = [draws(s, *(x[i : i + 1] for x in arrays)) for i, s in enumerate(SAMPLERS)]
    logits, keys, positions = arrays
    return one, draws(rows, *arrays), (rows.process(logits), rows.noise(keys, positions, V))

  return compute(RowSampler.of(SAMPLERS), *arrays)


@pytest.mark.parametrize("i", range(len(SAMPLERS)))
def test_rows_draw_what_their_own_sampler_draws(i):
  one, rows, (processed, noise) = by_row()
  for mine, alone in zip(rows[:3], one[i][:3]):
    np.testing.assert_array_equal(mine[i], alone[0])
  mine, alone = np.asarray(rows[3][i]), np.asarray(one[i][3][0])
  np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(alone))
  np.testing.assert_allclose(mine, alone, atol=1e-5)
  np.testing.assert_allclose(np.exp(alone).sum(-1), 1, atol=1e-5)
  # What a drafter ranks by: its best is the draw, with the noise it is given.
  np.testing.assert_array_equal(np.argmax(processed[i] + noise[i], -1), rows[1][i])
  assert SAMPLERS[i].greedy == (not np.any(noise[i]))


def test_settings_compile_nothing():
  logits, keys, positions = inputs(2, 1)
  draw = jax.jit(lambda rows: rows.draw(logits, keys, positions))
  for sampler in SAMPLERS:
    draw(RowSampler.of([sampler, SAMPLERS[1]]))
  assert draw._cache_size() == 1
