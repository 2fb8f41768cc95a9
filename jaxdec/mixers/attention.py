# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention with grouped key/value heads (GQA, arXiv 2305.13245) as a mixer.

The cache holds one slot per position. ``verify`` attends over (cache, nodes) without copying the
cache: the two blocks of logits share one softmax. ``commit`` writes the accepted nodes' keys, which
were rotated to ``length + depth``: exactly the slots they move to.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.errors import UserError
from jaxdec.mixers.base import Packing, Topology, write_rows
from jaxdec.mixers.norms import Dense, NormConfig, RMSNorm
from jaxdec.mixers.rope import RopeConfig, apply_rope
from jaxdec.parallel.sequence import SequenceConfig, sharded
from pallas_kernels.tree_attention import tree_attention

MASKED = -1e30  # finite, so that a fully masked row gives a uniform, not a NaN, softmax


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Attention of one layer.

  Attributes:
    num_heads: N. num_kv_heads: K, a divisor of N. head_dim: H.
    rope: rotary embedding, or None for none.
    window: a query at position i sees keys at i - window < j <= i; None: all j <= i.
    qk_norm: RMSNorm on every query and key head, before RoPE.
    logit_cap: soft-cap ``cap * tanh(logits / cap)``; None: none.
    scale: factor on q·k; None: H**-0.5.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: RopeConfig | None = RopeConfig()  # noqa: RUF009 (frozen)
  window: int | None = None
  qk_norm: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  logit_cap: float | None = None
  scale: float | None = None

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads must be a multiple of num_kv_heads, got N={self.num_heads}, "
        f"K={self.num_kv_heads}"
      )


@struct.dataclass
class SharedKV:
  """Keys and values of texts that rows share, held once: group g serves the next B / G rows."""

  k: Float[Array, "G K P H"]
  v: Float[Array, "G K P H"]
  length: Int[Array, "G"]


@struct.dataclass
class KVState:
  """Keys and values by absolute position; slots at and beyond ``length`` hold no meaning.

  Heads come before slots: both products then read the cache as it lies. With slots first XLA:CPU
  transposed the whole cache in every layer of every step.

  ``shared``: what rows have in common, coarse to fine; slot 0 is the position after it.
  """

  k: Float[Array, "B K S H"]
  v: Float[Array, "B K S H"]
  length: Int[Array, "B"]
  shared: tuple[SharedKV, ...] = ()

  @property
  def own(self) -> Int[Array, "B"]:
    """Live slots of each row: tokens that are not in ``shared``."""
    rows = self.length.shape[0]
    return self.length - sum(jnp.repeat(s.length, rows // s.length.shape[0]) for s in self.shared)


@struct.dataclass
class KVPending:
  """Keys and values of tree nodes."""

  k: Float[Array, "B K M H"]
  v: Float[Array, "B K M H"]


def attention_logits(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B K S H"],
  mask: Bool[Array, "#B T S"],
  config: AttentionConfig,
) -> Float[Array, "B K R S"]:
  """Scaled, capped, masked ``q·k`` in float32; the R = G*T rows are a group's queries, folded."""
  b, t, n, h = q.shape
  kv = k.shape[1]
  scale = config.scale if config.scale is not None else h**-0.5
  q = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h) * scale
  logits = jnp.einsum("bkrh,bksh->bkrs", q.astype(k.dtype), k, preferred_element_type=jnp.float32)
  if config.logit_cap is not None:
    logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
  folded = logits.reshape(b, kv, n // kv, t, -1)
  return jnp.where(mask[:, None, None], folded, MASKED).reshape(logits.shape)


def attention_values(
  probs: Float[Array, "B K R S"], v: Float[Array, "B K S H"], length: int
) -> Float[Array, "B T N H"]:
  """``probs @ v``, the R rows unfolded to T = ``length`` queries of N heads."""
  out = jnp.einsum("bkrs,bksh->bkrh", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
  b, kv, rows, h = out.shape
  out = out.reshape(b, kv, rows // length, length, h).transpose(0, 3, 1, 2, 4)
  return out.reshape(b, length, -1, h)


def visible(
  query_position: Int[Array, "B T"], key_position: Int[Array, "#B S"], window: int | None
) -> Bool[Array, "B T S"]:
  """Causal (and windowed) visibility by absolute positions."""
  difference = query_position[:, :, None] - key_position[:, None, :]
  seen = difference >= 0
  return seen if window is None else seen & (difference < window)


def heads_first(x: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
  """To the layout of the cache."""
  return x.transpose(0, 2, 1, 3)


class Attention(nn.Module):
  """The mixer: projections around two ops; see ``jaxdec.mixers.base`` for the four calls."""

  config: AttentionConfig
  dim: int
  norm: NormConfig = NormConfig()
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  sequence: SequenceConfig | None = None

  def setup(self):
    c = self.config

    def dense(features, axes, bias):
      return Dense(features, axes, bias, self.dtype, self.param_dtype)

    self.q = dense(c.num_heads * c.head_dim, ("embed", "heads"), c.qkv_bias)
    self.k = dense(c.num_kv_heads * c.head_dim, ("embed", "kv_heads"), c.qkv_bias)
    self.v = dense(c.num_kv_heads * c.head_dim, ("embed", "kv_heads"), c.qkv_bias)
    self.o = dense(self.dim, ("heads", "embed"), c.out_bias)
    if c.qk_norm:
      self.q_norm = RMSNorm(self.norm, self.param_dtype)
      self.k_norm = RMSNorm(self.norm, self.param_dtype)

  def _project(self, x, positions):
    c = self.config
    q = self.q(x).reshape(*x.shape[:2], c.num_heads, c.head_dim)
    k = self.k(x).reshape(*x.shape[:2], c.num_kv_heads, c.head_dim)
    v = self.v(x).reshape(*x.shape[:2], c.num_kv_heads, c.head_dim)
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if c.rope is not None:
      q, k = apply_rope(q, positions, c.rope), apply_rope(k, positions, c.rope)
    return q, k, v

  def _output(self, out, x):
    return self.o(out.astype(self.dtype).reshape(*x.shape[:2], -1))

  def __call__(self, x, positions, segment_ids=None):
    q, k, v = self._project(x, positions)
    c = self.config
    # Order goes by index, not by position, since packed documents restart their positions; inside a
    # segment the differences are the same.
    out = sharded.attention(
      q, k, v,
      segment_ids=segment_ids, window=c.window, logit_cap=c.logit_cap, scale=c.scale,
      config=self.sequence,
    )  # fmt: skip
    return self._output(out, x)

  def init_state(self, batch, capacity, dtype=None):
    c = self.config
    shape = (batch, c.num_kv_heads, capacity, c.head_dim)
    dtype = dtype or self.dtype
    return KVState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

  def _attend_state(self, q, k, v, state, positions, among):
    """Queries at ``positions`` over (cache, new tokens); ``among [B,T,T]`` rules the new ones."""
    if state.shared:
      raise UserError(
        "this drafter reads the target's cache directly, which holds no shared prefix; leave out "
        "shared_prefix, or take another drafter"
      )
    c, capacity = self.config, state.k.shape[2]
    slots = jnp.arange(capacity)[None]
    cached = visible(positions, slots, c.window) & (slots < state.length[:, None])[:, None]
    logits = jnp.concatenate(
      [attention_logits(q, state.k, cached, c), attention_logits(q, k, among, c)], axis=-1
    )
    probs = jax.nn.softmax(logits, axis=-1)
    out = attention_values(probs[..., :capacity], state.v, q.shape[1])
    return out + attention_values(probs[..., capacity:], v, q.shape[1])

  def _attend_cache(self, q, k, v, state, ancestors, depth=None):
    """New tokens or tree nodes over (cache, themselves); the cache is read as it lies."""
    c = self.config
    return tree_attention(
      q, state.k, state.v, state.own, k, v, ancestors,
      depth=depth, scale=c.scale, window=c.window, logit_cap=c.logit_cap, cache_layout="BKSH",
      prefix=tuple((s.k, s.v, s.length) for s in state.shared),
    )  # fmt: skip

  def extend(self, x, state, positions):
    q, k, v = self._project(x, positions)
    t = x.shape[1]
    chain = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (x.shape[0], t, t))
    out = self._attend_cache(q, k, v, state, chain)
    k, v = (heads_first(y).astype(state.k.dtype) for y in (k, v))
    # The cache must be written after it was read, and the compiler must see that: where only the
    # program's order says so it may write first, and then copies the whole cache (XLA:CPU: four
    # times a layer and step; an optimization barrier is gone by then). Hence a start that depends
    # on the output; 0 * x is not folded for floats.
    start = state.own + (0 * out[:, 0, 0, 0]).astype(jnp.int32)
    added = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    state = state.replace(
      k=write_rows(state.k, k, start, axis=2),
      v=write_rows(state.v, v, start, axis=2),
      length=state.length + added,
    )
    return self._output(out, x), state

  def read_packed(self, x, state, packing: Packing):
    q, k, v = self._project(x, packing.positions)
    c = self.config
    out = sharded.attention(
      q, k, v,
      segment_ids=packing.segment_ids, window=c.window, logit_cap=c.logit_cap, scale=c.scale,
      config=self.sequence,
    )  # fmt: skip
    k, v = (heads_first(packing.unpack(y)).astype(state.k.dtype) for y in (k, v))
    state = state.replace(
      k=jax.lax.dynamic_update_slice_in_dim(state.k, k, 0, axis=2),
      v=jax.lax.dynamic_update_slice_in_dim(state.v, v, 0, axis=2),
      length=state.length + packing.length,
    )
    return self._output(out, x), state

  def verify(self, x, state, topology: Topology):
    q, k, v = self._project(x, state.length[:, None] + topology.depth)
    out = self._attend_cache(q, k, v, state, topology.ancestors, topology.depth)
    k, v = (heads_first(y).astype(state.k.dtype) for y in (k, v))
    return self._output(out, x), KVPending(k, v)

  def commit(self, state, pending, path, count):
    def write(buffer, nodes):
      return write_rows(
        buffer, jnp.take_along_axis(nodes, path[:, None, :, None], axis=2), state.own, axis=2
      )

    return state.replace(
      k=write(state.k, pending.k),
      v=write(state.v, pending.v),
      length=state.length + count.astype(jnp.int32),
    )
