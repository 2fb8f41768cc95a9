# SPDX-License-Identifier: Apache-2.0
"""Every mixer against the contract of ``jaxdec.mixers.base``; see ``jaxdec.mixers.testing``."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import pytest

from jaxdec.mixers import (
  AttentionConfig,
  GatedDeltaConfig,
  LinearAttentionConfig,
  NormConfig,
  RopeConfig,
  build_mixer,
)
from jaxdec.mixers.testing import CHECKS, Subject, check_extend_equals_call, check_gradients

DIM = 16
GEMMA_NORM = NormConfig(unit_offset=True)

MIXERS = {
  "attention": AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
  "attention_gqa": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope=None),
  "attention_window": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=3),
  "attention_everything": AttentionConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rope=RopeConfig(rotary_fraction=0.5),
    qk_norm=True,
    qkv_bias=True,
    out_bias=True,
    logit_cap=2.0,
    scale=0.5,
  ),
  "linear": LinearAttentionConfig(num_heads=2, head_dim=8, decay="none", chunk_size=4),
  "linear_normalized": LinearAttentionConfig(
    num_heads=2,
    head_dim=8,
    decay="none",
    feature_map="elu",
    normalize=True,
    output_norm=False,
    output_gate=False,
    chunk_size=4,
  ),
  "retention": LinearAttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    value_dim=10,
    decay="fixed",
    feature_map="identity",
    rope=RopeConfig(),
    chunk_size=2,
  ),
  "linear_data_decay": LinearAttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=6, chunk_size=4, scale=1.0
  ),
  "gla": LinearAttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    value_dim=10,
    decay="channel",
    gate_rank=3,
    gate_normalizer=1.0,
    feature_map="identity",
    chunk_size=4,
  ),
  "gated_delta": GatedDeltaConfig(
    num_heads=2, num_v_heads=4, head_dim=6, value_dim=10, chunk_size=8
  ),
  "delta": GatedDeltaConfig(
    num_heads=2, head_dim=8, gate="none", output_gate=None, negative_eigenvalues=True, conv_width=3
  ),
  "kimi_delta": GatedDeltaConfig(
    num_heads=2, head_dim=6, gate="channel", gate_rank=3, output_gate="sigmoid", conv_width=1
  ),
}
# Where the op forms the gradient of a decay from sums over all later tokens, which cancel.
LEAKS = dict.fromkeys(("gla", "gated_delta", "kimi_delta"), 1e-7)
NORMS = {"attention_everything": GEMMA_NORM, "linear_data_decay": GEMMA_NORM}


@functools.cache
def subject(name: str, dtype=jnp.float32) -> Subject:
  mixer = build_mixer(MIXERS[name], DIM, NORMS.get(name, NormConfig()), dtype)
  tolerance = 2e-5 if dtype == jnp.float32 else 3e-2
  return Subject.of_mixer(mixer, DIM, tolerance=tolerance, leak=LEAKS.get(name, 0.0))


# Gradients are the dearest check, and each of these is a special case of another mixer here.
NO_GRADIENTS = {"attention", "attention_gqa", "linear", "delta"}
CASES = [
  (name, check)
  for name in MIXERS
  for check in CHECKS
  if check is not check_gradients or name not in NO_GRADIENTS
]


@pytest.mark.parametrize(
  "name, check", CASES, ids=[f"{n}-{c.__name__.removeprefix('check_')}" for n, c in CASES]
)
def test_contract(name, check):
  check(subject(name))


@pytest.mark.parametrize(
  "name", ["attention", "linear_data_decay", pytest.param("gated_delta", marks=pytest.mark.slow)]
)
def test_bfloat16(name):
  check_extend_equals_call(subject(name, jnp.bfloat16))
