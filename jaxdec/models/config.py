# SPDX-License-Identifier: Apache-2.0
"""What a decoder is, as data: hashable frozen dataclasses.

A ``DecoderConfig`` holds one ``LayerConfig`` per layer, so hybrids and per-layer windows are data,
not code. Building one from a Hugging Face ``config.json`` is ``jaxdec.models.families``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxdec.errors import UserError
from jaxdec.mixers.attention import AttentionConfig
from jaxdec.mixers.gated_delta import GatedDeltaConfig
from jaxdec.mixers.linear_attention import LinearAttentionConfig
from jaxdec.mixers.norms import NormConfig

MixerConfig = AttentionConfig | LinearAttentionConfig | GatedDeltaConfig


@dataclasses.dataclass(frozen=True)
class MLPConfig:
  """Gated MLP: ``down(act(gate(x)) * up(x))``, hidden width F."""

  hidden_dim: int
  activation: Literal["silu", "gelu_tanh"] = "silu"
  use_bias: bool = False


@dataclasses.dataclass(frozen=True)
class BlockFFNConfig:
  """Experts chosen by a ReLU router (BlockFFN, arXiv 2507.08771); see ``jaxdec.models.block_ffn``.

  Attributes:
    num_experts: E. expert_dim: hidden width of each. eps: of the norm of the router's weights.
    union: decoding computes at most this many experts, gathered: those that any of the tokens at
      hand needs. Where more are needed all are computed, so the result never depends on it. None:
      always all.
  """

  num_experts: int
  expert_dim: int
  eps: float = 1e-6
  union: int | None = None

  def __post_init__(self):
    if min(self.num_experts, self.expert_dim) < 1 or not (
      self.union is None or 1 <= self.union <= self.num_experts
    ):
      raise UserError(
        f"a BlockFFN needs num_experts and expert_dim >= 1 and union in 1..{self.num_experts}, got "
        f"{self.num_experts}, {self.expert_dim} and {self.union}"
      )

  @property
  def hidden_dim(self) -> int:
    """Width of all experts together."""
    return self.num_experts * self.expert_dim


@dataclasses.dataclass(frozen=True)
class LayerConfig:
  """One block: norm, mixer, residual, norm, MLP, residual.

  ``post_norms`` adds a norm on each branch's output before its residual (Gemma 2 and 3).
  """

  mixer: MixerConfig
  mlp: MLPConfig | BlockFFNConfig
  post_norms: bool = False


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder-only language model.

  Attributes:
    vocab_size: V. dim: D.
    layers: one entry per layer.
    norm: the RMSNorm variant, the same everywhere (QK-norms included).
    tie_embeddings: the LM head is the embedding table.
    embed_scale: embeddings are multiplied by this (Gemma: sqrt(D)); None: no scaling.
    logit_cap: soft-cap ``cap * tanh(logits / cap)`` on the final logits; None: none.
    max_length: longest sequence the positions support; longer prompts are refused.
    eos_ids: token ids that end a sequence. bos_id: token put before every prompt, or None.
    family: Hugging Face ``model_type`` the checkpoint is written as.
  """

  vocab_size: int
  dim: int
  layers: tuple[LayerConfig, ...]
  norm: NormConfig = NormConfig()  # noqa: RUF009 (frozen)
  tie_embeddings: bool = False
  embed_scale: float | None = None
  logit_cap: float | None = None
  max_length: int = 2048
  eos_ids: tuple[int, ...] = ()
  bos_id: int | None = None
  family: str = "llama"

  @property
  def num_layers(self) -> int:
    return len(self.layers)


@dataclasses.dataclass(frozen=True)
class Capture:
  """Which states of the residual stream a caller wants back.

  Attributes:
    layers: the stream at the inputs of these layers (0-based; L: after the last layer).
    norm: ``pre`` the stream itself; ``post`` as that layer's mixer reads it, after its input norm
      (L: after the final norm, what the LM head reads).
  """

  layers: tuple[int, ...] = ()
  norm: Literal["pre", "post"] = "pre"

  def __post_init__(self):
    if self.norm not in ("pre", "post"):
      raise UserError(f"capture takes norm='pre' or 'post', got {self.norm!r}")

  @classmethod
  def of(cls, capture: Capture | tuple[int, ...]) -> Capture:
    """A plain tuple of layers means ``norm="pre"``."""
    return capture if isinstance(capture, Capture) else cls(tuple(capture))

  def __len__(self) -> int:
    return len(self.layers)


def tiny_llama(
  *,
  vocab_size: int = 4096,
  dim: int = 256,
  num_layers: int = 6,
  num_heads: int = 4,
  num_kv_heads: int = 2,
  head_dim: int = 64,
  hidden_dim: int = 768,
  max_length: int = 2048,
  tie_embeddings: bool = True,
  **kwargs,
) -> DecoderConfig:
  """A Llama-type decoder; the defaults are the embedded model's shape (5.8M parameters)."""
  layer = LayerConfig(
    AttentionConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim),
    MLPConfig(hidden_dim),
  )
  return DecoderConfig(
    vocab_size=vocab_size,
    dim=dim,
    layers=(layer,) * num_layers,
    max_length=max_length,
    tie_embeddings=tie_embeddings,
    **kwargs,
  )
