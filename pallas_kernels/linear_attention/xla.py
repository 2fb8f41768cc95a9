# SPDX-License-Identifier: Apache-2.0
"""Linear attention in chunks of C tokens, in plain XLA, with its own backward pass.

Per chunk, with the state S before it and the inclusive sums G of the log-decays inside it::

    A = (Q K^T) * exp(G_i - G_j)  for i >= j          channel decay: inside the product, over H
    O = A V + (exp(G) * Q) S
    S' = exp(G_C) * S + (exp(G_C - G) * K)^T V

A scan takes several chunks a step: their products are formed at once, the states between them one
after the other. The forward pass keeps the state before each step and nothing else of its own; the
backward pass walks the steps from the end and forms everything else again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import ChannelDecay, Products, channel_decay
from pallas_kernels._dispatch import current_target
from pallas_kernels.linear_attention._configs import XLAConfig
from pallas_kernels.linear_attention._sequences import (
  between,
  crossing,
  exclusive_cumsum,
  pad_to,
  power_of_two,
  prefix,
  repeat_heads,
  reverse_cumsum,
  suffix,
  sum_heads,
)


def linear_attention(q, k, v, g, state, *, scale, chunk_size=None, config=None):
  """See ``reference`` for the arguments and the package for the formula."""
  t, heads, out_dtype = q.shape[1], state.shape[1], q.dtype
  if t == 1:
    return _one_token(q, k, v, g, state, scale)
  static = _Static.choose(q, k, v, t, heads, scale, chunk_size, config)
  q, k, v = (x.astype(static.dtype) for x in (q, k, v))
  padded = -(-t // static.step) * static.step
  g = None if g is None else pad_to(g, padded)
  out, final = _attention(static, *(pad_to(x, padded) for x in (q, k, v)), g, state)
  return out[:, :t].astype(out_dtype), final


def _chunked(q, k, v, g, state, *, scale, chunk_size=128):
  """The same forward pass without its own gradients, all chunks at once: what autodiff is given."""
  t, heads = q.shape[1], state.shape[1]
  static = _Static.choose(q, k, v, t, heads, scale, chunk_size, None)
  chunks = -(-t // static.chunk)
  static = dataclasses.replace(static, chunks=chunks)
  q, k, v, g = (None if x is None else pad_to(x, static.step) for x in (q, k, v, g))
  out, final = _step(static, state, *_take(static, 0, q, k, v, g))
  return _join(out).astype(q.dtype)[:, :t], final


def _one_token(q, k, v, g, state, scale):
  """Decoding: one pass over the state."""
  heads, dtype = state.shape[1], state.dtype
  q_t, k_t, v_t = (repeat_heads(x[:, 0], heads).astype(dtype) for x in (q, k, v))
  if g is not None:
    decay = repeat_heads(jnp.exp(g[:, 0]), heads).reshape(*state.shape[:2], -1, 1)
    state = decay * state
  state = state + k_t[..., :, None] * v_t[..., None, :]
  out = jnp.sum((scale * q_t)[..., :, None] * state, axis=-2)
  return out[:, None].astype(q.dtype), state


@dataclasses.dataclass(frozen=True)
class _Static:
  """Sizes and types of a call. ``chunk``: C; ``chunks``: of a step."""

  heads: int
  scale: float
  chunk: int
  chunks: int
  dtype: jnp.dtype
  precision: jax.lax.Precision

  @property
  def step(self) -> int:
    return self.chunk * self.chunks

  @classmethod
  def choose(cls, q, k, v, t, heads, scale, chunk_size, config: XLAConfig | None) -> _Static:
    """C = 128 on TPUs and 64 elsewhere; a step of 8 chunks, on CPUs of one (caches are small)."""
    platform = current_target().platform
    chunk = min(chunk_size or (128 if platform == "tpu" else 64), power_of_two(t))
    config = config or XLAConfig(chunks_per_step=1 if platform == "cpu" else 8)
    dtype = jnp.result_type(q, k, v)
    if platform == "cpu":  # where products of 16-bit floats are slow
      dtype = jnp.promote_types(dtype, jnp.float32)
    wide = jnp.dtype(dtype).itemsize >= 4
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    chunks = min(config.chunks_per_step, -(-t // chunk))
    return cls(heads, scale, chunk, chunks, jnp.dtype(dtype), precision)

  @property
  def products(self) -> Products:
    wide = jnp.promote_types(self.dtype, jnp.float32)
    return Products(operand=self.dtype, precision=self.precision, accumulate=wide)

  def product(self, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product on the matrix unit: operands in ``dtype``, sums in the accumulator's."""
    return jnp.einsum(
      subscripts,
      a.astype(self.dtype),
      b.astype(self.dtype),
      precision=self.precision,
      preferred_element_type=jnp.promote_types(self.dtype, jnp.float32),
    )


class _Pairs(NamedTuple):
  """Within chunks: scores A ``[B,N,m,C,C]`` and the decays that carry state in and out.

  ``before``: exp(G); ``after``: exp(G_C - G); both ``[B,heads,m,C,H|1]``. ``forget``: exp(G_C)
  ``[B,N,m,H|1,1]``. ``decay``: what scores are multiplied by, or a ``ChannelDecay``.
  """

  scores: jax.Array
  before: jax.Array
  after: jax.Array
  forget: jax.Array
  decay: Any


def _pairs(static: _Static, q, k, g) -> _Pairs:
  n = static.heads
  both = max(q.shape[1], k.shape[1])
  if both % q.shape[1] or both % k.shape[1]:
    both = n
  if g is not None and g.ndim == 5:
    decay = _tiles(channel_decay)(repeat_heads(g, n))
    q, k = repeat_heads(q, n).astype(g.dtype), repeat_heads(k, n).astype(g.dtype)
    dot = static.products
    scores = static.scale * _tiles(lambda d, a, b: d.scores(a, b, dot, diagonal=True))(decay, q, k)
    before, after, forget = decay.enter, decay.leave, jnp.swapaxes(decay.total, -1, -2)
  else:
    if g is None:
      g = jnp.zeros((1, 1, 1, static.chunk), jnp.promote_types(static.dtype, jnp.float32))
    decay = static.scale * jnp.exp(between(g))
    products = static.product("bnmch,bnmsh->bnmcs", repeat_heads(q, both), repeat_heads(k, both))
    scores = repeat_heads(products, n) * repeat_heads(decay, n)
    before, after = jnp.exp(prefix(g))[..., None], jnp.exp(suffix(g))[..., None]
    forget = before[..., -1:, :]
  return _Pairs(scores, before, after, repeat_heads(forget, n), decay)


def _tiles(f):
  """``f`` of tiles ``[C,..]``, on ``[B,N,m,C,..]``."""
  return jax.vmap(jax.vmap(jax.vmap(f)))


def _states(static: _Static, state, pairs: _Pairs, k, v):
  """States before each chunk ``[B,N,m,H,Hv]`` and after the last."""
  n = static.heads
  # Decay goes on k before it is rounded; on both sides heads are only repeated where they differ.
  k_after = repeat_heads(k, n) * repeat_heads(pairs.after, n)
  update = static.product("bnmch,bnmcv->bnmhv", k_after, repeat_heads(v, n))
  if static.chunks == 1:
    return state[:, :, None], pairs.forget[:, :, 0] * state + update[:, :, 0]

  def carry(s, chunk):
    forget, u = chunk
    return forget * s + u, s

  shape = (*update.shape[:3], *pairs.forget.shape[3:])
  forget = jnp.broadcast_to(pairs.forget, shape)
  final, states = jax.lax.scan(
    carry, state, (jnp.moveaxis(forget, 2, 0), jnp.moveaxis(update, 2, 0))
  )
  return jnp.moveaxis(states, 0, 2), final


def _step(static: _Static, state, q, k, v, g):
  """Outputs ``[B,N,m,C,Hv]`` of a step's chunks and the state after them."""
  n = static.heads
  pairs = _pairs(static, q, k, g)
  states, final = _states(static, state, pairs, k, v)
  q_before = static.scale * repeat_heads(q, n) * repeat_heads(pairs.before, n)
  out = static.product("bnmcs,bnmsv->bnmcv", pairs.scores, repeat_heads(v, n))
  return out + static.product("bnmch,bnmhv->bnmcv", q_before, states), final


def _step_backward(static: _Static, d_final, state, q, k, v, g, d_out):
  """Gradients of a step: of the state before it, and ``(dq, dk, dv, dg)``."""
  n, product = static.heads, static.product
  kv_heads = k.shape[1], v.shape[1], q.shape[1]
  pairs = _pairs(static, q, k, g)
  states, _ = _states(static, state, pairs, k, v)
  q, k, v = (repeat_heads(x, n) for x in (q, k, v))
  before, after = repeat_heads(static.scale * pairs.before, n), repeat_heads(pairs.after, n)

  # Gradients of the state after each chunk, from the last chunk to the first.
  d_read = product("bnmch,bnmcv->bnmhv", q * before, d_out)
  if static.chunks == 1:
    d_states, d_state = d_final[:, :, None], pairs.forget[:, :, 0] * d_final + d_read[:, :, 0]
  else:
    shape = (*d_read.shape[:3], *pairs.forget.shape[3:])
    forget = jnp.moveaxis(jnp.broadcast_to(pairs.forget, shape), 2, 0)
    d_state, d_states = jax.lax.scan(
      lambda d, chunk: (chunk[0] * d + chunk[1], d),
      d_final,
      (forget, jnp.moveaxis(d_read, 2, 0)),
      reverse=True,
    )
    d_states = jnp.moveaxis(d_states, 0, 2)

  lower = jnp.tril(jnp.ones((static.chunk, static.chunk), bool))
  d_scores = jnp.where(lower, product("bnmcv,bnmsv->bnmcs", d_out, v), 0)
  dq_state = before * product("bnmcv,bnmhv->bnmch", d_out, states)
  dk_state = after * product("bnmcv,bnmhv->bnmch", v, d_states)
  dv = product("bnmcs,bnmcv->bnmsv", pairs.scores, d_out)
  dv = dv + product("bnmch,bnmhv->bnmcv", k * after, d_states)
  dg = None
  if isinstance(pairs.decay, ChannelDecay):
    wide, dot = pairs.scores.dtype, static.products
    q, k = q.astype(wide), k.astype(wide)
    strict = static.scale * jnp.tril(d_scores, -1)
    dq = _tiles(lambda d, x, a: d.read(x, a, dot))(pairs.decay, strict, k)
    dk = _tiles(lambda d, x, a: d.write(x, a, dot))(pairs.decay, strict, q)
    dg = reverse_cumsum(q * (dq + dq_state) - k * dk, axis=-2)
    dg = dg + exclusive_cumsum(k * dk_state, axis=-2)
    through = pairs.forget[..., 0] * jnp.sum(states * d_states, axis=-1)  # [B,N,m,H]
    dg = dg + through[..., None, :]
    diagonal = static.scale * jnp.diagonal(d_scores, axis1=-2, axis2=-1)[..., None]
    dq, dk = dq + diagonal * k + dq_state, dk + diagonal * q + dk_state
  else:
    d_products = d_scores * repeat_heads(pairs.decay, n)
    dq = product("bnmcs,bnmsh->bnmch", d_products, k) + dq_state
    dk = product("bnmcs,bnmch->bnmsh", d_products, q) + dk_state
    if g is not None:
      dg = crossing(d_scores * pairs.scores)
      dg = dg + reverse_cumsum(jnp.sum(q * dq_state, axis=-1))
      dg = dg + exclusive_cumsum(jnp.sum(k * dk_state, axis=-1))
      dg = dg + pairs.forget[..., 0] * jnp.sum(states * d_states, axis=(-2, -1))[..., None]
  dk, dv, dq = (sum_heads(x, heads) for x, heads in zip((dk, dv, dq), kv_heads))
  return d_state, (dq, dk, dv, None if g is None else sum_heads(dg, g.shape[1]))


def _take(static: _Static, index, *arrays):
  """Step ``index`` of each ``[B,T,heads,..]`` as ``[B,heads,m,C,..]``."""

  def take(x):
    if x is None:
      return None
    if x.shape[1] != static.step:
      x = jax.lax.dynamic_slice_in_dim(x, index * static.step, static.step, axis=1)
    x = x.reshape(x.shape[0], static.chunks, static.chunk, *x.shape[2:])
    return jnp.moveaxis(x, 3, 1)

  return [take(x) for x in arrays]


def _join(x: jax.Array) -> jax.Array:
  """``[B,heads,m,C,..] -> [B,m*C,heads,..]``."""
  x = jnp.moveaxis(x, 1, 3)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _whole(x: jax.Array) -> jax.Array:
  """Stacked outputs of the steps, ``[steps,B,m*C,..] -> [B,T,..]``."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, g, state):
  return _attention_forward(static, q, k, v, g, state)[0]


def _attention_forward(static: _Static, q, k, v, g, state):
  def step(s, index):
    out, after = _step(static, s, *_take(static, index, q, k, v, g))
    return after, (_join(out).astype(q.dtype), s)

  final, (out, states) = jax.lax.scan(step, state, jnp.arange(q.shape[1] // static.step))
  return (_whole(out), final), (q, k, v, g, states)


def _attention_backward(static: _Static, saved, cotangents):
  q, k, v, g, states = saved
  d_out, d_final = cotangents

  def step(d_after, x):
    index, before = x
    inputs = _take(static, index, q, k, v, g, d_out)
    d_before, gradients = _step_backward(static, d_after, before, *inputs)
    gradients = (
      _join(d).astype(like.dtype) for d, like in zip(gradients, (q, k, v, g)) if d is not None
    )
    return d_before, tuple(gradients)

  steps = jnp.arange(len(states))
  d_state, gradients = jax.lax.scan(step, d_final, (steps, states), reverse=True)
  dq, dk, dv, *dg = map(_whole, gradients)
  return dq, dk, dv, dg[0] if dg else None, d_state


_attention.defvjp(_attention_forward, _attention_backward)
