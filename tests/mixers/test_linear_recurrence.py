# SPDX-License-Identifier: Apache-2.0
"""The scalar-decay recurrence against a float64 token loop written independently of it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.mixers import (
  LinearAttentionConfig,
  chunked_linear_attention,
  recurrent_linear_attention,
  tree_linear_attention,
)
from jaxdec.mixers.linear_attention import fixed_log_decay
from jaxdec.mixers.linear_recurrence import update_state
from jaxdec.mixers.testing import random_trees

B, T, N, K, H, V = 2, 37, 4, 2, 5, 3

chunked = jax.jit(chunked_linear_attention, static_argnames=("chunk_size", "scale"))


def numpy_reference(q, k, v, g, state, segment_ids=None, scale=None):
  """``S <- exp(g) S + k^T v; o = scale q S`` in float64 loops; a new segment starts from S = 0."""
  q, k, v, g, state = (np.asarray(x, np.float64) for x in (q, k, v, g, state))
  b, t, n, h = q.shape
  group = n // k.shape[2]
  out = np.zeros((b, t, n, v.shape[-1]))
  s = state.copy()
  for row in range(b):
    for i in range(t):
      new = segment_ids is not None and i > 0 and segment_ids[row, i] != segment_ids[row, i - 1]
      for kv in range(k.shape[2]):
        past = 0.0 if new else np.exp(g[row, i, kv]) * s[row, kv]
        s[row, kv] = past + np.outer(k[row, i, kv], v[row, i, kv])
        for head in range(kv * group, (kv + 1) * group):
          out[row, i, head] = q[row, i, head] @ s[row, kv] * (h**-0.5 if scale is None else scale)
  return out, s


@functools.cache
def arrays(t=T):
  rng = np.random.default_rng(t)
  shapes = ((B, t, N, H), (B, t, K, H), (B, t, K, V), (B, K, H, V))
  return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def log_decays(kind: str, t: int = T) -> np.ndarray:
  rng = np.random.default_rng(1)
  g = {
    "zero": np.zeros((B, t, K)),
    "weak": np.full((B, t, K), -0.01),
    "mixed": -rng.uniform(0, 20, (B, t, K)),
    "strong": np.full((B, t, K), -20.0),
    "hits_20": np.full((B, t, K), -0.01),
    "hits_1e9": np.full((B, t, K), -0.01),
    "hits_inf": np.full((B, t, K), -0.01),
    "all_inf": np.full((B, t, K), -np.inf),
  }[kind]
  if kind.startswith("hits"):
    g[:, ::7] = {"hits_20": -20.0, "hits_1e9": -1e9, "hits_inf": -np.inf}[kind]
  return g.astype(np.float32)


DECAYS = ("zero", "weak", "mixed", "strong", "hits_20", "hits_1e9", "hits_inf", "all_inf")


def rms_error(actual, expected) -> float:
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert np.isfinite(actual).all()
  norm = np.sqrt(np.mean(expected**2))
  return float(np.sqrt(np.mean((actual - expected) ** 2)) / max(norm, 1e-30))


@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_equal_the_token_loop(decay):
  q, k, v, state = arrays()
  g = log_decays(decay)
  expected = numpy_reference(q, k, v, g, state)
  for size in (1, 16, T, 64):
    actual = chunked(q, k, v, log_decay=g, initial_state=state, chunk_size=size)
    assert rms_error(actual[0], expected[0]) < 1e-6, size
    assert rms_error(actual[1], expected[1]) < 1e-6, size
  actual = recurrent_linear_attention(q, k, v, log_decay=g, initial_state=state)
  assert rms_error(actual[0], expected[0]) < 1e-6
  assert rms_error(actual[1], expected[1]) < 1e-6


def test_no_decay_equals_zero_decay():
  q, k, v, state = arrays()
  zero = chunked(q, k, v, log_decay=log_decays("zero"), initial_state=state, chunk_size=16)
  none = chunked(q, k, v, initial_state=state, chunk_size=16)
  assert rms_error(none[0], zero[0]) < 1e-6
  assert rms_error(none[1], zero[1]) < 1e-6


def test_total_decay_sees_the_token_itself_only():
  q, k, v, state = arrays()
  out, _ = chunked(
    q, k, v, log_decay=np.full((1, 1, K), -50.0, np.float32), initial_state=state, scale=1.0
  )
  scores = np.einsum("btkgh,btkh->btkg", q.reshape(B, T, K, N // K, H), k)
  expected = np.einsum("btkg,btkv->btkgv", scores, v).reshape(B, T, N, V)
  assert rms_error(out, expected) < 1e-6


def test_small_decays_survive_large_ones():
  """After a hit of -100 the weak decays of a 256-token chunk keep full precision."""
  t = 256
  q, k, v, state = arrays(t)
  g = np.full((B, t, K), -0.01, np.float32)
  g[:, ::50] = -100.0
  expected = numpy_reference(q, k, v, g, state)
  actual = chunked(q, k, v, log_decay=g, initial_state=state, chunk_size=t)
  assert rms_error(actual[0], expected[0]) < 5e-7
  plain = np.cumsum(g, 1, dtype=np.float32)  # the sum one would write first is not good enough
  exact = np.cumsum(g.astype(np.float64), 1)
  assert np.abs((plain[:, -1] - plain[:, -6]) - (exact[:, -1] - exact[:, -6])).max() > 2e-5


@pytest.mark.parametrize("with_decay", [True, False])
def test_segments(with_decay):
  q, k, v, state = arrays()
  g = log_decays("mixed" if with_decay else "zero")
  cuts = np.array([[5, 16, 17, 33], [1, 8, 32, 36]])
  segments = 1 + (np.arange(T)[None, :, None] >= cuts[:, None, :]).sum(-1)
  expected = numpy_reference(q, k, v, g, state, segments)
  actual = chunked(
    q,
    k,
    v,
    log_decay=g if with_decay else None,
    initial_state=state,
    segment_ids=segments,
    chunk_size=16,
  )
  assert rms_error(actual[0], expected[0]) < 1e-6
  assert rms_error(actual[1], expected[1]) < 1e-6


def test_padding_leaves_the_state_alone():
  """Invalid tokens anywhere, filled with NaN, as if they weren't there; their ids do not reset."""
  q, k, v, state = arrays()
  g = log_decays("mixed")
  valid = np.random.default_rng(2).random((B, T)) < 0.6
  valid[:, 0], valid[0, -5:] = False, False
  segments = np.where(valid, 1 + (np.arange(T) >= 20)[None], 0)
  poison = lambda x: np.where(valid.reshape(B, T, *(1,) * (x.ndim - 2)), x, np.nan)  # noqa: E731
  out, final = chunked(
    q,
    poison(k),
    poison(v),
    log_decay=poison(g),
    initial_state=state,
    segment_ids=segments,
    valid=valid,
    chunk_size=16,
  )
  for b in range(B):
    kept = np.flatnonzero(valid[b])
    row = slice(b, b + 1)
    expected = numpy_reference(
      *(x[row, kept] for x in (q, k, v, g)), state[row], segments[row, kept]
    )
    assert rms_error(out[b, kept], expected[0][0]) < 1e-6
    assert rms_error(final[b], expected[1][0]) < 1e-6


@pytest.mark.parametrize("t", [0, 1, 3])
def test_short_inputs(t):
  q, k, v, state = (x[:, :t] if i < 3 else x for i, x in enumerate(arrays()))
  g = log_decays("mixed")[:, :t]
  expected = numpy_reference(q, k, v, g, state)
  out, final = chunked(q, k, v, log_decay=g, initial_state=state)
  assert out.shape == (B, t, N, V)
  np.testing.assert_allclose(out, expected[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(final, expected[1], rtol=1e-5, atol=1e-6)


def test_zero_values_give_zeros():
  q, k, v, _ = arrays()
  out, final = chunked(q, k, 0 * v, log_decay=log_decays("weak"))
  assert not np.asarray(out).any() and not np.asarray(final).any()


def test_bfloat16():
  q, k, v, state = arrays()
  g = log_decays("weak")
  low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  out, final = chunked(*low, log_decay=g, initial_state=state)
  assert out.dtype == jnp.bfloat16 and final.dtype == jnp.float32
  expected, _ = numpy_reference(q, k, v, g, state)
  assert np.abs(out.astype(jnp.float32) - expected).max() < 2e-2 * np.abs(expected).max()


def gradients(function, inputs, cotangents):
  def loss(q, k, v, g, state):
    out, final = function(q, k, v, log_decay=g, initial_state=state)
    return jnp.sum(out * cotangents[0]) + jnp.sum(final * cotangents[1])

  return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*inputs)


@pytest.mark.parametrize("decay", ["weak", "mixed", "strong", "hits_20", "hits_1e9", "hits_inf"])
def test_gradients(decay):
  """All five gradients in float32 against autodiff of the token scan in float64."""
  q, k, v, state = arrays()
  inputs = (q, k, v, log_decays(decay), state)
  rng = np.random.default_rng(3)
  cotangents = rng.normal(size=(B, T, N, V)), rng.normal(size=(B, K, H, V))
  with jax.enable_x64(True):
    exact = [np.asarray(x, np.float64) for x in inputs]
    expected = gradients(recurrent_linear_attention, exact, cotangents)
    assert expected[0].dtype == np.float64
    expected = [np.asarray(x) for x in expected]
  function = functools.partial(chunked_linear_attention, chunk_size=16)
  actual = gradients(function, inputs, [x.astype(np.float32) for x in cotangents])
  for name, a, e in zip(("q", "k", "v", "log_decay", "state"), actual, expected):
    assert rms_error(a, e) < 1e-5, name
  # Element by element too: a strongly decayed token's gradient isn't drowned by its neighbours'.
  error = np.abs(np.asarray(actual[3], np.float64) - expected[3])
  size = np.abs(expected[3])
  assert np.median((error / np.maximum(size, 1e-30))[size > 1e-30]) < 1e-5


def test_forward_mode_agrees_with_reverse_mode():
  q, k, v, state = arrays()
  g, dg = log_decays("weak"), np.random.default_rng(4).normal(size=(B, T, K)).astype(np.float32)

  def loss(g):
    return chunked_linear_attention(q, k, v, log_decay=g, initial_state=state)[0].sum()

  forward = jax.jit(lambda: jax.jvp(loss, (g,), (dg,))[1])()
  np.testing.assert_allclose(forward, np.sum(jax.jit(jax.grad(loss))(g) * dg), rtol=1e-4)


@pytest.mark.parametrize("decay", [None, "weak", "mixed", "fifty", "all_inf"])
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
    ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ({"slopes": (1.0,)}, "slopes must be 4 numbers"),
    ({"slopes": "retentoin"}, "did you mean 'retention'"),
    ({"normalize": True}, "feature_map='elu'"),
  ],
)
def test_configuration_mistakes(kwargs, message):
  with pytest.raises(UserError, match=message):
    LinearAttentionConfig(**{"num_heads": 4, "head_dim": 8, **kwargs})


def test_head_mismatch():
  q, k, v, _ = arrays()
  with pytest.raises(UserError, match="3 query heads are not a multiple of 2"):
    chunked_linear_attention(q[:, :, :3], k, v)
