# SPDX-License-Identifier: Apache-2.0
"""The delta rule on one rank: its map, its outputs, and one backward pass for both.

The map comes from the op with values ``[v|0]`` and the state ``[0|I]``: its final state is
``[U|M]``, its outputs are ``[out|Q]`` with Q the queries as a state before the shard meets them.
Two calls, so that the exchange waits for the first (without outputs), and the second does not wait
for the exchange. Gradients of either call would cost a backward pass of the op over H + Hv columns.
Both together are one over Hv columns: of the op from the state S that entered, for the gradient of
the outputs and the gradient E of the state that leaves. It begins when E has arrived, and
recomputes states meanwhile. So ``read`` hands S and the outputs' gradient to the backward pass of
``summarise``, as cotangents of arrays of zeros.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import delta_rule
from pallas_kernels.manual import vary, varying
from pallas_kernels.numerics import accumulator


class Options(NamedTuple):
  """What is static. ``heads``: N, which beta and log_decay have."""

  heads: int
  scale: float
  chunk_size: int | None


class Arrays(NamedTuple):
  """One rank's tokens; see ``pallas_kernels.delta_rule``."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  beta: jax.Array
  log_decay: jax.Array | None
  segment_ids: jax.Array | None


class Link(NamedTuple):
  """Zeros, of which cotangents are made: the outputs' gradient, S, and how often S was added."""

  out: jax.Array  # [B,L,N,Hv]
  state: jax.Array  # [B,N,H,Hv]
  times: jax.Array


def _op(options: Options, x: Arrays, state: jax.Array):
  return delta_rule(
    x.q, x.k, x.v, x.beta,
    log_decay=x.log_decay, initial_state=state, segment_ids=x.segment_ids,
    scale=options.scale, chunk_size=options.chunk_size,
  )  # fmt: skip


def _with_map(options: Options, x: Arrays):
  """``[out|Q]`` and ``[U|M]``."""
  b, _, _, h = x.q.shape
  zeros = jnp.zeros((*x.v.shape[:3], h), x.v.dtype)
  start = jnp.concatenate([jnp.zeros((h, x.v.shape[-1])), jnp.eye(h)], axis=1)
  start = jnp.broadcast_to(start.astype(accumulator(x.q)), (b, options.heads, *start.shape))
  return _op(options, x._replace(v=jnp.concatenate([x.v, zeros], axis=-1)), start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summarise(options: Options, x: Arrays) -> tuple[jax.Array, jax.Array, Link]:
  """U ``[B,N,H,Hv]``, M ``[B,N,H,H]`` and what ``read`` needs."""
  return _summarise_forward(options, x)[0]


def _summarise_forward(options: Options, x: Arrays):
  # Outputs are nobody's: k in the place of q leaves them to be removed.
  _, final = _with_map(options, x._replace(q=x.k))
  update, dense = jnp.split(final, [x.v.shape[-1]], axis=-1)
  shape = (*x.q.shape[:2], *update.shape[1::2])
  zeros = functools.partial(jnp.zeros, dtype=update.dtype)
  link = Link(zeros(shape), zeros(update.shape), zeros(()))
  return (update, dense, vary(link, varying(update))), x


def _summarise_backward(options: Options, x: Arrays, cotangents):
  leaving, _, link = cotangents  # the gradient of M is that of the op from S
  state, static = link.state / jnp.maximum(link.times, 1), x.segment_ids

  def whole(x, state):
    return _op(options, x._replace(segment_ids=static), state)

  (out, _), back = jax.vjp(whole, x._replace(segment_ids=None), state)
  gradients, _ = back((link.out.astype(out.dtype), leaving))
  return (gradients,)


summarise.defvjp(_summarise_forward, _summarise_backward)


def outputs(options: Options, x: Arrays) -> tuple[jax.Array, jax.Array]:
  """Outputs of a start from zero ``[B,L,N,Hv]``, and scaled Q ``[B,L,N,H]``; not differentiable."""
  both, _ = _with_map(options, lax.stop_gradient(x))
  return tuple(jnp.split(both, [x.v.shape[-1]], axis=-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def read(product: Any, out, queries, state, link: Link) -> jax.Array:
  """``out + Q S``. ``product``: of queries and states."""
  return out + product(queries, state)


def _read_forward(product, out, queries, state, link):
  return out + product(queries, state), (queries, state)


def _read_backward(product, saved, d_out):
  queries, state = saved
  (d_state,) = jax.linear_transpose(lambda s: product(queries, s), state)(d_out)
  return None, None, d_state, Link(d_out, state, _one(state))


read.defvjp(_read_forward, _read_backward)


@jax.custom_vjp
def passed(final, state, link: Link) -> jax.Array:
  """``final`` as it is: its gradient alone, without outputs', needs S too."""
  return final


passed.defvjp(
  lambda final, state, link: (final, state),
  lambda state, d_final: (d_final, None, Link(None, state, _one(state))),
)


def _one(like: jax.Array) -> jax.Array:
  return vary(jnp.ones((), like.dtype), varying(like))
