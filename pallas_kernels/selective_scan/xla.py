# SPDX-License-Identifier: Apache-2.0
"""The selective scan in plain XLA: chunk by chunk, with its own backward pass.

Only the states at chunk starts are kept; the backward pass recomputes a chunk's decays at once and
then its states, and its own recurrence is the same scan over the reversed chunk. No array holds
more states than one chunk's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import current_target
from pallas_kernels._numerics import accumulator
from pallas_kernels.manual import vary, varying
from pallas_kernels.selective_scan._common import XLAConfig, finish


def heuristic(platform: str, batch: int, channels: int, states: int) -> int:
  """Tokens in a chunk: on a CPU what a cache holds (4 MB of states), elsewhere 256."""
  if platform != "cpu":
    return 256
  fits = max(1, 2**20 // max(1, batch * channels * states))
  return min(64, max(8, 1 << (fits.bit_length() - 1)))


def selective_scan(
  x, dt, A, B, C, D, z, initial_state, starts, *, chunk_size=None, config=None
):  # fmt: skip
  """See the public function; ``starts`` bool ``[B,T]``: forgets the state before the token."""
  wide = accumulator(x)
  batch, length, channels = x.shape
  states = A.shape[1]
  platform = current_target().platform
  associative = (config or XLAConfig()).associative
  if associative is None:
    associative = platform != "cpu"
  chunk = min(chunk_size or heuristic(platform, batch, channels, states), length)
  if initial_state is None:
    initial_state = vary(jnp.zeros((batch, channels, states), wide), varying(x))
  count = -(-length // chunk)

  def chunks(y):  # [B,T,..] -> [chunks,C,B,..]; a padded token has dt = 0 and changes nothing
    y = jnp.pad(y, ((0, 0), (0, count * chunk - length), *[(0, 0)] * (y.ndim - 2)))
    return jnp.moveaxis(y.reshape(batch, count, chunk, *y.shape[2:]), 0, 2)

  keep = None if starts is None else 1 - chunks(starts.astype(wide))
  y, state = scan_chunks(
    associative,
    *(chunks(y.astype(wide)) for y in (x, dt)),
    A.astype(wide),
    *(chunks(y.astype(wide)) for y in (B, C)),
    initial_state.astype(wide),
    keep,
  )
  y = jnp.moveaxis(y, 2, 0).reshape(batch, count * chunk, channels)[:, :length]
  return finish(y, x, D, z).astype(x.dtype), state


def recurrence(associative: bool, a, b, h):
  """All ``h_t = a_t h_{t-1} + b_t`` of a chunk, over the leading axis."""
  if associative:
    compose = lambda l, r: (r[0] * l[0], r[0] * l[1] + r[1])  # noqa: E731
    a, b = jax.lax.associative_scan(compose, (a, b))
    return a * h + b

  def step(h, ab):
    h = ab[0] * h + ab[1]
    return h, h

  return jax.lax.scan(step, h, (a, b))[1]


# Reductions as products: on a CPU they run several times as fast as sums of products.
_sum = functools.partial(jnp.einsum, precision="highest")


def _decays(dt, A, keep):
  a = jnp.exp(dt[..., None] * A)  # [C,B,D,S]
  return a if keep is None else a * keep[:, :, None, None]


def _states(associative, h, A, x, dt, B, keep):
  """Decays and states ``[C,B,D,S]`` of a chunk that begins in ``h [B,D,S]``."""
  a = _decays(dt, A, keep)
  return a, recurrence(associative, a, (dt * x)[..., None] * B[:, :, None], h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_chunks(associative, x, dt, A, B, C, h, keep):
  """``(y, final state)``: ``x, dt, y [chunks,C,B,D]``, ``A [D,S]``, ``B, C [chunks,C,B,S]``.

  ``h [B,D,S]``; ``keep [chunks,C,B]`` is 0 where the state is forgotten before the token, or None.
  """
  return _forward(associative, x, dt, A, B, C, h, keep)[0]


def _outputs(associative, h, A, x, dt, B, C, keep):
  """``(last state, y)`` of a chunk; the loop over tokens keeps no states."""
  if associative:
    _, states = _states(associative, h, A, x, dt, B, keep)
    return states[-1], _sum("cbds,cbs->cbd", states, C)

  def token(h, inputs):
    x, dt, B, C, keep = inputs
    if keep is not None:
      h = h * keep[:, None, None]
    h = jnp.exp(dt[..., None] * A) * h + (dt * x)[..., None] * B[:, None]
    return h, _sum("bds,bs->bd", h, C)

  return jax.lax.scan(token, h, (x, dt, B, C, keep))


def _forward(associative, x, dt, A, B, C, h, keep):
  def step(h, inputs):
    x, dt, B, C, keep = inputs
    last, y = _outputs(associative, h, A, x, dt, B, C, keep)
    return last, (y, h)

  state, (y, begins) = jax.lax.scan(step, h, (x, dt, B, C, keep))
  return (y, state), (x, dt, A, B, C, keep, begins)


def _backward(associative, saved, cotangents):
  """With ``g_t = C_t dy_t + a_{t+1} g_{t+1}`` and ``w_t = g_t a_t h_{t-1}``:

  ``dA = sum_t dt w``, ``d(dt) = sum_s w A + x s``, ``dx = dt s`` where ``s = sum_s g B``,
  ``dB = sum_d g dt x``, ``dC = sum_d dy h``.
  """
  x, dt, A, B, C, keep, begins = saved
  d_y, d_state = cotangents

  def step(carry, inputs):
    after, d_A = carry  # a_{t+1} g_{t+1} of the chunk's last token; sum so far
    x, dt, B, C, keep, h, d_y = inputs
    a, states = _states(associative, h, A, x, dt, B, keep)
    following = jnp.concatenate([jnp.ones_like(a[:1]), a[:0:-1]])  # a_{t+1}, reversed
    gains = (d_y[..., None] * C[:, :, None])[::-1]
    g = recurrence(associative, following, gains, after)[::-1]
    w = g * a * jnp.concatenate([h[None], states[:-1]])
    s = _sum("cbds,cbs->cbd", g, B)
    d_A = d_A + jnp.sum(w * dt[..., None], (0, 1))
    grads = (
      dt * s,
      _sum("cbds,s->cbd", w * A, jnp.ones_like(A[0])) + x * s,
      _sum("cbds,cbd->cbs", g, dt * x),
      _sum("cbds,cbd->cbs", states, d_y),
    )
    return (a[0] * g[0], d_A), grads

  carry = (d_state, jnp.zeros_like(A))
  inputs = (x, dt, B, C, keep, begins, d_y)
  (d_h, d_A), (d_x, d_dt, d_B, d_C) = jax.lax.scan(step, carry, inputs, reverse=True)
  return d_x, d_dt, d_A, d_B, d_C, d_h, None


scan_chunks.defvjp(_forward, _backward)
