# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 (arXiv 2503.01840): one decoder layer that continues the target's features on its own.

At slot t, with low, middle and high features of the target at t and the token that follows:

  g = W_fc [f_low ; f_mid ; f_high]
  c = [RMS(E[x_{t+1}]) ; RMS(g)]                       read by q, k, v
  g' = g + Attn(c);   g'' = g' + MLP(RMS(g'))
  draft logits = W RMS(g'')                            for x_{t+2}; W is trained from scratch

The next draft feeds ``g''`` (before the norm) in place of ``g`` with the drafted token. Training
rolls this out ("training-time test"): step j = 0..K-1 at every slot reads ``x_{t+1+j}`` and step
j-1's ``g''``, at position t + j, and attends to the step-0 keys up to t and to its own slot's keys
of steps 1..j: what a draft sees at inference. Gradients flow through the whole rollout.

Drafted keys never enter the cache: after verification the accepted slots are read again with true
features.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdec.drafting.base import Context
from jaxdec.drafting.captured import CapturedDrafter
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.drafting.objectives import Objective
from jaxdec.drafting.rollout import rollout_attention
from jaxdec.drafting.trained import embed
from jaxdec.mixers import Attention, AttentionConfig, NormConfig
from jaxdec.mixers.attention import heads_first
from jaxdec.mixers.norms import Dense, RMSNorm
from jaxdec.models.config import MLPConfig
from jaxdec.models.decoder import MLP


class EagleLayer(nn.Module):
  """Parameters and the three ways through the layer: rollout, cached reading, drafting."""

  attention_config: AttentionConfig
  dim: int
  hidden_dim: int
  draft_vocab: int
  norm: NormConfig
  dtype: jnp.dtype
  captured: int = 3
  fc_norm: bool = False
  norm_output: bool = False
  norm_before_residual: bool = False

  def setup(self):
    self.fuse = Dense(self.dim, (None, "embed"), dtype=self.dtype)
    if self.fc_norm:
      self.fc_norms = [RMSNorm(self.norm) for _ in range(self.captured)]
    self.embed_norm, self.state_norm, self.mlp_norm, self.out_norm = (
      RMSNorm(self.norm) for _ in range(4)
    )
    self.attention = Attention(self.attention_config, self.dim, self.norm, self.dtype)
    self.mlp = MLP(MLPConfig(self.hidden_dim), self.dim, self.dtype)
    self.lm_head = Dense(self.draft_vocab, ("embed", "vocab"), dtype=self.dtype)

  def _fused(self, features):
    if self.fc_norm:
      parts = jnp.split(features, self.captured, axis=-1)
      features = jnp.concatenate([norm(x) for norm, x in zip(self.fc_norms, parts)], axis=-1)
    return self.fuse(features)

  def _fed(self, g):
    """What the next step reads of ``g''``."""
    return self.out_norm(g) if self.norm_output else g

  def _input(self, embedded, g):
    return jnp.concatenate([self.embed_norm(embedded), self.state_norm(g)], axis=-1)

  def _finish(self, g, attended):
    g = (self.state_norm(g) if self.norm_before_residual else g) + attended
    return g + self.mlp(self.mlp_norm(g))

  def logits(self, g: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Draft logits of states ``g''``, float32."""
    return self.lm_head(self.out_norm(g)).astype(jnp.float32)

  def rollout(
    self,
    features: Float[Array, "B T 3D"],
    embedded: Float[Array, "B T D"],
    positions,
    segment_ids,
    steps: int,
  ) -> list[Float[Array, "B T D"]]:
    """``g''`` of every slot at every step; the last slots of step j have no token: garbage."""
    c, t = self.attention_config, features.shape[1]
    # Kept of a step: what its matrix products gave. All between them is computed again.
    again = functools.partial(
      nn.remat, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    )
    project = again(lambda layer, x, g, at: layer.attention._project(layer._input(x, g), at))
    finish = again(lambda layer, g, out: layer._finish(g, layer.attention._output(out, g)))
    g, states, own = self._fused(features), [], []
    for j in range(steps):
      shifted = jnp.pad(embedded[:, 1 + j :], ((0, 0), (0, min(1 + j, t)), (0, 0)))
      q, k, v = project(self, shifted, g, positions + j)
      if j == 0:
        context = k, v
      else:
        own.append((k, v))
      g = finish(self, g, rollout_attention(q, [context, *own], segment_ids, c))
      states.append(g)
      g = self._fed(g)
    return states

  def read(self, features, embedded, caches, positions):
    """Reads slots with true features into the one cache (position -1: padding)."""
    g, (cache,) = self._fused(features), caches
    attended, cache = self.attention.extend(self._input(embedded, g), cache, positions)
    return self._finish(g, attended), (cache,)

  def draft(self, g, embedded, positions, state, keys, values, ancestors):
    """Feeds ``n`` drafted nodes after the ``m`` fed before (``keys``, ``values [B,K,m,H]``).

    ``ancestors [B,n,m+n]``: which drafted nodes each sees, itself included.
    """
    g = self._fed(g)
    x = self._input(embedded, g)
    q, k, v = self.attention._project(x, positions)
    keys = jnp.concatenate([keys, heads_first(k).astype(keys.dtype)], axis=2)
    values = jnp.concatenate([values, heads_first(v).astype(values.dtype)], axis=2)
    out = self.attention._attend_state(q, keys, values, state, positions, ancestors)
    return self._finish(g, self.attention._output(out, x)), keys, values

  def __call__(self, features, embedded, positions, segment_ids):
    """Touches every parameter (for ``init``)."""
    return self.logits(self.rollout(features, embedded, positions, segment_ids, 1)[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3(CapturedDrafter):
  """EAGLE-3.

  Attributes:
    capture_layers, attention, hidden_dim, eps: see ``CapturedDrafter``; three layers are read.
    num_heads: K, steps of the training rollout; at inference any depth works.
    fc_norm, norm_output: the two changes of EAGLE-3.1: an RMSNorm on each captured state before
      ``W_fc``, and the next step fed ``RMS(g'')``, what the LM head reads, in place of ``g''``.
    norm_before_residual: the residual stream is ``RMS(g)``, not ``g`` (heads trained with the
      speculators library).
  """

  name: ClassVar[str] = "eagle3"
  sequential: ClassVar[bool] = True

  fc_norm: bool = False
  norm_output: bool = False
  norm_before_residual: bool = False
  num_heads: int = 5
  objective: Objective = "soft"
  depth_decay: float = 0.8

  @property
  def depth_limit(self) -> int:
    return 1 << 10  # recurrent: no trained limit

  @property
  def passes(self) -> float:
    return self.num_heads

  @property
  def network(self) -> EagleLayer:
    norms = {name: getattr(self, name) for name in ("fc_norm", "norm_output")}
    return EagleLayer(**self._shape, **norms, norm_before_residual=self.norm_before_residual)

  def teacher_forced(self, params, target, output, batch, rng=None):
    features = jax.lax.stop_gradient(self._features(output))
    tokens = jax.lax.stop_gradient(embed(target, batch["tokens"], self.dtype))
    states = self._apply(
      params,
      features,
      tokens,
      batch["positions"],
      batch["segment_ids"],
      self.num_heads,
      method="rollout",
    )
    return [g[:, : -1 - k] for k, g in enumerate(states, 1)]

  # Inference.

  def first(self, params, state, context: Context):
    logits = self.head(params, context.target, 1, state.last[:, None])[:, 0]
    b = state.last.shape[0]
    return logits, (state.last[:, None], *self._no_keys(b), jnp.zeros((b, 1, 0), bool))

  def step(self, params, state, context: Context):
    (cache,) = state.caches

    def feed(carry, level, tokens, parents):
      g, keys, values, ancestors = carry
      b, n = tokens.shape
      itself = jnp.broadcast_to(jnp.eye(n, dtype=bool), (b, n, n))
      seen = jnp.concatenate([take_nodes(ancestors, parents), itself], axis=-1)
      positions = jnp.broadcast_to(cache.length[:, None] - 1 + level, (b, n))
      g, keys, values = self._apply(
        params,
        take_nodes(g, parents),
        embed(context.target, tokens, self.dtype),
        positions,
        cache,
        keys,
        values,
        seen,
        method="draft",
      )
      # Nodes of later levels see this level through ``seen``; pad it to the keys held then.
      return self.head(params, context.target, level + 1, g), (g, keys, values, seen)

    return feed
