# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of every family, each with its family's peculiar features on.

Weights come from a recipe (seed and tensor name), so that recorded outputs need no weights beside
them; dimensions are odd where the architecture allows it.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).parents[1] / "data" / "parity"
BATCH, LENGTH, NEW_TOKENS = 2, 23, 64
VOCAB = 97

_TINY = dict(
  vocab_size=VOCAB, hidden_size=60, intermediate_size=71, num_hidden_layers=2,
  num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=None,
  bos_token_id=1, eos_token_id=None)  # fmt: skip

# name -> (transformers configuration class, its arguments)
CASES: dict[str, tuple[str, dict]] = {
  "llama3_biases": ("LlamaConfig", dict(
    _TINY, attention_bias=True, mlp_bias=True,
    rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
                         high_freq_factor=4.0, original_max_position_embeddings=32))),
  "llama_tied_linear": ("LlamaConfig", dict(
    _TINY, tie_word_embeddings=True, num_key_value_heads=3,
    rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0))),
  "llama_dynamic": ("LlamaConfig", dict(
    _TINY, head_dim=14, num_key_value_heads=6,
    rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
  "llama_yarn": ("LlamaConfig", dict(
    _TINY, head_dim=16,
    rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, beta_fast=2.0,
                         original_max_position_embeddings=32, truncate=False))),
  "llama_yarn_mscale": ("LlamaConfig", dict(
    _TINY, head_dim=12, num_key_value_heads=1,
    rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, mscale=0.7,
                         mscale_all_dim=1.3, original_max_position_embeddings=32))),
  "mistral_window": ("MistralConfig", dict(_TINY, sliding_window=5, head_dim=22)),
  "qwen2_window": ("Qwen2Config", dict(
    _TINY, tie_word_embeddings=True, use_sliding_window=True, sliding_window=7,
    max_window_layers=1)),
  "qwen3_yarn": ("Qwen3Config", dict(
    _TINY, head_dim=18,
    rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=4.0,
                         original_max_position_embeddings=32))),
  "gemma2": ("Gemma2Config", dict(
    _TINY, head_dim=14, query_pre_attn_scalar=19, sliding_window=6, attn_logit_softcapping=1.5,
    final_logit_softcapping=4.0)),
  "gemma3": ("Gemma3TextConfig", dict(
    _TINY, num_hidden_layers=3, head_dim=14, query_pre_attn_scalar=19, sliding_window=6,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters=dict(
      full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
      sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
  "phi3_partial": ("Phi3Config", dict(
    _TINY, hidden_size=72, partial_rotary_factor=0.5, sliding_window=9)),
  "smollm3_nope": ("SmolLM3Config", dict(_TINY, num_hidden_layers=3, no_rope_layer_interval=2)),
}  # fmt: skip


def weights(
  name: str, shape: tuple[int, ...], *, seed: int, unit_offset: bool, tied: bool
) -> np.ndarray:
  """The recipe: uniform noise keyed by seed and tensor name, scaled to keep activations near 1."""
  rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
  noise = 2.0 * rng.random(shape) - 1.0
  if name.endswith("norm.weight"):
    array = 0.5 * noise + 1.0
    if tied and name == "model.norm.weight":
      array = 4.0 * array  # small embeddings need it for logits that differ
    array = array - 1.0 if unit_offset else array
  elif name.endswith("bias"):
    array = 0.3 * noise
  elif "embed_tokens" in name:
    # Tied: small, so that a token doesn't predict itself for ever.
    array = (0.05 if unit_offset else 0.2 if tied else 1.7) * noise
  else:
    array = noise * math.sqrt(3.0 / shape[-1])
  return array.astype(np.float32)


def checkpoint(
  shapes: dict[str, tuple[int, ...]], *, seed: int, gemma: bool
) -> dict[str, np.ndarray]:
  """All tensors of a checkpoint; a tied head is the embedding table."""
  tied = "lm_head.weight" not in shapes
  return {
    n: weights(n, tuple(s), seed=seed, unit_offset=gemma, tied=tied) for n, s in shapes.items()
  }


def checksum(tensors: dict[str, np.ndarray]) -> int:
  """To tell a changed recipe from a changed model."""
  total = 0
  for name in sorted(tensors):
    total = zlib.crc32(tensors[name].tobytes(), total)
  return total


def prompts(seed: int) -> np.ndarray:
  """Token ids [B, T]; the model never sees a special meaning in them."""
  rng = np.random.Generator(np.random.PCG64([seed, 7]))
  return (rng.random((BATCH, LENGTH)) * VOCAB).astype(np.int32)
