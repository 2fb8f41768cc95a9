# SPDX-License-Identifier: Apache-2.0
"""The supported Hugging Face families, as data: what a field's absence means, what is fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """How one ``model_type`` differs from a Llama.

  Attributes:
    architecture: class name written to ``architectures``.
    defaults: values of fields absent from ``config.json`` (the defaults of the family's
      configuration class in transformers); also the list of the family's own fields.
    qkv_bias, out_bias: fixed, or None: the field ``attention_bias`` says.
    gemma: unit-offset norms, scaled embeddings, norms on the branch outputs.
    fused: query/key/value and gate/up are stored as one tensor each.
    rope_kinds: the scalings the family's code in transformers honours.
  """

  architecture: str
  defaults: Mapping[str, Any]
  qkv_bias: bool | None = False
  out_bias: bool | None = False
  qk_norm: bool = False
  gemma: bool = False
  fused: bool = False
  rope_kinds: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


_SHARED = dict(
  num_key_value_heads=None,
  head_dim=None,
  hidden_act="silu",
  rms_norm_eps=1e-6,
  bos_token_id=None,
  eos_token_id=None,
  tie_word_embeddings=False,
  rope_theta=10_000.0,
  rope_scaling=None,
  rope_parameters=None,
)
_QWEN = dict(
  _SHARED,
  max_position_embeddings=32_768,
  num_key_value_heads=32,
  use_sliding_window=False,
  sliding_window=4096,
  max_window_layers=28,
  layer_types=None,
)
_GEMMA = dict(
  _SHARED,
  num_key_value_heads=4,
  head_dim=256,
  hidden_act=None,
  hidden_activation="gelu_pytorch_tanh",
  bos_token_id=2,
  eos_token_id=1,
  tie_word_embeddings=True,
  attention_bias=False,
  query_pre_attn_scalar=256,
  sliding_window=4096,
  layer_types=None,
)

FAMILIES: dict[str, Family] = {
  "llama": Family(
    "LlamaForCausalLM",
    dict(
      _SHARED,
      max_position_embeddings=2048,
      bos_token_id=1,
      eos_token_id=2,
      attention_bias=False,
      mlp_bias=False,
    ),
    qkv_bias=None,
    out_bias=None,
  ),
  "mistral": Family(
    "MistralForCausalLM",
    dict(
      _SHARED,
      max_position_embeddings=131_072,
      num_key_value_heads=8,
      bos_token_id=1,
      eos_token_id=2,
      sliding_window=4096,
    ),
  ),
  "qwen2": Family("Qwen2ForCausalLM", _QWEN, qkv_bias=True),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    dict(_QWEN, head_dim=128, attention_bias=False),
    qkv_bias=None,
    out_bias=None,
    qk_norm=True,
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    dict(
      _GEMMA,
      max_position_embeddings=8192,
      sliding_window_size=None,
      final_logit_softcapping=30.0,
      attn_logit_softcapping=50.0,
    ),
    qkv_bias=None,
    out_bias=None,
    gemma=True,
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    dict(
      _GEMMA,
      max_position_embeddings=131_072,
      rope_theta=1_000_000.0,
      rope_local_base_freq=10_000.0,
      sliding_window_pattern=6,
      _sliding_window_pattern=None,
      final_logit_softcapping=None,
      attn_logit_softcapping=None,
    ),
    qkv_bias=None,
    out_bias=None,
    qk_norm=True,
    gemma=True,
  ),
  "phi3": Family(
    "Phi3ForCausalLM",
    dict(
      _SHARED,
      max_position_embeddings=4096,
      rms_norm_eps=1e-5,
      bos_token_id=1,
      eos_token_id=32_000,
      sliding_window=None,
      original_max_position_embeddings=None,
      partial_rotary_factor=None,
    ),
    fused=True,
    rope_kinds=("default",),
  ),
  "smollm3": Family(
    "SmolLM3ForCausalLM",
    dict(
      _SHARED,
      max_position_embeddings=32_768,
      num_key_value_heads=4,
      bos_token_id=128_000,
      eos_token_id=128_001,
      tie_word_embeddings=True,
      rope_theta=2_000_000.0,
      attention_bias=False,
      mlp_bias=False,
      use_sliding_window=False,
      sliding_window=None,
      layer_types=None,
      no_rope_layers=None,
      no_rope_layer_interval=4,
    ),
    qkv_bias=None,
    out_bias=None,
  ),
}
