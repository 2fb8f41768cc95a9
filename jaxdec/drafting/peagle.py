# SPDX-License-Identifier: Apache-2.0
"""P-EAGLE (arXiv 2602.01469): EAGLE-3's inputs, and every depth from one pass of the drafter.

A chain hangs on each slot c. Its depth 0 is EAGLE-3's slot: the features of c and the token
``x_{c+1}``, which is known. Depths j = 1..K-1 know nothing: all get one learned embedding and one
learned feature (before ``W_fc``), and stand at position c + j. A node sees the depth-0 slots up to
c and its own chain up to itself, in each of the layers (four; the first reads
``[RMS(e) ; RMS(g)]`` as EAGLE-3's does, the others the stream alone). Its logits are for
``x_{c+2+j}``, whatever lies between.

Training on all chains would cost K times the nodes. Conditional drop-token (COD) sampling keeps
``int((m - j) max(r^j, 0.2))`` chains at depth j, of m slots that count, each a chain that was kept
at depth j - 1: here a random order of the slots, those that count first, and of it as many as T
allows; what is beyond the row's own m has weight 0. So all shapes are static, and the chains of
depth j are the first ones of depth j - 1. Evaluation takes all.

The mask embedding is a vector of the drafter's own, not a row of the frozen table.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdec.drafting.base import Context
from jaxdec.drafting.captured import CapturedDrafter
from jaxdec.drafting.dflash import take_slots
from jaxdec.drafting.objectives import Objective
from jaxdec.drafting.pieces import Example
from jaxdec.drafting.rollout import causal_attention, with_own_slots
from jaxdec.drafting.trained import embed, label_weights
from jaxdec.errors import UserError
from jaxdec.mixers import Attention, AttentionConfig, NormConfig
from jaxdec.mixers.attention import attention_logits, attention_values, heads_first
from jaxdec.mixers.norms import Dense, RMSNorm
from jaxdec.models.config import MLPConfig
from jaxdec.models.decoder import MLP

LEAST = 0.2  # of the chains, kept at every depth
QUERIES = 256  # sampled chains that attend at once


class ChainLayer(nn.Module):
  """One layer; the first also reads embeddings."""

  attention_config: AttentionConfig
  hidden_dim: int
  dim: int
  norm: NormConfig
  dtype: jnp.dtype
  first: bool

  def setup(self):
    self.attention = Attention(self.attention_config, self.dim, self.norm, self.dtype)
    self.mlp = MLP(MLPConfig(self.hidden_dim), self.dim, self.dtype)
    self.state_norm, self.mlp_norm = RMSNorm(self.norm), RMSNorm(self.norm)
    if self.first:
      self.embed_norm = RMSNorm(self.norm)

  def _input(self, x, embedded):
    x = self.state_norm(x)
    return jnp.concatenate([self.embed_norm(embedded), x], axis=-1) if self.first else x

  def _finish(self, x, attended):
    x = x + attended
    return x + self.mlp(self.mlp_norm(x))

  def project(self, x, embedded, positions):
    return self.attention._project(self._input(x, embedded), positions)

  def finish(self, x, out):
    return self._finish(x, self.attention._output(out, x))

  def extend(self, x, embedded, state, positions):
    attended, state = self.attention.extend(self._input(x, embedded), state, positions)
    return self._finish(x, attended), state

  def draft(self, x, embedded, positions, state):
    """A chain's masked nodes over the cache, and each over those before it."""
    q, k, v = self.project(x, embedded, positions)
    n = x.shape[1]
    chain = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (x.shape[0], n, n))
    return self.finish(x, self.attention._attend_cache(q, k, v, state, chain))


class ChainModel(nn.Module):
  """Parameters of the drafter, and its three ways: chains in training, reading, one chain."""

  attention_config: AttentionConfig
  hidden_dim: int
  num_layers: int
  captured: int
  dim: int
  draft_vocab: int
  norm: NormConfig
  dtype: jnp.dtype

  def setup(self):
    normal = nn.initializers.normal(0.02)
    self.fuse = Dense(self.dim, (None, "embed"), dtype=self.dtype)
    self.mask_feature = self.param("mask_feature", normal, (self.captured * self.dim,))
    self.mask_embedding = self.param("mask_embedding", normal, (self.dim,))
    self.layers = [
      ChainLayer(self.attention_config, self.hidden_dim, self.dim, self.norm, self.dtype, i == 0)
      for i in range(self.num_layers)
    ]
    self.out_norm = RMSNorm(self.norm)
    self.lm_head = Dense(self.draft_vocab, ("embed", "vocab"), dtype=self.dtype)

  def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    return self.lm_head(self.out_norm(x)).astype(jnp.float32)

  def _masked(self, *shape: int):
    """Stream and embedding of masked nodes."""
    stream = self.fuse(self.mask_feature.astype(self.dtype))
    inputs = stream, self.mask_embedding.astype(self.dtype)
    return tuple(jnp.broadcast_to(x, (*shape, self.dim)) for x in inputs)

  def chains(
    self,
    features: Float[Array, "B T E"],
    embedded: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    slots: Int[Array, "B A"] | None,
    counts: tuple[int, ...],
  ) -> list[Float[Array, "B _ D"]]:
    """States of depth 0 at all slots, and of depth j at the first ``counts[j-1]`` of ``slots``.

    ``slots`` None: 0, 1, ..., in order.
    """
    b, t = positions.shape
    order = jnp.broadcast_to(jnp.arange(t), (b, t)) if slots is None else slots
    at = [take_slots(positions, order[:, :n]) + j for j, n in enumerate(counts, 1)]
    at = jnp.concatenate([positions[:, :0], *at], axis=1)
    ends = [sum(counts[: j + 1]) for j in range(len(counts))]

    def by_depth(x):
      return [x[:, end - n : end] for end, n in zip(ends, counts)]

    x, y, masked = self.fuse(features), *self._masked(b, at.shape[1])
    for layer in self.layers:
      q, k, v = layer.project(x, embedded, positions)
      out, _ = causal_attention(q, k, v, segment_ids, self.attention_config)
      x = layer.finish(x, out)
      if not counts:
        continue
      nodes = [by_depth(z) for z in layer.project(y, masked, at)]
      outs, own = [], []
      for q, *pair in zip(*nodes):
        n = q.shape[1]
        own = [tuple(z[:, :n] for z in earlier) for earlier in own] + [tuple(pair)]
        if slots is None:
          q = jnp.pad(q, ((0, 0), (0, t - n), (0, 0), (0, 0)))
          far = causal_attention(q, k, v, segment_ids, self.attention_config)
          far, q = (far[0][:, :n], far[1][:, :, :n]), q[:, :n]
        else:
          far = scattered_attention(q, k, v, slots[:, :n], segment_ids, self.attention_config)
        outs.append(with_own_slots(*far, q, own, self.attention_config))
      y = layer.finish(y, jnp.concatenate(outs, axis=1))
    return [x, *by_depth(y)]

  def read(self, features, embedded, caches, positions):
    """Reads slots with true features into the caches (position -1: padding)."""
    x, new = self.fuse(features), []
    for layer, cache in zip(self.layers, caches):
      x, cache = layer.extend(x, embedded, cache, positions)
      new.append(cache)
    return x, tuple(new)

  def draft(self, positions: Int[Array, "B n"], caches):
    """States of a chain's masked nodes."""
    x, masked = self._masked(*positions.shape)
    for layer, cache in zip(self.layers, caches):
      x = layer.draft(x, masked, positions, cache)
    return x

  def __call__(self, features, embedded, positions, segment_ids):
    """Touches every parameter (for ``init``)."""
    return self.logits(self.chains(features, embedded, positions, segment_ids, None, (1,))[1])


def scattered_attention(q, k, v, slots, segment_ids, config: AttentionConfig):
  """``causal_attention`` of queries at ``slots [B,S]`` of the text, some at a time."""
  b, s, n, _ = q.shape
  keys, values = heads_first(k), heads_first(v)
  size = min(QUERIES, s)
  count = -(-s // size)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, count * size - s), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(b, count, size, *x.shape[2:]).swapaxes(0, 1)

  def some(x):
    q, slots = x
    seen = jnp.arange(k.shape[1]) <= slots[..., None]
    seen = seen & (take_slots(segment_ids, slots)[..., None] == segment_ids[:, None])
    logits = attention_logits(q, keys, seen, config)
    lse = jax.nn.logsumexp(logits, axis=-1)
    out = attention_values(jnp.exp(logits - lse[..., None]), values, size)
    return out, lse.reshape(b, n, size).swapaxes(1, 2)

  parts = jax.lax.map(jax.checkpoint(some, prevent_cse=False), (cut(q), cut(slots)))
  out, lse = (x.swapaxes(0, 1).reshape(b, -1, *x.shape[3:])[:, :s] for x in parts)
  return out, lse.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PEagle(CapturedDrafter):
  """P-EAGLE.

  Attributes:
    capture_layers, attention, hidden_dim, eps: see ``CapturedDrafter``. num_layers: its layers.
    num_heads: K, the depths; drafts are no deeper.
    keep: r of COD sampling; 1: all chains at all depths.
  """

  name: ClassVar[str] = "p_eagle"

  num_layers: int = 4
  keep: float = 0.7
  num_heads: int = 5
  objective: Objective = "soft"

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.keep <= 1:
      raise UserError(f"keep must lie in (0, 1], got {self.keep}")
    if self.loss_fraction < 1:
      raise UserError("p_eagle samples its slots itself; use keep instead of loss_fraction")

  @property
  def network(self) -> ChainModel:
    return ChainModel(**self._shape, num_layers=self.num_layers)

  @property
  def passes(self) -> float:
    return 1 + sum(self.share(j) for j in range(1, self.num_heads))

  @property
  def num_caches(self) -> int:
    return self.num_layers

  # Training.

  def counts(self, slots: int) -> list[int]:
    """Chains kept at each depth 1..K-1 of ``slots`` that count."""
    return [int(max(0, slots - j) * self.share(j)) for j in range(1, self.num_heads)]

  def share(self, j: int) -> float:
    return max(self.keep**j, LEAST)

  def examples(self, params, target, output, batch, rng=None):
    tokens = batch["tokens"]
    t = tokens.shape[1]
    if t < self.num_heads + 2:
      raise UserError(
        f"sequences of {t} tokens are too short to train {self.num_heads} draft depths; use at "
        f"least {self.num_heads + 2}"
      )
    weights = [label_weights(batch, k, prefix=False) for k in range(1, self.num_heads + 1)]
    slots, counts = None, [t - 2 - j for j in range(1, self.num_heads)]
    if rng is not None and self.keep < 1:
      counts = [max(1, n) for n in self.counts(t - 2)]
      slots = jax.lax.top_k(jax.random.uniform(rng, weights[0].shape) + weights[0], t - 2)[1]
    embedded = jax.lax.stop_gradient(embed(target, tokens, self.dtype))
    states = self._apply(
      params,
      jax.lax.stop_gradient(self._features(output)),
      jnp.pad(embedded[:, 1:], ((0, 0), (0, 1), (0, 0))),
      batch["positions"],
      batch["segment_ids"],
      slots,
      tuple(counts),
      method="chains",
    )
    for j, x in enumerate(states):
      k = j + 1
      labels, hidden, weight = tokens[:, 1 + k :], output.hidden[:, k:-1], weights[j]
      if j == 0 or slots is None:
        yield Example(k, x[:, : t - 1 - k], labels, None, hidden, weight, start=k)
        continue
      chosen = jnp.minimum(slots[:, : counts[j - 1]], t - 2 - k)
      inside = slots[:, : counts[j - 1]] <= t - 2 - k
      kept = jnp.floor((jnp.sum(weights[0], axis=1, keepdims=True) - j) * self.share(j))
      inside = inside & (jnp.arange(counts[j - 1]) < kept)
      weight = take_slots(weight, chosen) * inside
      yield Example(k, x, take_slots(labels, chosen), None, take_slots(hidden, chosen), weight)

  # Inference.

  def first(self, params, state, context: Context):
    states = state.last[:, None]
    if self.max_depth > 1:
      ahead = jnp.arange(self.max_depth - 1, dtype=jnp.int32)
      positions = state.caches[0].length[:, None] + ahead
      masked = self._apply(params, positions, state.caches, method="draft")
      states = jnp.concatenate([states, masked], axis=1)
    logits = self.head(params, context.target, 1, states)  # one product for all depths
    return logits[:, 0], logits

  def step(self, params, state, context: Context):
    # What a depth guesses doesn't depend on the path.
    return lambda logits, level, tokens, parents: (logits[:, level, None], logits)
