# SPDX-License-Identifier: Apache-2.0
"""A decoder that alternates linear and softmax attention satisfies the same contract as a mixer."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxdec.mixers import AttentionConfig, LinearAttentionConfig
from jaxdec.mixers.testing import CHECKS, Subject, assert_close, randomize
from jaxdec.models import (
  Decoder,
  DecoderConfig,
  LayerConfig,
  MLPConfig,
  stack_layers,
  unstack_layers,
)

VOCAB, DIM = 19, 16
LINEAR = LayerConfig(LinearAttentionConfig(num_heads=2, head_dim=8, chunk_size=4), MLPConfig(24))
SOFTMAX = LayerConfig(
  AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=6), MLPConfig(24)
)
CONFIG = DecoderConfig(vocab_size=VOCAB, dim=DIM, layers=(LINEAR, SOFTMAX) * 2)


def tokens(key, batch, length):
  return jax.random.randint(key, (batch, length), 0, VOCAB)


@functools.cache
def hybrid() -> Subject:
  model = Decoder(CONFIG)
  params = nn.unbox(model.init(jax.random.key(0), tokens(jax.random.key(1), 1, 2)))

  def extend(params, x, state, positions):
    out = model.apply(params, x, state, positions, method="extend")
    return out.logits, out.state

  def verify(params, x, state, topology):
    out = model.apply(params, x, state, topology, method="verify")
    return out.logits, out.pending

  return Subject(
    params=randomize(params, 0),
    call=jax.jit(lambda params, *args: model.apply(params, *args).logits),
    init_state=model.init_state,
    extend=jax.jit(extend),
    verify=jax.jit(verify),
    commit=jax.jit(lambda params, *args: model.apply(params, *args, method="commit")),
    inputs=tokens,
    tolerance=5e-5,
  )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(check):
  check(hybrid())


def test_scanned_layout_gives_the_same_logits():
  params = hybrid().params["params"]
  x = tokens(jax.random.key(2), 2, 11)
  scanned = Decoder(CONFIG, layout="scanned")
  stacked = stack_layers(params, CONFIG)
  assert set(stacked["stack"]) == {"block_0", "block_1"}
  expected = Decoder(CONFIG).apply({"params": params}, x)
  assert_close(scanned.apply({"params": stacked}, x).logits, expected.logits, 2e-5, "scanned")
  restored = unstack_layers(stacked, CONFIG)
  assert jax.tree.structure(restored) == jax.tree.structure(params)
  assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, restored, params)))


def test_only_softmax_layers_grow_with_capacity():
  small, large = (Decoder(CONFIG).init_state(2, capacity) for capacity in (8, 64))
  for layer, growth in enumerate((1, 8, 1, 8)):
    sizes = [max(x.size for x in jax.tree.leaves(s.layers[layer])) for s in (small, large)]
    assert sizes[1] == growth * sizes[0]
