# SPDX-License-Identifier: Apache-2.0
"""GLA and delta-rule mixers on a split sequence: outputs and gradients as on one device."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.mixers import GatedDeltaConfig, LinearAttentionConfig, build_mixer
from jaxdec.parallel import make_mesh
from jaxdec.parallel.sequence import SequenceConfig, from_zigzag, to_zigzag
from pallas_kernels.testing import COMPILE_ONCE

BATCH, LENGTH, DIM, WAYS = 2, 32, 16, 4
MIXERS = {
  "gla": LinearAttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=6, decay="channel", feature_map="identity", chunk_size=4
  ),
  "gated_delta": GatedDeltaConfig(
    num_heads=2, num_v_heads=4, head_dim=6, value_dim=10, chunk_size=8
  ),
  "kimi_delta": GatedDeltaConfig(num_heads=2, head_dim=6, gate="channel", chunk_size=8),
}
SLOW = pytest.mark.slow
QUICK = ("gated_delta", "gather", "contiguous")
CASES = [
  pytest.param(*case, marks=() if case == QUICK else SLOW)
  for case in itertools.product(MIXERS, ("gather", "scan", "chain"), ("contiguous", "zigzag"))
]


def outputs_and_gradients(config, sequence, params, x, segments, weight):
  """Loss, output, and the loss's gradients by parameters and inputs."""
  mixer = build_mixer(config, DIM, sequence=sequence)
  positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])

  def loss(params, x, segments, weight):
    y = mixer.apply(params, x, positions, segments)
    return jnp.sum(y * weight), y

  gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
  return jax.jit(gradient, compiler_options=COMPILE_ONCE)(params, x, segments, weight)


@pytest.mark.parametrize("name, exchange, layout", CASES)
def test_split_equals_whole(name, exchange, layout):
  config = MIXERS[name]
  x, weight = jax.random.normal(jax.random.key(0), (2, BATCH, LENGTH, DIM))
  # Documents that straddle shards, one shorter than a convolution reaches, one that begins a shard.
  starts = jnp.array([0, 5, 7, 16, 29])
  segments = jnp.searchsorted(starts, jnp.arange(LENGTH), side="right").astype(jnp.int32)
  segments = jnp.broadcast_to(segments, (BATCH, LENGTH))
  mixer = build_mixer(config, DIM)
  params = nn.unbox(mixer.init(jax.random.key(1), x[:, :2], segments[:, :2]))
  expected = outputs_and_gradients(config, None, params, x, segments, weight)

  zigzag = layout == "zigzag"
  if zigzag:
    x, segments, weight = (to_zigzag(a, WAYS) for a in (x, segments, weight))
  sequence = SequenceConfig(linear=exchange, layout=layout)
  with jax.set_mesh(make_mesh(seq=WAYS)):
    (loss, y), (d_params, d_x) = outputs_and_gradients(
      config, sequence, params, x, segments, weight
    )
  if zigzag:
    y, d_x = (from_zigzag(a, WAYS) for a in (y, d_x))
  for got, want in zip(
    jax.tree.leaves(((loss, y), (d_params, d_x))), jax.tree.leaves(expected), strict=True
  ):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
