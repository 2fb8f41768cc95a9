# SPDX-License-Identifier: Apache-2.0
"""States handed out before or after the norm, in both layouts; embeddings in place of tokens."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.mixers.base import Topology
from jaxdec.mixers.norms import rms_norm
from jaxdec.models import Capture, Decoder, stack_layers, tiny_llama

CONFIG = tiny_llama(
  vocab_size=17, dim=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24
)


@pytest.fixture(scope="module")
def both():
  """``(model, params)`` unrolled and scanned, norm scales away from 1."""
  model = Decoder(CONFIG)
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"])
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(str(path))), x.shape), params
  )
  return (model, params), (Decoder(CONFIG, layout="scanned"), stack_layers(params, CONFIG))


def test_post_norm_is_what_the_mixer_reads(both):
  (model, params), scanned = both
  tokens = jnp.arange(10).reshape(2, 5)
  layers = (0, 1, 3, 4)
  pre = model.apply({"params": params}, tokens, capture=layers)
  scales = [params[f"layers_{i}"]["mixer_norm"]["scale"] for i in (0, 1, 3)]
  scales.append(params["final_norm"]["scale"])
  expected = [rms_norm(x, scale, CONFIG.norm) for x, scale in zip(pre.features, scales)]
  for which, weights in ((model, params), scanned):
    out = which.apply({"params": weights}, tokens, capture=Capture(layers, norm="post"))
    for got, wanted in zip(out.features, expected, strict=True):
      np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_array_equal(out.features[-1], out.hidden)
    plain = which.apply({"params": weights}, tokens, capture=Capture(layers))
    for got, wanted in zip(plain.features, pre.features, strict=True):
      np.testing.assert_allclose(got, wanted, atol=1e-5)
  assert all(np.abs(a - b).max() > 0.1 for a, b in zip(pre.features, expected))


def test_embeddings_stand_for_tokens(both):
  """The embedding of token b in place of token a is token b; elsewhere nothing changes."""
  (model, params), (scanned, stacked) = both
  tokens = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
  other = tokens.at[0, 2].set(7).at[1, 0].set(8)
  where = other != tokens
  values = jnp.take(params["embed"], other, axis=0) + ~where[..., None] * 1e3
  given = dict(embeddings=(values, where))
  for which, weights in ((model, params), (scanned, stacked)):
    whole = which.apply({"params": weights}, other)
    replaced = which.apply({"params": weights}, tokens, **given)
    np.testing.assert_allclose(replaced.logits, whole.logits, atol=1e-6)
  state, positions = model.init_state(2, 8), jnp.broadcast_to(jnp.arange(4), (2, 4))
  out = model.apply({"params": params}, tokens, state, positions, method="extend", **given)
  whole = model.apply({"params": params}, other)
  np.testing.assert_allclose(out.logits, whole.logits, atol=1e-5)
  chain = Topology(positions, jnp.broadcast_to(jnp.tril(jnp.ones((4, 4), bool)), (2, 4, 4)))
  out = model.apply({"params": params}, tokens, state, chain, method="verify", **given)
  np.testing.assert_allclose(out.logits, whole.logits, atol=1e-5)


def test_an_unknown_norm_is_named():
  with pytest.raises(UserError, match="'pre' or 'post', got 'none'"):
    Capture((1,), norm="none")
