# SPDX-License-Identifier: Apache-2.0
"""FLASH ("Latent-Aware Semi-Autoregressive Speculative Decoding"): k features from one pass.

  u_t = W_fc [E[x_{t+1}] ; f_t] + b,   or one of m vectors made of the image's states
  y = u + Attn(u)
  [f^_{t+1} ; ... ; f^_{t+k}] = W_2 SiLU(W_1 y_t)          W_1 [4D, D], W_2 [kD, 4D]

Draft j at slot t is the target's LM head on ``f^_{t+j}``, and learns from ``f_{t+j}`` and the
target's law there: labels move with j. The loss of each is EAGLE's. The image's n states are
compressed by learned queries (``jaxdec.drafting.prefix.Latents``).

The published code has no residual around the attention; without one a slot would see its own token
only through attention, so ours has. It has no norms either, and none are here.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdec.drafting.prefix import Latents
from jaxdec.drafting.prefix_drafter import PrefixDrafter, text
from jaxdec.drafting.trained import TrainedDrafter
from jaxdec.errors import UserError
from jaxdec.mixers import Attention, AttentionConfig, NormConfig
from jaxdec.mixers.norms import Dense

EXPANSION = 4  # width of the head's inner layer, in D


class FlashLayers(nn.Module):
  """One attention layer, the head of k features, and the compressor."""

  attention: AttentionConfig
  dim: int
  norm: NormConfig
  dtype: jnp.dtype
  num_features: int
  num_latents: int
  fuse_bias: bool

  def setup(self):
    self.fc = Dense(self.dim, (None, "embed"), self.fuse_bias, self.dtype)
    self.mixer = Attention(self.attention, self.dim, self.norm, self.dtype)
    self.up = Dense(EXPANSION * self.dim, ("embed", "mlp"), dtype=self.dtype)
    self.down = Dense(self.num_features * self.dim, ("mlp", None), dtype=self.dtype)
    self.latents = Latents(self.num_latents)

  def fuse(self, features, fed):
    d = self.dim
    fused = self.fc(jnp.concatenate([fed[..., :d], features], axis=-1))
    return jnp.where(fed[..., 3 * d :] > 0, fed[..., 2 * d : 3 * d], fused)

  def _features(self, y):
    return self.down(jax.nn.silu(self.up(y)))

  def rollout(self, features, fed, positions, segment_ids):
    """Features ``[B,T,kD]`` of every slot; the last one has no token: garbage."""
    u = self.fuse(features, jnp.pad(fed[:, 1:], ((0, 0), (0, 1), (0, 0))))
    return self._features(u + self.mixer(u, positions, segment_ids))

  def read(self, features, fed, caches, positions):
    """The same of slots that continue the cache (position -1: padding)."""
    u = self.fuse(features, fed)
    mixed, cache = self.mixer.extend(u, caches[0], positions)
    return self._features(u + mixed), (cache,)

  def compress(self, x, count, question, rng=None):
    return self.latents(x, count), jnp.zeros_like(x[:, 0])

  def feature(self, x):
    return x

  def readout(self, x):
    return x

  def __call__(self, features, embedded, positions, segment_ids):
    """Touches every parameter (for ``init``)."""
    count = jnp.full(features.shape[:1], features.shape[1], jnp.int32)
    self.compress(features, count, None)
    return self.rollout(features, text(embedded), positions, segment_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flash(PrefixDrafter):
  """FLASH.

  Attributes:
    num_heads: k, the drafts of one pass.
    num_latents: m, vectors an image becomes.
  """

  name: ClassVar[str] = "flash"

  num_latents: int = 64

  def __post_init__(self):
    super().__post_init__()
    if self.num_layers != 1 or self.rollouts != 1:
      raise UserError("FLASH has one layer and no rollouts; leave num_layers and rollouts at 1")
    if self.num_latents < 1:
      raise UserError(f"num_latents must be at least 1, got {self.num_latents}")

  @property
  def depth_limit(self) -> int:
    return self.num_heads

  @property
  def network(self) -> FlashLayers:
    return FlashLayers(
      self.attention, self.dim, NormConfig(self.eps), jnp.dtype(self.dtype), self.num_heads,
      self.num_latents, self.fuse_bias,
    )  # fmt: skip

  def _source(self, prefix, features):
    """The target's states at the image."""
    index = prefix.start[:, None] + jnp.arange(prefix.values.shape[1])
    index = jnp.clip(index, 0, features.shape[1] - 1)
    return jnp.take_along_axis(features, index[..., None], axis=1)

  def teacher_forced(self, params, target, output, batch, rng=None):
    features, fed, segments = self._inputs(params, target, output, batch, rng)
    out = self._apply(params, features, fed, batch["positions"], segments, method="rollout")
    out = out.reshape(*out.shape[:2], self.num_heads, self.dim)
    return [out[:, : -1 - k, k - 1] for k in range(1, self.num_heads + 1)]

  def _total(self, values, weights, depths):
    return TrainedDrafter._total(self, values, weights, depths)

  def init_state(self, batch: int, capacity: int):
    width = self.num_heads * self.dim
    return super().init_state(batch, capacity).replace(last=jnp.zeros((batch, width), self.dtype))

  def first(self, params, state, context):
    states = state.last.reshape(-1, self.num_heads, self.dim)[:, : self.max_depth]
    logits = self.head(params, context.target, 1, states)  # one product for all depths
    return logits[:, 0], logits

  def step(self, params, state, context):
    # The guesses of a slot don't depend on the path.
    return lambda logits, level, tokens, parents: (logits[:, level, None], logits)
