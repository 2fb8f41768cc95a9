# SPDX-License-Identifier: Apache-2.0
"""The selective scan by definition: one token after another."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._numerics import accumulator


def selective_scan(
  x, dt, A, B, C, D, z, initial_state, starts, *, chunk_size=None, config=None
):  # fmt: skip
  """See the public function; ``starts`` bool ``[B,T]``: forgets the state before the token."""
  wide = accumulator(x)
  batch, length, channels = x.shape
  if initial_state is None:
    initial_state = jnp.zeros((batch, channels, A.shape[1]), wide)
  if starts is None:
    starts = jnp.zeros((batch, length), bool)
  u, dt, A, B, C = (y.astype(wide) for y in (x, dt, A, B, C))

  def token(h, inputs):  # h [B,D,S]
    u, dt, B, C, start = inputs
    h = jnp.where(start[:, None, None], 0.0, h)
    h = jnp.exp(dt[:, :, None] * A) * h + (dt * u)[:, :, None] * B[:, None, :]
    return h, jnp.einsum("bds,bs->bd", h, C, precision="highest")

  first = lambda y: jnp.moveaxis(y, 1, 0)  # noqa: E731
  state, y = jax.lax.scan(
    token, initial_state.astype(wide), tuple(map(first, (u, dt, B, C, starts)))
  )
  y = first(y)
  if D is not None:
    y = y + D.astype(wide) * u
  if z is not None:
    y = y * jax.nn.silu(z.astype(wide))
  return y.astype(x.dtype), state
