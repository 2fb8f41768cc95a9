# SPDX-License-Identifier: Apache-2.0
"""Falcon (arXiv 2412.12639): EAGLE that drafts k tokens a pass, semi-autoregressively.

Slots are grouped in blocks of k. With f the target's post-norm states:

  u = LSTM([E[x_{s+1}] ; f_s])       two layers over time, (h, c) kept in the drafter's state
  f^ = Layer(u)                      one layer without input norm; a slot sees all earlier blocks
                                     and its whole own one (relaxed causal mask)

The block that ends with slot t gives ``f^_{t+1} .. f^_{t+k}``, the drafts of depth 1..k, from its
slots t-k+1..t. The next block reads the k drafted tokens and these features. Within a block the
candidates of a depth are the same below every node of the depth before (a table per slot); blocks
differ by the path that leads to them. A tree of depth D takes ``ceil(D / k)`` passes.

Blocks are counted back from the newest slot, whatever was accepted. That is exact with one
attention layer, whose keys don't depend on how slots are grouped, and it lets training learn every
alignment at once: depth i reads slot t-k+i as a query that sees the keys up to t, for all t. Slots
before a text's first one are zero.

Training (CSGD, coupled sequential glancing distillation): a pass without gradient counts the S
slots where the drafter is wrong, then ``lambda S`` of every k-th slot get their own answer as
input, ``(E[x_{s+1+k}], f_{s+k})``, and the loss is

  SmoothL1(f^, f) + 0.1 (0.9 KL(p || q^{1/0.95}) + 0.1 CE(sample of p, q))

up to constants; of the last term we take the expectation over the sample, CE(p, q). The paper lets
lambda fall from 0.45 to 0.1 over the run; a loss doesn't know the step, so lambda is drawn from
that range every step. The released code calls its LSTM in a way that can't run; batch and time are
axes of their own here.

That glancing makes a better drafter takes longer runs than the tests': on their counting target it
is behind ``glance=(0, 0)`` after 100 steps.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.base import Context
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.drafting.eagle import Eagle, EagleLayers
from jaxdec.drafting.objectives import Objective, Term
from jaxdec.drafting.rollout import rollout_attention
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.trained import embed, label_weights
from jaxdec.errors import UserError
from jaxdec.mixers import Attention
from jaxdec.mixers.attention import (
  KVState,
  attention_logits,
  attention_values,
  heads_first,
)
from jaxdec.mixers.base import write_rows
from jaxdec.mixers.norms import Dense

LSTM_LAYERS = 2


class LSTM(nn.Module):
  """LSTM layers over axis 1; the forget gate's bias starts at 1."""

  dim: int
  num_layers: int
  dropout: float
  dtype: jnp.dtype

  def setup(self):
    d = self.dim
    kernel = nn.with_logical_partitioning(nn.initializers.normal(d**-0.5), ("embed", None))
    self.inputs = [Dense(4 * d, (None, "embed"), True, self.dtype) for _ in range(self.num_layers)]
    self.hidden = [self.param(f"hidden_{i}", kernel, (d, 4 * d)) for i in range(self.num_layers)]

  def __call__(
    self,
    x: Float[Array, "B T I"],
    memory: Float[Array, "B L 2 D"],
    begins: Bool[Array, "B T"] | None = None,
    rng: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B T L 2 D"]]:
    """Outputs, and (h, c) after every slot. ``begins``: slots that forget what came before them."""
    begins = jnp.zeros(x.shape[:2], bool) if begins is None else begins
    memories = []
    for i in range(self.num_layers):
      kernel = self.hidden[i].astype(self.dtype)

      def step(carry, slot, kernel=kernel):
        gates, begin = slot
        h, c = (jnp.where(begin[:, None], 0, y) for y in carry)
        into, forget, cell, out = jnp.split(gates + h @ kernel, 4, axis=-1)
        c = jax.nn.sigmoid(forget + 1) * c + jax.nn.sigmoid(into) * jnp.tanh(cell)
        h = jax.nn.sigmoid(out) * jnp.tanh(c)
        return (h, c), (h, c)

      start = (memory[:, i, 0], memory[:, i, 1])
      slots = (self.inputs[i](x).swapaxes(0, 1), begins.swapaxes(0, 1))
      h, c = (y.swapaxes(0, 1) for y in jax.lax.scan(step, start, slots)[1])
      memories.append(jnp.stack([h, c], axis=2))
      x = h
      if rng is not None and self.dropout and i + 1 < self.num_layers:
        keep = jax.random.bernoulli(jax.random.fold_in(rng, i), 1 - self.dropout, x.shape)
        x = jnp.where(keep, x / (1 - self.dropout), 0).astype(self.dtype)
    return x, jnp.stack(memories, axis=2)


class FalconLayers(EagleLayers):
  """EAGLE's layer with blocks of slots for queries; ``W_fc`` or an LSTM in front."""

  block: int = 2
  recurrent: bool = True
  dropout: float = 0.1

  def setup(self):
    super().setup()
    if self.recurrent:
      self.lstm = LSTM(self.dim, LSTM_LAYERS, self.dropout, self.dtype)

  def encode(self, features, embedded, memory, begins=None, rng=None):
    """``u [B,T,D]`` and the memory after every slot, ``[B,T,L,2,D]`` (L = 0 without LSTM)."""
    if not self.recurrent:
      memories = jnp.broadcast_to(memory[:, None], (*features.shape[:2], *memory.shape[1:]))
      return self.fuse(features, embedded), memories
    return self.lstm(jnp.concatenate([embedded, features], axis=-1), memory, begins, rng)

  def _project(self, x, positions):
    return self.blocks[0].mixer._project(self.blocks[0].normed(x), positions)

  def _finish(self, x, out):
    return self.blocks[0]._finish(x, self.blocks[0].mixer._output(out, x))

  def rollout(self, features, embedded, positions, segment_ids, steps, follow=None, rng=None):
    """Outputs by depth, each aligned with the last true slot t: ``[B,T,D]``; the last are garbage.

    ``follow``: what slot s is fed in place of ``E[x_{s+1}]`` (a glanced answer).
    """
    b, t, d = features.shape

    def shifted(by):
      return jnp.pad(embedded[:, by:], ((0, 0), (0, min(by, t)), (0, 0)))[:, :t]

    follow = shifted(1) if follow is None else follow
    u, memory = self.encode(
      features, follow, self.empty_memory(b, features.dtype), positions == 0, rng
    )
    seen, outputs = [self._project(u, positions)[1:]], []

    def attend(x, at):
      out = rollout_attention(self._project(x, at)[0], seen, segment_ids, self.attention)
      outputs.append(self._finish(x, out))

    for back in range(self.block - 1, -1, -1):  # slot t - back, for depth k - back
      x = jnp.pad(u, ((0, 0), (back, 0), (0, 0)))[:, :t]
      attend(jnp.where((positions >= back)[..., None], x, 0), positions - back)
    memory = memory.reshape(b * t, *memory.shape[2:])
    for depth in range(self.block, steps, self.block):  # drafted tokens so far
      ahead = range(depth - self.block + 1, depth + 1)  # slots t + ahead
      fed = jnp.stack([self.feature(x) for x in outputs[-self.block :]], axis=2)
      tokens = jnp.stack([shifted(1 + i) for i in ahead], axis=2)
      fed, tokens = (x.reshape(b * t, self.block, d) for x in (jax.lax.stop_gradient(fed), tokens))
      u, memory = self.encode(fed, tokens, memory)
      u, memory = u.reshape(b, t, self.block, d), memory[:, -1]
      seen += [self._project(u[:, :, j], positions + i)[1:] for j, i in enumerate(ahead)]
      for j, i in enumerate(ahead):
        attend(u[:, :, j], positions + i)
    return outputs[:steps]

  def empty_memory(self, batch: int, dtype) -> Float[Array, "B L 2 D"]:
    """The LSTM before a text."""
    return jnp.zeros((batch, LSTM_LAYERS if self.recurrent else 0, 2, self.dim), dtype)

  def read(self, features, embedded, state: FalconState, count):
    """Reads the first ``count [B]`` of new slots, then the block that ends with the last one."""
    k, length = self.block, state.caches.length
    u, memory = self.encode(features, embedded, state.memory)
    positions = length[:, None] + jnp.arange(u.shape[1], dtype=jnp.int32)
    keys = self._project(u, positions)[1:]
    cache = KVState(
      *(
        write_rows(old, heads_first(new), length, axis=2)
        for old, new in zip((state.caches.k, state.caches.v), keys)
      ),
      length + count,
    )
    at = (count[:, None] + jnp.arange(k))[..., None]
    recent = jnp.take_along_axis(jnp.concatenate([state.recent, u], axis=1), at, axis=1)
    last = jnp.maximum(count - 1, 0)[:, None, None, None, None]
    memory = jnp.take_along_axis(memory, last, axis=1)[:, 0]
    memory = jnp.where((count > 0)[:, None, None, None], memory, state.memory)
    positions = cache.length[:, None] - k + jnp.arange(k)
    nothing = cache.k[:, :, :0]
    among = jnp.zeros((u.shape[0], k, 0), bool)
    last = self._attend(recent, positions, cache, nothing, nothing, among)
    return FalconState(last, recent, memory, cache)

  def draft(self, fed, embedded, positions, state, memory, drafted, seen):
    """Feeds n blocks after the m fed before.

    Args:
      fed, embedded: features and tokens of each block's slots, ``[B,n,k,D]``.
      memory: of the LSTM before them, ``[B,n,L,2,D]``.
      drafted: keys and values of the m blocks, ``[B,K,mk,H]``. seen: ``[B,n,m+n]``, which blocks
        each sees, itself included.

    Returns:
      Outputs ``[B,n,k,D]``, memory, and keys and values with these blocks'.
    """
    b, n, k, d = fed.shape
    flat = [x.reshape(b * n, *x.shape[2:]) for x in (fed, embedded, memory)]
    u, memory = self.encode(*flat)
    u = u.reshape(b, n * k, d)
    keys, values = (
      jnp.concatenate([old, heads_first(new).astype(old.dtype)], axis=2)
      for old, new in zip(drafted, self._project(u, positions)[1:])
    )
    among = jnp.repeat(jnp.repeat(seen, k, axis=1), k, axis=2)
    out = self._attend(u, positions, state.caches, keys, values, among)
    return out.reshape(fed.shape), memory[:, -1].reshape(b, n, *memory.shape[2:]), (keys, values)

  def _attend(self, x, positions, cache, keys, values, among):
    """Queries over the whole cache, their own block's slots included, and drafted keys."""
    c, capacity = self.attention, cache.k.shape[2]
    q = self._project(x, positions)[0]
    cached = jnp.arange(capacity)[None, None] < cache.length[:, None, None]
    cached = jnp.broadcast_to(cached, (*x.shape[:2], capacity))
    logits = [attention_logits(q, cache.k, cached, c), attention_logits(q, keys, among, c)]
    probs = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
    out = attention_values(probs[..., :capacity], cache.v, x.shape[1])
    return self._finish(x, out + attention_values(probs[..., capacity:], values, x.shape[1]))


@struct.dataclass
class FalconState:
  """What the drafter knows of the text so far.

  Attributes:
    last: features of the block that ends before the root. recent: that block's ``u``.
    memory: the LSTM's (h, c). caches: keys and values of the attention layer.
  """

  last: Float[Array, "B k D"]
  recent: Float[Array, "B k D"]
  memory: Float[Array, "B L 2 D"]
  caches: KVState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Falcon(Eagle):
  """Falcon.

  Attributes:
    block: k, tokens drafted a pass.
    recurrent: an LSTM over tokens and features; without it ``W_fc``, as in EAGLE.
    dropout: between the LSTM's layers, in training.
    glance: least and largest lambda; (0, 0) trains on true inputs alone.
    rollouts: depths trained; k by default.
  """

  name: ClassVar[str] = "falcon"

  block: int = 2
  recurrent: bool = True
  dropout: float = 0.1
  glance: tuple[float, float] = (0.1, 0.45)
  rollouts: int = 2
  objective: Objective = (Term("smooth_l1"), Term("soft", 0.09, 0.95), Term("soft", 0.01))

  def __post_init__(self):
    if self.block < 1 or not 0 <= self.glance[0] <= self.glance[1] <= 1:
      raise UserError(
        "falcon needs block of at least 1 and glance=(least, largest) within [0, 1], got "
        f"{self.block} and {self.glance}"
      )
    if self.num_layers != 1 or self.attention.window is not None:
      raise UserError(
        "falcon has one attention layer over the whole text, whose keys fit blocks however they "
        f"lie; got num_layers={self.num_layers} and window={self.attention.window}"
      )
    super().__post_init__()

  @classmethod
  def for_target(cls, config, **options) -> Falcon:
    options.setdefault("rollouts", options.get("block", cls.block))
    return super().for_target(config, **options)

  @property
  def network(self) -> FalconLayers:
    return FalconLayers(
      **self._shape,
      fuse_bias=self.fuse_bias,
      block=self.block,
      recurrent=self.recurrent,
      dropout=self.dropout,
    )

  # Training.

  def teacher_forced(self, params, target, output, batch, rng=None):
    features = jax.lax.stop_gradient(self._features(output))
    e = jax.lax.stop_gradient(embed(target, batch["tokens"], self.dtype))
    follow = jnp.pad(e[:, 1:], ((0, 0), (0, 1), (0, 0)))
    noise = dropout = None
    depths = self.num_heads
    if rng is not None:
      noise, dropout, glance = jax.random.split(rng, 3)
      depths = min(self.rollouts, self.num_heads)
    if noise is not None and self.noise:
      features = self._noisy(features, batch["segment_ids"], noise)

    def roll(features, follow, steps, rng):
      args = features, e, batch["positions"], batch["segment_ids"], steps, follow, rng
      return self._apply(params, *args, method="rollout")

    if rng is not None and self.glance[1]:
      known = roll(features, follow, min(self.block, self.num_heads), None)
      known = jax.lax.stop_gradient(known)
      chosen = self._glanced(params, target, output, known, batch, glance)[..., None]
      k = self.block
      features, follow = (
        jnp.where(chosen, jnp.pad(x[:, k:], ((0, 0), (0, k), (0, 0))), x)
        for x in (features, follow)
      )
    states = roll(features, follow, depths, dropout)
    return [x[:, : -1 - i] for i, x in enumerate(states, 1)]

  def _glanced(self, params, target, output, states, batch, rng) -> Bool[Array, "B T"]:
    """Slots that get their own answer as input; more where the drafter is wrong more often."""
    k, (b, t) = self.block, batch["tokens"].shape

    def best(depth, x):  # a row at a time: only that row's logits are formed
      found = jax.lax.map(lambda row: argmax(self.head(params, target, depth, row)), x)
      return found if self.draft_ids is None else self.draft_ids[found]

    answers = jax.lax.map(
      lambda row: argmax(target.model.apply({"params": target.params}, row, method="unembed")),
      jax.lax.stop_gradient(output.hidden),
    )
    wrong = jnp.zeros(b)
    for depth, x in enumerate(states, 1):
      miss = best(depth, x[:, : -1 - depth]) != answers[:, depth:-1]
      wrong += jnp.sum(miss * label_weights(batch, depth, prefix=True), axis=1) / len(states)
    rate_rng, offset_rng, order_rng, run_rng = jax.random.split(rng, 4)
    low, high = self.glance
    share = jax.random.uniform(rate_rng, (), minval=low, maxval=high)
    count = jnp.floor(wrong * share) // (1 if k <= 2 else k)
    return glance_slots(
      jnp.pad(label_weights(batch, k, prefix=True), ((0, 0), (0, 1 + k))) > 0,
      count.astype(jnp.int32),
      jax.random.randint(offset_rng, (b, 1), 0, k),
      jax.random.uniform(order_rng, (b, t)),
      # Blocks of more than two are revealed in runs.
      1
      + (jax.random.randint(run_rng, (b, t), 0, k - 1) if k > 2 else jnp.zeros((b, t), jnp.int32)),
      k,
    )

  # Inference.

  def init_state(self, batch: int, capacity: int) -> FalconState:
    dtype = jnp.dtype(self.dtype)
    cache = Attention(self.attention, self.dim, parent=None).init_state(batch, capacity, dtype)
    last, recent = (jnp.zeros((batch, self.block, self.dim), dtype) for _ in range(2))
    layers = LSTM_LAYERS if self.recurrent else 0
    return FalconState(last, recent, jnp.zeros((batch, layers, 2, self.dim), dtype), cache)

  def _read(self, params, state, features, next_tokens, count, target):
    embedded = embed(target, next_tokens, self.dtype)
    new = self._apply(params, features, embedded, state, count, method="read")
    return new.replace(last=jnp.where((count > 0)[:, None, None], new.last, state.last))

  def first(self, params, state: FalconState, context: Context):
    b = state.last.shape[0]
    empty = state.caches.k[:, :, :0]
    path, seen = jnp.zeros((b, 1, 0), jnp.int32), jnp.zeros((b, 1, 0), bool)
    logits = self.head(params, context.target, 1, state.last[:, :1])[:, 0]
    return logits, (state.last[:, None], path, state.memory[:, None], seen, (empty, empty))

  def step(self, params, state: FalconState, context: Context):
    k = self.block

    def feed(carry, level, tokens, parents):
      # Rows of nodes: their block's features [B,n,k,D], tokens since it, the LSTM before the next.
      *rows, drafted = carry
      features, path, memory, seen = (take_nodes(x, parents) for x in rows)
      path = jnp.concatenate([path, tokens[..., None]], axis=-1)
      if level % k:  # the block's own next slot; until the first pass all nodes share one block
        shared = features[:, :1] if level < k else features
        logits = self.head(params, context.target, level + 1, shared[:, :, level % k])
        return logits, (features, path, memory, seen, drafted)
      b, n = tokens.shape
      itself = jnp.broadcast_to(jnp.eye(n, dtype=bool), (b, n, n))
      seen = jnp.concatenate([seen, itself], axis=-1)
      embedded = embed(context.target, path.reshape(b, -1), self.dtype).reshape(features.shape)
      positions = state.caches.length[:, None] - 1 + level - k + 1 + jnp.arange(k)
      positions = jnp.tile(positions, (1, n))
      features, memory, drafted = self._apply(
        params, features, embedded, positions, state, memory, drafted, seen, method="draft"
      )
      logits = self.head(params, context.target, level + 1, features[:, :, 0])
      return logits, (features, path[..., :0], memory, seen, drafted)

    return feed


def glance_slots(
  answered: Bool[Array, "B T"],
  count: Int[Array, "B"],
  offset: Int[Array, "B 1"],
  order: Float[Array, "B T"],
  runs: Int[Array, "B T"],
  block: int,
) -> Bool[Array, "B T"]:
  """Which slots are fed their answers.

  Args:
    answered: slots whose answer may be shown. count: places to choose in each row.
    offset: places are every ``block``-th answered slot, from this one on. order: the first
      ``count`` places in it are taken. runs: slots shown from a place on.
  """
  number = jnp.cumsum(answered, axis=1) - 1
  places = answered & (number % block == offset)
  ranked = jnp.argsort(jnp.argsort(jnp.where(places, order, jnp.inf), axis=1), axis=1)
  taken = places & (ranked < count[:, None])
  shown = taken
  for i in range(1, block - 1):
    shown |= jnp.pad((taken & (runs > i))[:, :-i], ((0, 0), (i, 0)))
  return shown & answered
