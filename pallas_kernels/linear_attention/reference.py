# SPDX-License-Identifier: Apache-2.0
"""Linear attention token by token in float32: the definition of the op."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention._sequences import repeat_heads


def linear_attention(q, k, v, g, state, *, scale, chunk_size=None, config=None):
  """``S <- exp(g_t) S + k_t v_t^T; o_t = scale q_t S``.

  Args:
    q, k, v: ``[B,T,heads,H|Hv]``. g: None, ``[B,T,heads]`` or ``[B,T,heads,H]``, at least -100.
    state: ``[B,N,H,Hv]``.
  """
  del chunk_size, config
  heads, dtype = state.shape[1], state.dtype
  g = jnp.zeros((*q.shape[:2], 1), dtype) if g is None else g
  decay = jnp.exp(g if g.ndim == 4 else g[..., None])  # [B,T,heads,H|1]

  def step(s, token):
    q_t, k_t, v_t, decay_t = (repeat_heads(x, heads).astype(dtype) for x in token)  # [B,N,..]
    s = decay_t[..., None] * s + k_t[..., :, None] * v_t[..., None, :]
    o_t = scale * jnp.einsum("bnh,bnhv->bnv", q_t, s, precision=jax.lax.Precision.HIGHEST)
    return s, o_t

  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, decay))
  final, out = jax.lax.scan(step, state, tokens)
  return jnp.moveaxis(out, 0, 1).astype(q.dtype), final
