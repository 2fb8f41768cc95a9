# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a decoder, counted from its layers: what MFU is measured against.

Counted are matrix products, a multiply-add as two (PaLM, arXiv 2204.02311, appendix B): every
kernel once per token, the LM head, and what each mixer does between tokens. Embedding lookups,
norms, gates, softmax and rotations count nothing, nor does anything that is computed again in the
backward pass. The backward pass has two products for each one of the forward pass.

Between tokens, per head and token, H key and V value width, c(n) = mean over tokens of how many of
the last n a token sees, itself included (n/2 for long sequences and their causal half):

  softmax attention   2 c (H + V),                  c over the sequence, or the window
  linear attention    2 c (H + V) + 2 H V + 2 H V   c over a chunk; read S; write S (per kv head)
  delta rule          2 (2c - 1)(H + V) + 6 H V     as above, and inside a chunk the triangular
                                                    system (I + L) U = V - K S by substitution;
                                                    K S, Q S and K^T U with the state

(Chunks: GLA, arXiv 2312.06635, section 4; the delta rule's system: arXiv 2406.06484, section 3.)
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdec.mixers import AttentionConfig, GatedDeltaConfig, LinearAttentionConfig
from jaxdec.models.config import DecoderConfig
from jaxdec.models.decoder import Decoder

# What a chunk is counted as where a configuration leaves it to the platform.
CHUNK = 64
_MATRICES = ("kernel", "taps")  # the convolution's taps: w multiply-adds a channel


@dataclasses.dataclass(frozen=True)
class Flops:
  """Per token of a forward pass. ``matrices``: kernels and LM head; ``mixing``: between tokens."""

  matrices: float
  mixing: float

  @property
  def forward(self) -> float:
    return self.matrices + self.mixing

  @property
  def training(self) -> float:
    """Forward and backward pass."""
    return 3.0 * self.forward


def per_token(config: DecoderConfig, length: int) -> Flops:
  """FLOPs per token of sequences of ``length`` tokens, one document each.

  Raises:
    TypeError: a mixer that nobody has counted.
  """
  mixing = sum(between_tokens(layer.mixer, length) for layer in config.layers)
  return Flops(2.0 * _multiplied(config), mixing)


@functools.lru_cache(maxsize=64)
def _multiplied(config: DecoderConfig) -> int:
  """Parameters that each token is multiplied by."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
  leaves, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(shapes)["params"])
  total = sum(math.prod(x.shape) for path, x in leaves if path[-1].key in _MATRICES)
  return total + config.vocab_size * config.dim * config.tie_embeddings


def seen(length: int, most: int | None = None) -> float:
  """How many tokens one sees on average: itself and those before it, at most ``most`` in all."""
  most = min(length, most or length)
  return (most * (most + 1) / 2 + (length - most) * most) / length


def _seen_in_chunk(length: int, chunk: int | None) -> float:
  chunk = min(chunk or CHUNK, length)
  whole, rest = divmod(length, chunk)
  return (whole * chunk * seen(chunk) + (rest * seen(rest) if rest else 0.0)) / length


@functools.singledispatch
def between_tokens(mixer, length: int) -> float:
  """FLOPs per token of a mixer beyond its kernels; see the table above."""
  raise TypeError(f"no count of FLOPs for a {type(mixer).__name__}; register one in {__name__}")


@between_tokens.register
def _(mixer: AttentionConfig, length: int) -> float:
  return 4.0 * mixer.num_heads * mixer.head_dim * seen(length, mixer.window)


@between_tokens.register
def _(mixer: LinearAttentionConfig, length: int) -> float:
  h, v = mixer.head_dim, mixer.value_width + mixer.normalize  # a column of ones sums the keys
  inside = 2.0 * _seen_in_chunk(length, mixer.chunk_size) * (h + v)
  return mixer.num_heads * (inside + 2.0 * h * v) + mixer.kv_heads * 2.0 * h * v


@between_tokens.register
def _(mixer: GatedDeltaConfig, length: int) -> float:
  h, v = mixer.head_dim, mixer.value_width
  pairs = _seen_in_chunk(length, mixer.chunk_size)
  # Q K^T and its product with U reach the diagonal, K K^T and the system do not.
  return mixer.v_heads * (2.0 * (2.0 * pairs - 1.0) * (h + v) + 6.0 * h * v)
