# SPDX-License-Identifier: Apache-2.0
"""The definition: one token after another, float32 (float64 for float64 inputs), autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._numerics import accumulator


def delta_rule(q, k, v, beta, log_decay, state, *, scale, chunk_size=None, config=None):
  """See ``pallas_kernels.delta_rule.delta_rule``; log_decay ``[B,T,N]`` or ``[B,T,N,H]``."""
  del chunk_size, config
  dtype = jnp.promote_types(accumulator(q), state.dtype)
  n = beta.shape[2]

  def per_head(x):  # [B,T,K,W] -> [T,B,N,W]
    return jnp.moveaxis(jnp.repeat(x.astype(dtype), n // x.shape[2], axis=2), 1, 0)

  def token(state, inputs):
    q, k, v, beta, g = inputs  # [B,N,H], [B,N,H], [B,N,Hv], [B,N,1], [B,N,1 or H]
    state = jnp.exp(g)[..., None] * state
    old = jnp.einsum("bnh,bnhv->bnv", k, state, precision="highest")
    state = state + jnp.einsum("bnh,bnv->bnhv", k, beta * (v - old), precision="highest")
    return state, scale * jnp.einsum("bnh,bnhv->bnv", q, state, precision="highest")

  if log_decay.ndim == 3:
    log_decay = log_decay[..., None]
  inputs = (per_head(q), per_head(k), per_head(v), per_head(beta[..., None]), per_head(log_decay))
  state, out = jax.lax.scan(token, state.astype(dtype), inputs)
  return jnp.moveaxis(out, 0, 1).astype(q.dtype), state
