# SPDX-License-Identifier: Apache-2.0
"""Draft trees through the decaying recurrence, against an independent float64 token loop."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.mixers import LinearAttentionConfig, tree_linear_attention
from jaxdec.mixers.linear_attention import fixed_log_decay
from jaxdec.mixers.linear_tree import update_state
from jaxdec.mixers.testing import random_trees

N, K, H, V = 4, 2, 5, 3


def numpy_reference(q, k, v, g, state):
  """``S <- exp(g) S + k^T v; o = H^-1/2 q S`` in float64 loops."""
  q, k, v, g, state = (np.asarray(x, np.float64) for x in (q, k, v, g, state))
  b, t, n, h = q.shape
  group = n // k.shape[2]
  out = np.zeros((b, t, n, v.shape[-1]))
  s = state.copy()
  for row in range(b):
    for i in range(t):
      for kv in range(k.shape[2]):
        decay = np.exp(g[row, i, kv])[..., None]  # a number, or one per row of the state
        s[row, kv] = decay * s[row, kv] + np.outer(k[row, i, kv], v[row, i, kv])
        for head in range(kv * group, (kv + 1) * group):
          out[row, i, head] = q[row, i, head] @ s[row, kv] * h**-0.5
  return out, s


def rms_error(actual, expected) -> float:
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert np.isfinite(actual).all()
  norm = np.sqrt(np.mean(expected**2))
  return float(np.sqrt(np.mean((actual - expected) ** 2)) / max(norm, 1e-30))


@pytest.mark.parametrize("decay", [None, "weak", "mixed", "fifty", "all_inf", "channel", "half"])
def test_trees_equal_their_paths(decay):
  """Outputs and committed states of every node of random trees, against the loop along its path."""
  parent, topology = random_trees(5)
  b, m = parent.shape
  rng = np.random.default_rng(6)
  q, k, v, state = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((b, m, N, H), (b, m, K, H), (b, m, K, V), (b, K, H, V))
  )
  g = {
    None: np.zeros,
    "weak": lambda s: np.full(s, -0.01),
    "fifty": lambda s: np.full(s, -50.0),
    "mixed": lambda s: -rng.uniform(0, 20, s),
    "all_inf": lambda s: np.full(s, -np.inf),
    "channel": lambda s: -rng.uniform(0, 20, (*s, H)),
    # Channels that forget everything beside channels that forget nothing, in the same token.
    "half": lambda s: np.where(rng.random((*s, H)) < 0.5, -np.inf, 0.0),
  }[decay]((b, m, K)).astype(np.float32)
  given = None if decay is None else g
  out = jax.jit(tree_linear_attention)(q, k, v, given, state, topology)
  commit = jax.jit(update_state)
  for node in range(m):
    # Ancestors have smaller ids than their descendants, so masking the others leaves the path.
    on_path = np.asarray(topology.ancestors[:, node])
    committed = commit(state, k, v, log_decay=given, valid=on_path)
    for row in range(b):
      one, path = slice(row, row + 1), np.flatnonzero(on_path[row])
      expected, final = numpy_reference(*(x[one][:, path] for x in (q, k, v, g)), state[one])
      assert rms_error(out[row, node], expected[0, -1]) < 2e-6
      assert rms_error(committed[row], final[0]) < 1e-6


def test_fixed_ladders():
  retention = LinearAttentionConfig(num_heads=3, head_dim=8, decay="fixed")
  np.testing.assert_allclose(
    fixed_log_decay(retention), np.log([31 / 32, 63 / 64, 127 / 128]), rtol=1e-6
  )
  lightning = LinearAttentionConfig(num_heads=6, head_dim=8, decay="fixed", slopes="lightning")
  expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]  # ALiBi's list for 6 heads
  np.testing.assert_allclose(-fixed_log_decay(lightning), expected, rtol=1e-6)
  own = LinearAttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, decay="fixed", slopes=(3.0, 0.5)
  )
  np.testing.assert_allclose(fixed_log_decay(own), [-3.0, -0.5])


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"decay": "dta"}, "did you mean 'data'"),
    ({"feature_map": "relu"}, "is not one of identity, silu, elu"),
    ({"num_kv_heads": 3}, "not a multiple"),
    ({"chunk_size": 48}, "chunk_size must be a power of two such as 64, or None, got 48"),
    ({"gate_rank": 0}, "gate_rank must be at least 1, got 0"),
    ({"gate_normalizer": 0.0}, "gate_normalizer must be positive, got 0.0"),
    ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ({"slopes": (1.0,)}, "slopes must be 4 numbers"),
    ({"slopes": "retentoin"}, "did you mean 'retention'"),
    ({"normalize": True}, "feature_map='elu'"),
  ],
)
def test_configuration_mistakes(kwargs, message):
  with pytest.raises(UserError, match=message):
    LinearAttentionConfig(**{"num_heads": 4, "head_dim": 8, **kwargs})
