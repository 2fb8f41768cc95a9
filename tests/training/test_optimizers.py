# SPDX-License-Identifier: Apache-2.0
"""Schedules, decay masks, and Muon on single, stacked and excluded matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdec.errors import UserError
from jaxdec.training.optimizers import (
  OptimizerConfig,
  decay_mask,
  make_optimizer,
  muon_dimensions,
  schedule,
)


def rates(steps=100, **kwargs):
  fn = schedule(OptimizerConfig(learning_rate=1.0, **kwargs), steps)
  return np.asarray(jax.jit(jax.vmap(fn))(jnp.arange(steps)))


def test_cosine_warms_up_peaks_and_ends_at_the_final_ratio():
  r = rates(schedule="cosine", warmup_steps=10, final_ratio=0.1)
  np.testing.assert_allclose(r[:10], np.arange(1, 11) / 10, rtol=1e-6)
  assert r.max() == r[10] == 1.0
  assert np.all(np.diff(r[10:]) < 0)
  np.testing.assert_allclose(r[-1], 0.1, atol=1e-3)
  np.testing.assert_allclose(r[55], 0.55, atol=1e-6)  # half way


def test_wsd_is_flat_then_falls_linearly():
  r = rates(schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_ratio=0.0)
  np.testing.assert_allclose(r[9:80], 1.0)
  np.testing.assert_allclose(r[80:], 1 - np.arange(20) / 20, atol=1e-6)


def test_short_trial_of_a_long_recipe_still_reaches_its_peak():
  assert rates(10, warmup_steps=1000).max() == 1.0
  assert np.all(rates(5, schedule="constant", warmup_steps=0) == 1.0)


def test_bad_settings():
  with pytest.raises(UserError, match="adamw, muon, got 'sgd'"):
    OptimizerConfig(name="sgd")
  with pytest.raises(UserError, match="positive"):
    OptimizerConfig(learning_rate=0)


def params(key=0):
  rng = np.random.default_rng(key)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  return {
    "embed": normal(16, 8),
    "stack": {
      "mlp": {"kernel": normal(3, 8, 12), "bias": normal(3, 12)},
      "norm": {"scale": normal(3, 8)},
    },
    "head": {"kernel": normal(8, 16)},
  }


def test_decay_touches_matrices_only():
  mask = decay_mask(params())
  assert mask["stack"]["mlp"]["kernel"] and mask["head"]["kernel"]
  assert not mask["embed"] and not mask["stack"]["norm"]["scale"]
  assert not mask["stack"]["mlp"]["bias"]


def test_muon_takes_hidden_matrices_only():
  dims = muon_dimensions(params())
  assert dims["stack"]["mlp"]["kernel"] == optax.contrib.MuonDimensionNumbers(-2, -1)
  assert dims["embed"] is None and dims["head"]["kernel"] is None
  assert dims["stack"]["norm"]["scale"] is None


def update(optimizer_config, p, g):
  optimizer = make_optimizer(optimizer_config, 10)
  return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(p, g)


def test_muon_on_stacked_layers_equals_muon_on_each():
  config = OptimizerConfig(name="muon", learning_rate=0.1, warmup_steps=0, clip_norm=None)
  p, g = params(0), params(1)
  stacked = update(config, p, g)["stack"]["mlp"]["kernel"]
  for i in range(3):
    one_p = {"kernel": p["stack"]["mlp"]["kernel"][i]}
    one_g = {"kernel": g["stack"]["mlp"]["kernel"][i]}
    np.testing.assert_allclose(stacked[i], update(config, one_p, one_g)["kernel"], rtol=1e-4)


def test_muon_update_is_orthogonal_and_has_the_rms_of_adam():
  config = OptimizerConfig(
    name="muon", learning_rate=1.0, warmup_steps=0, clip_norm=None, weight_decay=0.0
  )
  u = np.asarray(update(config, params(0), params(1))["stack"]["mlp"]["kernel"])
  for matrix in u:
    # Newton-Schulz with five steps brings singular values near 1, scaled by 0.2 sqrt(max(m, n)).
    values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(12))
    assert np.all((values > 0.6) & (values < 1.3)), values


def test_clipping_bounds_the_gradient():
  huge = jax.tree.map(lambda x: x * 1e6, params(1))
  config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, clip_norm=1.0, eps=1.0)
  clipped = update(config, params(0), huge)
  unit = jax.tree.map(lambda x: x / optax.tree.norm(huge), huge)
  expected = update(config, params(0), unit)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), clipped, expected
  )
