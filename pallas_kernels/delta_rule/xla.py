# SPDX-License-Identifier: Apache-2.0
"""Delta rule in plain XLA: chunks in WY form, a scan over groups of chunks, explicit gradients.

A group's state-independent part is one batch of matrix products; only two products a chunk wait
for the state. Saved for the backward pass: the inputs and the state before every group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import (
  Products,
  channel_decay,
  prefixes,
  scalar_decay,
  sum_before,
  sum_from,
)
from pallas_kernels._numerics import accumulator
from pallas_kernels._tpu import precision
from pallas_kernels.delta_rule import XLAConfig, _chunk
from pallas_kernels.delta_rule._inverse import doubling
from pallas_kernels.manual import vary, varying


class _Plan(NamedTuple):
  """What is static: sizes, and how products are computed."""

  heads: int
  chunk: int
  group: int
  scale: float
  dot: Products
  exact: Products  # for the inverse


def delta_rule(q, k, v, beta, log_decay, state, *, scale, chunk_size=None, config=None):
  """See ``pallas_kernels.delta_rule.delta_rule``; log_decay ``[B,T,N]`` or ``[B,T,N,H]``."""
  if q.shape[1] == 1:
    return _step(q, k, v, beta, log_decay, state, scale)
  args, plan, length = _plan(q, k, v, beta, log_decay, state, scale, chunk_size, config)
  out, state = _chunked(plan, *args)
  return out[:, :length], state


def _plan(q, k, v, beta, log_decay, state, scale, chunk_size, config):
  """Pads T to whole groups; a token of zeros leaves the state as it is."""
  length = q.shape[1]
  chunk = chunk_size or min(64, max(8, 1 << (length - 1).bit_length()))
  chunks = -(-length // chunk)
  groups = -(-chunks // (config or XLAConfig()).group)
  group = -(-chunks // groups)
  dtype = jnp.promote_types(accumulator(q), state.dtype)
  wide = q.dtype.itemsize >= 4
  # float32 operands at default precision are one bfloat16 pass on a TPU, exact on a CPU
  dot = Products(precision=precision(q.dtype), accumulate=dtype)
  exact = Products(precision=jax.lax.Precision("highest" if wide else "high"), accumulate=dtype)
  more = groups * group * chunk - length
  tokens = tuple(
    jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2)) if more else x
    for x in (q, k, v, beta, log_decay)
  )
  plan = _Plan(beta.shape[2], chunk, group, scale, dot, exact)
  return (*tokens, state.astype(dtype)), plan, length


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan, q, k, v, beta, g, state):
  out, state, _ = _forward(plan, (q, k, v, beta, g), state, save=False)
  return out, state


def _chunked_forward(plan, q, k, v, beta, g, state):
  inputs = (q, k, v, beta, g)
  out, last, starts = _forward(plan, inputs, state, save=True)
  return (out, last), (inputs, starts)


def _chunked_backward(plan, saved, cotangents):
  inputs, starts = saved
  d_out, d_state = cotangents
  return _backward(plan, inputs, starts, d_out, d_state)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _forward(plan, inputs, state, save):
  q, _, v = inputs[:3]
  tokens = plan.group * plan.chunk
  out = vary(jnp.zeros((*q.shape[:2], plan.heads, v.shape[3]), q.dtype), varying(state))

  def body(carry, index):
    state, out = carry
    # a slice of the arrays as they come: nothing is transposed or repeated as a whole
    pieces = [jax.lax.dynamic_slice_in_dim(x, index * tokens, tokens, 1) for x in inputs]
    piece, last = _group(plan, pieces, state)
    out = jax.lax.dynamic_update_slice_in_dim(out, piece.astype(out.dtype), index * tokens, 1)
    return (last, out), state if save else None

  groups = jnp.arange(q.shape[1] // tokens)
  (state, out), starts = jax.lax.scan(body, (state, out), groups)
  return out, state, starts


def _group(plan, pieces, state):
  """Outputs and last state of a group of chunks."""
  _, prepared = _prepare(plan, pieces)
  last, (states, writes) = _walk(plan, prepared, state)
  out = _each(3, _chunk.read, plan.dot)(prepared, states, writes)
  return plan.scale * _tokens(out, plan.heads), last


def _backward(plan, inputs, starts, d_out, d_state):
  tokens = plan.group * plan.chunk
  grads = tuple(jnp.zeros_like(x) for x in inputs)

  def body(carry, xs):
    d_state, grads = carry
    index, state = xs
    pieces = [jax.lax.dynamic_slice_in_dim(x, index * tokens, tokens, 1) for x in inputs]
    d_piece = jax.lax.dynamic_slice_in_dim(d_out, index * tokens, tokens, 1)
    d_state, new = _group_gradients(plan, pieces, state, d_piece, d_state)
    grads = tuple(
      jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), index * tokens, 1)
      for x, y in zip(grads, new)
    )
    return (d_state, grads), None

  groups = jnp.arange(starts.shape[0])
  (d_state, grads), _ = jax.lax.scan(body, (d_state, grads), (groups, starts), reverse=True)
  return (*grads, d_state)


def _group_gradients(plan, pieces, state, d_out, d_state):
  """Gradients of a group's state and inputs; its states and writes are recomputed."""
  chunks, prepared = _prepare(plan, pieces)
  _, (states, writes) = _walk(plan, prepared, state)
  d_out = plan.scale * _tiles(plan, d_out)

  def back(d_state, xs):
    prepared, d_out = xs
    d_right, before = _each(2, _chunk.retreat, plan.dot)(prepared, d_out, d_state)
    return before, (d_right, d_state)

  d_state, (d_right, d_states) = jax.lax.scan(back, d_state, (prepared, d_out), reverse=True)
  *grads, later, earlier = _each(3, _chunk.gradients, plan.dot)(
    chunks, states, writes, d_out, d_right, d_states
  )
  grads.append(_each(3, lambda x, y: sum_from(x) + sum_before(y))(later, earlier))
  new = [_tokens(x, p.shape[2]) for x, p in zip(grads, pieces)]
  return d_state, [x.reshape(p.shape) for x, p in zip(new, pieces)]


def _prepare(plan, pieces):
  """Tiles of a group and its state-independent part, all ``[m,B,N,...]``."""
  q, k, v, beta, g = (_tiles(plan, x if x.ndim == 4 else x[..., None]) for x in pieces)
  decay = _each(3, _decay)(g) if pieces[4].ndim == 3 else _each(3, channel_decay)(g)
  chunks = _chunk.Tiles(q, k, v, beta, decay)

  def invert(systems):
    return [doubling(a, plan.exact) for a in systems]

  return chunks, _each(3, lambda c: _chunk.prepare([c], plan.dot, invert)[0])(chunks)


def _walk(plan, prepared, state):
  """The states before each chunk, and each chunk's writes."""

  def body(state, prepared):
    writes, after = _each(2, _chunk.advance, plan.dot)(prepared, state)
    return after, (state, writes)

  return jax.lax.scan(body, state, prepared)


def _decay(g):
  coarse, fine = prefixes(g.T)
  return scalar_decay(coarse.T, fine.T, coarse, fine)


def _each(axes, f, *last):
  """``f(..., *last)`` over that many leading axes."""
  g = lambda *xs: f(*xs, *last)  # noqa: E731
  for _ in range(axes):
    g = jax.vmap(g)
  return g


def _tiles(plan, x):
  """``[B,mC,K,W] -> [m,B,N,C,W]``: heads repeated, for these few tokens."""
  b, _, heads, width = x.shape
  x = x.astype(plan.dot.accumulate).reshape(b, plan.group, plan.chunk, heads, width)
  return jnp.repeat(x.transpose(1, 0, 3, 2, 4), plan.heads // heads, axis=2)


def _tokens(x, heads):
  """``[m,B,N,C,W] -> [B,mC,K,W]``, summed over the heads that share one of the K."""
  m, b, n, c, width = x.shape
  x = x.reshape(m, b, heads, n // heads, c, width).sum(3)
  return x.transpose(1, 0, 3, 2, 4).reshape(b, m * c, heads, width)


def _step(q, k, v, beta, log_decay, state, scale):
  """One token: what q and k read of the decayed state in one pass, then one pass to update it."""
  dtype = jnp.promote_types(accumulator(q), state.dtype)
  n = beta.shape[2]
  q, k, v = (jnp.repeat(x[:, 0].astype(dtype), n // x.shape[2], axis=1) for x in (q, k, v))
  beta = beta[:, 0, :, None].astype(dtype)
  g = log_decay[:, 0] if log_decay.ndim == 4 else log_decay[:, 0, :, None]
  decay = jnp.exp(g)[..., None].astype(dtype)  # [B,N,H or 1,1]
  # the decayed state is formed in both passes and stored in neither
  of_q, of_k = (jnp.sum((x[..., None] * decay) * state, axis=2) for x in (q, k))  # [B,N,Hv]
  write = beta * (v - of_k)
  out = scale * (of_q + jnp.sum(q * k, axis=-1, keepdims=True) * write)
  return out[:, None].astype(q.dtype), decay * state + k[..., None] * write[:, :, None]


def _autodiff(q, k, v, beta, log_decay, state, *, scale, chunk_size=None):
  """The same chunks scanned one by one and left to autodiff: what the gradients above save."""
  args, plan, length = _plan(q, k, v, beta, log_decay, state, scale, chunk_size, XLAConfig(group=1))

  def body(state, pieces):
    out, state = _group(plan, pieces, state)
    return state, out

  def stacked(x):
    return jnp.moveaxis(x.reshape(x.shape[0], -1, plan.chunk, *x.shape[2:]), 1, 0)

  state, out = jax.lax.scan(body, args[-1], [stacked(x) for x in args[:-1]])
  out = jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *out.shape[3:])
  return out[:, :length].astype(q.dtype), state
