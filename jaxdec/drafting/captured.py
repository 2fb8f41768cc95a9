# SPDX-License-Identifier: Apache-2.0
"""What EAGLE-3 and P-EAGLE share: they read several of the target's layers at once, fused by one
matrix, beside the embedding of the next token, and have an LM head of their own."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdec.drafting.base import Params, Target
from jaxdec.drafting.eagle import FeatureState, SlotReader
from jaxdec.drafting.hydra import draft_attention
from jaxdec.drafting.trained import TrainedDrafter, lm_head_kernel, soft_cap
from jaxdec.errors import UserError
from jaxdec.mixers import AttentionConfig, NormConfig
from jaxdec.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapturedDrafter(SlotReader, TrainedDrafter):
  """Base of drafters that read captured layers; a subclass gives ``network`` and ``passes``.

  Attributes:
    capture_layers: the layer inputs read (0-based; L: the stream before the final norm).
    attention, hidden_dim, eps: shape of its layers.
    head_init: what its LM head starts as: ``random``, as published, or the ``target``'s own, which
      saves the many steps that a head learned from nothing takes.
  """

  needs_prompt_hidden: ClassVar[bool] = True

  capture_layers: tuple[int, ...]
  attention: AttentionConfig
  hidden_dim: int
  eps: float = 1e-6
  head_init: Literal["random", "target"] = "random"

  def __post_init__(self):
    if self.head_init not in ("random", "target"):
      raise UserError(f"head_init of {self.name} is random or target, got {self.head_init!r}")
    super().__post_init__()

  @classmethod
  def for_target(cls, config: DecoderConfig, **options) -> CapturedDrafter:
    options.setdefault("capture_layers", default_capture(config.num_layers))
    options.setdefault("attention", draft_attention(config))
    options.setdefault("hidden_dim", config.layers[0].mlp.hidden_dim)
    options.setdefault("eps", config.norm.eps)
    return super().for_target(config, **options)

  @property
  def capture(self) -> tuple[int, ...]:
    return self.capture_layers

  @property
  def network(self) -> nn.Module:
    """The parameters, with methods ``logits`` and ``read``; ``_shape`` are some of its fields."""
    raise NotImplementedError

  @property
  def num_caches(self) -> int:
    """Layers that attend."""
    return 1

  @property
  def passes(self) -> float:
    """How often training runs the layers and the LM head, for each token."""
    raise NotImplementedError

  def multiplied(self, params):
    once = super().multiplied(params["fuse"])
    return once + self.passes * (super().multiplied(params) - once)

  @property
  def _shape(self) -> dict[str, Any]:
    return dict(
      attention_config=self.attention,
      hidden_dim=self.hidden_dim,
      dim=self.dim,
      draft_vocab=self.draft_size,
      norm=NormConfig(self.eps),
      dtype=jnp.dtype(self.dtype),
      captured=len(self.capture),
    )

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    features = jnp.zeros((1, 2, len(self.capture) * self.dim), self.dtype)
    zeros = jnp.zeros((1, 2), jnp.int32)
    params = self.network.init(rng, features, features[..., : self.dim], zeros, zeros)["params"]
    if self.head_init == "random":
      return params
    kernel = lm_head_kernel(target)
    if self.vocabulary is not None:
      kernel = kernel[:, self.vocabulary.ids]
    head = {"kernel": params["lm_head"]["kernel"].replace_boxed(kernel)}
    return {**params, "lm_head": head}

  def head(self, params, target, depth, states):
    return soft_cap(self._apply(params, states, method="logits"), self.logit_cap)

  def _apply(self, params, *args, method):
    return self.network.apply({"params": params}, *args, method=method)

  def _features(self, output):
    return jnp.concatenate(output.features, axis=-1).astype(self.dtype)

  def init_state(self, batch: int, capacity: int) -> FeatureState:
    last = jnp.zeros((batch, self.dim), self.dtype)
    return FeatureState(last, self._caches(batch, capacity, self.num_caches))


def default_capture(num_layers: int) -> tuple[int, int, int]:
  """Inputs of layers 2, L//2 and L-3 (the paper's choice); spread evenly where L < 8."""
  if num_layers >= 8:
    return 2, num_layers // 2, num_layers - 3
  return min(1, num_layers), num_layers // 2, max(num_layers - 1, 1)
