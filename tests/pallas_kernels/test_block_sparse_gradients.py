# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention over some of the keys add up to those over all of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import target
from pallas_kernels.block_sparse_attention import (
  XLAConfig,
  block_sparse_attention,
  block_sparse_attention_gradients,
)
from pallas_kernels.testing import COMPILE_ONCE, assert_close

WAYS = {
  "reference": {"implementation": "reference"},
  "short": {"implementation": "xla"},
  "loops": {"implementation": "xla", "config": XLAConfig()},
  "mosaic_tpu": {"implementation": "mosaic_tpu"},
}


def arrays(T, S, dtype):
  rng = np.random.default_rng(0)
  shapes = (2, T, 4, 8), (2, S, 2, 8), (2, S, 2, 8), (2, T, 4, 8)
  q, k, v, dout = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
  ids = np.sort(rng.integers(0, 3, (2, S)))
  ids[1, -7:] = -1  # queries that see nothing
  return q, k, v, dout, jnp.asarray(ids, jnp.int32)


@functools.partial(jax.jit, static_argnames=("way", "cut"), compiler_options=COMPILE_ONCE)
def both(q, k, v, dout, ids, way, cut):
  """Of all keys at once by the reference's own gradient, and summed over keys before and after."""
  rule = {"logit_cap": 2.0, "scale": 0.5}
  attend = functools.partial(
    block_sparse_attention, segment_ids=ids, implementation="reference", **rule
  )
  (out, lse), pull = jax.vjp(lambda *xs: attend(*xs, return_lse=True), q, k, v)
  delta = jnp.sum(dout * out, axis=-1).swapaxes(1, 2)
  part = functools.partial(block_sparse_attention_gradients, **rule, **WAYS[way])
  # Key j < cut is seen by every query i >= cut; the queries before it see what is causal.
  first = part(
    q[:, :cut], k[:, :cut], v[:, :cut], lse[..., :cut], dout[:, :cut], delta[..., :cut],
    segment_ids=ids[:, :cut],
  )  # fmt: skip
  rest = q[:, cut:], k, v, lse[..., cut:], dout[:, cut:], delta[..., cut:]
  later = part(*rest, segment_ids=(ids[:, cut:], ids))
  summed = (
    jnp.concatenate([first[0], later[0]], axis=1),
    *(later[i].at[:, :cut].add(first[i]) for i in (1, 2)),
  )
  return pull((dout, jnp.zeros_like(lse))), summed


@pytest.mark.parametrize("way", ["reference", "short", "loops"])
def test_parts_add_up_in_float64(way):
  with jax.enable_x64(True):
    expected, got = both(*arrays(48, 48, jnp.float64), way, 20)
    for x, y in zip(got, expected):
      assert x.dtype == jnp.float64
      np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_parts_add_up_on_a_tpu():
  with target("tpu", generation="v5e", interpret=True):
    expected, got = both(*arrays(256, 256, jnp.float32), "mosaic_tpu", 128)
  assert_close(list(got), list(expected), 1e-5)


def test_mistakes_are_one_sentence():
  q, k, v, dout, _ = arrays(8, 8, jnp.float32)
  lse = jnp.zeros((2, 4, 8))
  with pytest.raises(ValueError, match=r"delta has shape \(2, 8, 4\), expected \(2, 4, 8\)"):
    block_sparse_attention_gradients(q, k, v, lse, dout, lse.swapaxes(1, 2))
  with pytest.raises(ValueError, match=r"dout has shape \(2, 8, 4\)"):
    block_sparse_attention_gradients(q, k, v, lse, dout[..., 0], lse)
