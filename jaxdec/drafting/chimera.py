# SPDX-License-Identifier: Apache-2.0
"""Chimera (arXiv 2402.15758): trigrams of tokens, fused with all of the target's states.

At slot t, for depth k = 1..K, with h the target's post-norm states:

  c = [E[x_{t+k-2}] ; E[x_{t+k-1}] ; E[x_{t+k}]]         at a text's start its first token repeats
  b_{t+k} = W_3 (c + SiLU(A c + a))                      trigram encoder, in place of lower layers
  g_{t+k} = F(b_{t+k} | h_{<=t}, g_{t+1} .. g_{t+k-1}, b_{t+k})      about h_{t+k}
  logits  = W_k [h_t ; g_{t+k}]                          residual decoding, for x_{t+1+k}

F is one decoder layer: its query and residual are ``b_{t+k}``, its keys and values come from the
states listed, each at its own position. Slots drafted before enter as their outputs g, detached,
the newest as its trigram. Only h enters the cache. Start: A = 0, ``W_k = [W | W]``.

The released mask also lets a training slot see the trigrams of all earlier slots, which do not
exist when drafting, and hides g; here training sees what drafting sees. The paper's loss on states
is ``mse`` at every depth, since each g stands for a state in the depths after it
(``objective="hard"`` leaves it out, as the released trainer does).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdec.drafting.base import Context, Params, Target
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.drafting.hydra import draft_attention
from jaxdec.drafting.medusa import own_head
from jaxdec.drafting.objectives import Objective, Term
from jaxdec.drafting.rollout import rollout_attention
from jaxdec.drafting.trained import TrainedDrafter, embed, lm_head_kernel
from jaxdec.mixers import Attention, AttentionConfig, NormConfig
from jaxdec.mixers.attention import KVState, heads_first
from jaxdec.mixers.base import gather_nodes, write_rows
from jaxdec.mixers.norms import Dense
from jaxdec.models.config import DecoderConfig, LayerConfig, MLPConfig
from jaxdec.models.decoder import Block


class ChimeraModule(nn.Module):
  """Trigram encoder and context layer."""

  layer: LayerConfig
  dim: int
  norm: NormConfig
  dtype: jnp.dtype

  def setup(self):
    self.trigram = Dense(3 * self.dim, ("embed", None), True, self.dtype, init_std=0.0)
    self.reduce = Dense(self.dim, (None, "embed"), False, self.dtype)
    self.context = Block(self.layer, self.dim, self.norm, self.dtype)

  def encode(self, c: Float[Array, "... 3D"]) -> Float[Array, "... D"]:
    """``b`` of three embeddings, oldest first."""
    return self.reduce(c + jax.nn.silu(self.trigram(c)))

  def keys(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]):
    """Keys and values of states or trigrams."""
    return self.context.mixer._project(self.context.normed(x), positions)[1:]

  def rollout(self, h, trigrams, positions, segment_ids) -> list[Float[Array, "B T D"]]:
    """``g`` of every slot at every depth; ``trigrams``: ``b`` by depth, each ``[B,T,D]``."""
    mixer = self.context.mixer
    seen, outputs = [self.keys(h, positions)], []
    for k, b in enumerate(trigrams, 1):
      q, key, value = mixer._project(self.context.normed(b), positions + k)
      out = rollout_attention(q, [*seen, (key, value)], segment_ids, mixer.config)
      outputs.append(self.context._finish(b, mixer._output(out, b)))
      seen.append(self.keys(jax.lax.stop_gradient(outputs[-1]), positions + k))
    return outputs

  def read(self, h, cache: KVState, count: Int[Array, "B"]) -> KVState:
    """Writes the first ``count [B]`` of new states to the cache; nothing has to attend to it."""
    positions = cache.length[:, None] + jnp.arange(h.shape[1], dtype=jnp.int32)
    k, v = (
      write_rows(old, heads_first(new), cache.length, axis=2)
      for old, new in zip((cache.k, cache.v), self.keys(h, positions))
    )
    return KVState(k, v, cache.length + count)

  def draft(self, c, cache, drafted, ancestors, positions):
    """``g`` of n nodes with trigrams ``c [B,n,3D]`` after m fed before, and their keys and values.

    ``drafted``: keys and values ``[B,K,m,H]`` of earlier nodes; ``ancestors [B,n,m+n]``.
    """
    b, mixer = self.encode(c), self.context.mixer
    q, key, value = mixer._project(self.context.normed(b), positions)

    def append(pair):
      return tuple(
        jnp.concatenate([old, heads_first(new).astype(old.dtype)], axis=2)
        for old, new in zip(drafted, pair)
      )

    out = mixer._attend_state(q, *append((key, value)), cache, positions, ancestors)
    g = self.context._finish(b, mixer._output(out, b))
    return g, append(self.keys(g, positions))

  def __call__(self, x, positions):
    """Touches every parameter (for ``init``)."""
    return self.rollout(x, [self.encode(jnp.concatenate([x] * 3, -1))], positions, positions)


@struct.dataclass
class ChimeraState:
  """``h`` at the token before the root; the context layer's keys of all states so far."""

  hidden: Float[Array, "B D"]
  cache: KVState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chimera(TrainedDrafter):
  """Chimera.

  Attributes:
    attention, hidden_dim, eps: shape of the context layer.
    share_head: ``W_k = W R_k``, W the target's own LM head (frozen), ``R_k = [I | I]`` learned,
      which saves ``2 K D V`` parameters; see ``Medusa``.
  """

  name: ClassVar[str] = "chimera"
  sequential: ClassVar[bool] = True
  needs_prompt_hidden: ClassVar[bool] = True

  attention: AttentionConfig
  hidden_dim: int
  eps: float = 1e-6
  share_head: bool = False
  objective: Objective = (Term("hard"), Term("mse"))

  @classmethod
  def for_target(cls, config: DecoderConfig, **options) -> Chimera:
    options.setdefault("attention", draft_attention(config))
    options.setdefault("hidden_dim", config.layers[0].mlp.hidden_dim)
    options.setdefault("eps", config.norm.eps)
    return super().for_target(config, **options)

  @property
  def module(self) -> ChimeraModule:
    layer = LayerConfig(self.attention, MLPConfig(self.hidden_dim))
    return ChimeraModule(layer, self.dim, NormConfig(self.eps), jnp.dtype(self.dtype))

  def _apply(self, params, *args, method):
    return self.module.apply({"params": params["module"]}, *args, method=method)

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    x, positions = jnp.zeros((1, 2, self.dim), self.dtype), jnp.zeros((1, 2), jnp.int32)
    kernel = jnp.eye(self.dim) if self.share_head else lm_head_kernel(target)
    names = ("embed", None) if self.share_head else ("embed", "vocab")
    kernel = nn.LogicallyPartitioned(jnp.concatenate([kernel, kernel]), names)
    return {
      "module": self.module.init(rng, x, positions)["params"],
      **{f"head_{k}": {"kernel": kernel} for k in range(self.num_heads)},
    }

  def head(self, params, target, depth, states):
    """``states [..., 2D]``: ``[h_t ; g_{t+k}]``."""
    head = params[f"head_{depth - 1}"]
    if not self.share_head:
      return own_head(head, states, self.logit_cap)
    states = states @ head["kernel"].astype(states.dtype)
    return target.model.apply({"params": target.params}, states, method="unembed")

  def predicted(self, params, states):
    return states[..., self.dim :]

  def teacher_forced(self, params, target, output, batch, rng=None):
    h = jax.lax.stop_gradient(output.hidden).astype(self.dtype)
    e = jax.lax.stop_gradient(embed(target, batch["tokens"], self.dtype))
    b = self._apply(params, _trigrams(e, batch["positions"]), method="encode")
    depths = range(1, self.num_heads + 1)
    ahead = [jnp.pad(b[:, k:], ((0, 0), (0, k), (0, 0))) for k in depths]
    g = self._apply(params, h, ahead, batch["positions"], batch["segment_ids"], method="rollout")
    return [jnp.concatenate([h[:, : -1 - k], x[:, : -1 - k]], axis=-1) for k, x in zip(depths, g)]

  def init_state(self, batch: int, capacity: int) -> ChimeraState:
    attention, dtype = Attention(self.attention, self.dim, parent=None), jnp.dtype(self.dtype)
    cache = attention.init_state(batch, capacity, dtype)
    return ChimeraState(jnp.zeros((batch, self.dim), dtype), cache)

  def _read(self, params, state, hidden, count):
    hidden = hidden.astype(self.dtype)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    cache = self._apply(params, hidden, state.cache, count, method="read")
    return ChimeraState(jnp.where(count[:, None] > 0, last, state.hidden), cache)

  def start(self, params, state, prompt, output, target):
    return self._read(params, state, output.hidden, prompt.lengths)

  def observe(self, params, state, tree, accepted, output, context):
    return self._read(params, state, gather_nodes(output.hidden, accepted.path), accepted.count)

  def first(self, params, state, context: Context):
    b, c = state.hidden.shape[0], self.attention
    # The two tokens before the root; at the text's start, its first one.
    at = jnp.maximum(context.length[:, None] - jnp.array([2, 1]), 0)
    before = jnp.take_along_axis(context.history, at, axis=1)[:, None]
    empty = jnp.zeros((b, c.num_kv_heads, 0, c.head_dim), state.cache.k.dtype)
    carry = (before, (empty, empty), jnp.zeros((b, 1, 0), bool))
    logits, carry = self._feed(params, state, context, carry, 0, context.root[:, None])
    return logits[:, 0], carry

  def _feed(self, params, state, context, carry, level, tokens):
    """Feeds nodes whose parents' rows ``carry`` holds."""
    before, drafted, seen = carry  # before [B,n,2]: the two tokens ahead of each node
    b, n = tokens.shape
    itself = jnp.broadcast_to(jnp.eye(n, dtype=bool), (b, n, n))
    seen = jnp.concatenate([seen, itself], axis=-1)
    trigram = jnp.concatenate([before, tokens[..., None]], axis=-1)
    e = embed(context.target, trigram.reshape(b, -1), self.dtype).reshape(b, n, -1)
    positions = jnp.broadcast_to(state.cache.length[:, None] + level, (b, n))
    g, drafted = self._apply(params, e, state.cache, drafted, seen, positions, method="draft")
    h = jnp.broadcast_to(state.hidden[:, None], g.shape)
    logits = self.head(params, context.target, level + 1, jnp.concatenate([h, g], axis=-1))
    return logits, (trigram[..., 1:], drafted, seen)

  def step(self, params, state, context: Context):
    def feed(carry, level, tokens, parents):
      before, drafted, seen = carry
      carry = (take_nodes(before, parents), drafted, take_nodes(seen, parents))
      return self._feed(params, state, context, carry, level, tokens)

    return feed


def _trigrams(e: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T 3D"]:
  """Embeddings of two tokens before, one before, and the slot's own, within its document."""
  index = jnp.arange(e.shape[1])
  back = [jnp.minimum(positions, i) for i in (2, 1)]
  before = [jnp.take_along_axis(e, (index - i)[..., None], axis=1) for i in back]
  return jnp.concatenate([*before, e], axis=-1)
