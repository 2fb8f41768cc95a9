# SPDX-License-Identifier: Apache-2.0
"""Remat policies: the same gradients, less memory, no collective of states twice."""

from __future__ import annotations

from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.mixers import AttentionConfig, LinearAttentionConfig
from jaxdec.models import Decoder, DecoderConfig, LayerConfig, MLPConfig, stack_layers
from jaxdec.models.remat import Remat
from pallas_kernels.testing import COMPILE_ONCE

POLICIES = get_args(Remat)


def hybrid(repeats: int = 2) -> DecoderConfig:
  mixers = (
    LinearAttentionConfig(num_heads=2, head_dim=8),
    AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
  )
  layers = tuple(LayerConfig(mixer, MLPConfig(32)) for mixer in mixers)
  return DecoderConfig(vocab_size=17, dim=16, layers=layers * repeats)


def gradient(model: Decoder):
  def loss(params, tokens):
    logits = model.apply({"params": params}, tokens).logits
    return jnp.mean(jnp.square(logits)) + jnp.mean(logits[..., 0])

  return jax.jit(jax.grad(loss), compiler_options=COMPILE_ONCE)


@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_gradients_are_the_same_under_every_policy(layout):
  config = hybrid(2 if layout == "scanned" else 1)
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 17)
  params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), tokens)["params"])
  if layout == "scanned":
    params = stack_layers(params, config)
  found = {
    remat: gradient(Decoder(config, layout=layout, remat=remat))(params, tokens)
    for remat in POLICIES
  }
  for remat in POLICIES:
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
      found[remat],
      found["none"],
    )


def test_each_policy_keeps_less():
  """Temporary memory of a deep stack, as compiled."""
  config = hybrid(4)
  tokens = jnp.zeros((4, 256), jnp.int32)
  params = jax.eval_shape(Decoder(config, layout="scanned").init, jax.random.key(0), tokens)
  params = nn.unbox(params)["params"]

  def temporary(remat):
    lowered = gradient(Decoder(config, layout="scanned", remat=remat)).lower(params, tokens)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  none, dots, full = map(temporary, ("none", "dots", "full"))
  assert full < dots < none, (full, dots, none)
  assert full < 0.6 * none


def test_an_unknown_policy_is_named():
  model = Decoder(hybrid(), remat="ful")
  with pytest.raises(UserError, match=r"remat='ful' \(did you mean 'full'\?\) is no policy"):
    model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
