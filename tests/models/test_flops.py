# SPDX-License-Identifier: Apache-2.0
"""Counted FLOPs: against XLA's own count, against sums by hand, against the chips' data sheets."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.mixers import AttentionConfig, GatedDeltaConfig, LinearAttentionConfig
from jaxdec.models import Decoder, DecoderConfig, LayerConfig, MLPConfig, flops, tiny_llama
from pallas_kernels.testing import COMPILE_ONCE

LENGTH = 64
# Mixer, and by how much XLA may count more: elementwise work, and for the delta rule an inverse
# where substitution is counted.
CASES = {
  "attention": (AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=128), 0.02),
  "linear": (LinearAttentionConfig(num_heads=4, head_dim=128), 0.03),
  "delta": (GatedDeltaConfig(num_heads=4, head_dim=128), 0.13),
}


def model(mixer, **kwargs):
  layer = LayerConfig(mixer, MLPConfig(64))
  return DecoderConfig(vocab_size=64, dim=64, layers=(layer,), **kwargs)


def lowered(config, gradient=False):
  decoder = Decoder(config)
  tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
  params = nn.unbox(jax.eval_shape(decoder.init, jax.random.key(0), tokens))

  def forward(params, tokens):
    return decoder.apply(params, tokens).logits

  def backward(params, tokens):
    return jax.grad(lambda p: jnp.sum(jnp.square(forward(p, tokens))))(params)

  return jax.jit(backward if gradient else forward).lower(params, tokens)


@pytest.mark.parametrize("name", CASES)
def test_forward_is_what_xla_counts(name, monkeypatch):
  # On short sequences the portable ops compute the hidden half too.
  monkeypatch.setattr(flops, "seen", lambda length, most=None: float(min(length, most or length)))
  mixer, more = CASES[name]
  counted = flops.per_token(model(mixer), LENGTH)
  xla = lowered(model(mixer)).cost_analysis()["flops"] / (2 * LENGTH)
  assert 1.0 <= xla / counted.forward <= 1.0 + more
  assert counted.mixing > 0.3 * counted.forward  # a third less would not pass


def test_training_is_what_xla_counts_of_the_compiled_gradient(monkeypatch):
  monkeypatch.setattr(flops, "seen", lambda length, most=None: float(min(length, most or length)))
  mixer, _ = CASES["attention"]
  compiled = lowered(model(mixer), gradient=True).compile(COMPILE_ONCE)
  xla = compiled.cost_analysis()["flops"] / (2 * LENGTH)
  assert 1.0 <= xla / flops.per_token(model(mixer), LENGTH).training <= 1.02


def test_llama_by_hand():
  c = tiny_llama()  # tied: the table is the head, and its lookup counts nothing
  matrices = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768) + 4096 * 256
  found = flops.per_token(c, 1000)
  assert found.matrices == 2 * matrices
  assert found.mixing == 6 * 4 * 4 * 64 * 500.5
  assert found.training == 3 * (found.matrices + found.mixing)


def test_an_untied_table_is_only_looked_up():
  mixer, _ = CASES["attention"]
  tied, untied = (flops.per_token(model(mixer, tie_embeddings=t), 8) for t in (True, False))
  assert tied == untied


@pytest.mark.parametrize(("length", "most"), [(7, None), (7, 3), (7, 9), (1, 1), (8, 8)])
def test_mean_of_what_is_seen(length, most):
  assert flops.seen(length, most) == np.mean([min(i + 1, most or length) for i in range(length)])


def test_linear_layers_cost_the_same_at_any_length():
  for name in ("linear", "delta"):
    mixer, _ = CASES[name]
    short, long = (flops.between_tokens(mixer, length) for length in (64, 64 * 1024))
    assert short == long
  chunked = LinearAttentionConfig(num_heads=1, head_dim=2, chunk_size=4)
  # Six tokens are a chunk of 4 and one of 2: 10 + 3 pairs.
  assert flops.between_tokens(chunked, 6) == pytest.approx(2 * 13 / 6 * 4 + 2 * 4 + 2 * 4)


def test_a_mixer_nobody_counted_is_named():
  with pytest.raises(TypeError, match="no count of FLOPs for a str"):
    flops.between_tokens("mixer", 8)
