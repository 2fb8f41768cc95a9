# SPDX-License-Identifier: Apache-2.0
"""Draft trees through the delta rule and the short convolution, against loops along their paths."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.mixers import GatedDeltaConfig, tree_delta_rule
from jaxdec.mixers.delta_tree import tree_short_convolution
from jaxdec.mixers.testing import random_trees

K, N, H, V = 2, 4, 5, 3


def numpy_reference(q, k, v, beta, g, state):
  """One path of one row: the definition in float64 loops; the output of its last token."""
  s = np.asarray(state, np.float64).copy()
  for q_t, k_t, v_t, beta_t, g_t in zip(q, k, v, beta, g):
    out = np.zeros((N, V))
    for n in range(N):
      key, query = k_t[n // (N // K)], q_t[n // (N // K)]
      s[n] = np.exp(g_t[n])[..., None] * s[n]
      s[n] = s[n] + beta_t[n] * np.outer(key, v_t[n] - key @ s[n])
      out[n] = query @ s[n] * H**-0.5
  return out


@pytest.mark.parametrize("keys", ["independent", "alike"])
@pytest.mark.parametrize("gate", ["none", "weak", "forgetting", "channel"])
def test_trees_equal_their_paths(gate, keys):
  parent, topology = random_trees(5)
  b, m = parent.shape
  rng = np.random.default_rng(6)

  def normal(*shape):
    return rng.normal(size=shape)

  q, k, v, state = normal(b, m, K, H), normal(b, m, K, H), normal(b, m, N, V), normal(b, N, H, V)
  if keys == "alike":  # a mutual cosine near 1, where powers of the overlap cancel badly
    k = normal(1, 1, K, H) + 0.1 * k
  k = k / np.linalg.norm(k, axis=-1, keepdims=True)
  beta = rng.uniform(0, 2, (b, m, N))
  g = {
    "none": np.zeros((b, m, N)),
    "weak": np.full((b, m, N), -0.01),
    "forgetting": np.where(rng.random((b, m, N)) < 0.3, -np.inf, -0.1),
    "channel": -rng.uniform(0, 20, (b, m, N, H)),
  }[gate]
  with jax.enable_x64(True):
    exact = jax.jit(tree_delta_rule)(q, k, v, beta, None if gate == "none" else g, state, topology)
    exact = np.asarray(exact)
  single = (x.astype(np.float32) for x in (q, k, v, beta, g, state))
  single = np.asarray(jax.jit(tree_delta_rule)(*single, topology))
  for row in range(b):
    for node in range(m):
      path = np.flatnonzero(topology.ancestors[row, node])  # parents come first
      expected = numpy_reference(*(x[row, path] for x in (q, k, v, beta, g)), state[row])
      np.testing.assert_allclose(exact[row, node], expected, rtol=0, atol=1e-12)
      np.testing.assert_allclose(single[row, node], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_taps_follow_the_ancestors(width):
  parent, topology = random_trees(7)
  b, m = parent.shape
  rng = np.random.default_rng(8)
  x, tail, weight = (
    rng.normal(size=(b, m, 3)),
    rng.normal(size=(b, width - 1, 3)),
    rng.normal(size=(width, 3)),
  )
  with jax.enable_x64(True):
    y = np.asarray(jax.jit(tree_short_convolution)(x, weight, tail, topology))
  for row in range(b):
    for node in range(m):
      path = np.flatnonzero(topology.ancestors[row, node])
      rows = np.concatenate([tail[row], x[row, path]])[-width:]
      np.testing.assert_allclose(y[row, node], (weight * rows).sum(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"gate": "scaler"}, "did you mean 'scalar'"),
    ({"output_gate": "relu"}, "is not one of silu, sigmoid, None"),
    ({"num_v_heads": 3}, "num_v_heads=3 is not a multiple of num_heads=2"),
    ({"conv_width": 0}, "conv_width must be at least 1, got 0"),
    ({"chunk_size": 48}, "chunk_size must be one of"),
  ],
)
def test_configuration_mistakes(kwargs, message):
  with pytest.raises(UserError, match=message):
    GatedDeltaConfig(**{"num_heads": 2, "head_dim": 8, **kwargs})
