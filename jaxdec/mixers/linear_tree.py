# SPDX-License-Identifier: Apache-2.0
"""Draft trees through linear attention with decay: outputs of all nodes, and the commit.

Per head, with log-decay ``g_t <= 0``, a number or one per row of the state ``S [H,V]``
(``pallas_kernels.linear_attention``):

  S_t = exp(g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

Query heads may outnumber key/value heads (N = G K): the state, the keys, the values and the decays
are per kv head. Everything is computed in float32 (float64 if given float64), whatever the inputs.
Sums of log-decays are formed in two parts, see ``pallas_kernels.numerics``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdec.mixers.base import Topology
from pallas_kernels.numerics import MASKED, accumulator, coarse_fine, log_decays


def tree_linear_attention(
  q: Float[Array, "B M N H"],
  k: Float[Array, "B M K H"],
  v: Float[Array, "B M K V"],
  log_decay: Float[Array, "B M K"] | Float[Array, "B M K H"] | None,
  state: Float[Array, "B K H V"],
  topology: Topology,
  *,
  scale: float | None = None,
) -> Float[Array, "B M N V"]:
  """Outputs of all nodes of a draft tree at once, each as if its root-to-node path ran alone.

  Sums over time become sums over ancestors: with ``s_i`` the log-decay summed over node i and its
  ancestors, and ``A`` the ancestor-or-self relation,

    o_i = exp(s_i) q_i S_0 + sum_j A_ij exp(s_i - s_j) (q_i k_j) v_j

  Every exponent used is <= 0, because j lies on the path to i. No state per branch is materialised:
  M^2 (H + V) operations a head in place of M H V. With a decay per key channel (GLA, arXiv
  2312.06635, eq. 3) the exponentials join the sum over channels in ``q_i k_j``; factoring them
  into one on q and one on k would overflow, so M^2 H of them are formed a kv head.

  Source: STree (arXiv 2505.14969), section 3, for scalar-decay models.
  """
  b, m, kv_heads, h = k.shape
  dtype = accumulator(q)
  scale = h**-0.5 if scale is None else scale
  out_dtype, q = q.dtype, (scale * q.astype(dtype)).reshape(b, m, kv_heads, -1, h)
  k, v, state = k.astype(dtype), v.astype(dtype), state.astype(dtype)
  scores, inter = path_products(q, k, log_decay, state, topology.ancestors)
  out = jnp.einsum("bkgij,bjkv->bikgv", scores, v) + inter
  return out.reshape(b, m, -1, v.shape[-1]).astype(out_dtype)


def path_products(
  q: Float[Array, "B M K G H"],
  k: Float[Array, "B M K H"],
  log_decay: Float[Array, "B M K"] | Float[Array, "B M K H"] | None,
  state: Float[Array, "B K H V"],
  ancestors: Bool[Array, "B M M"],
  *,
  precision: jax.lax.Precision | None = None,
) -> tuple[Float[Array, "B K G M M"], Float[Array, "B M K G V"]]:
  """What queries meet on their paths: ``A_ij exp(s_i - s_j) (q_i k_j)`` and ``exp(s_i) q_i S_0``.

  All of one accumulator type; see ``tree_linear_attention``.
  """
  b, m, kv_heads, _ = k.shape
  if log_decay is not None and log_decay.ndim == 4:
    exponent, total = _path_decays(log_decay, ancestors)
    kept = jnp.exp(jnp.where(ancestors[..., None, None], exponent, MASKED))
    scores = jnp.einsum("bikgh,bijkh->bkgij", q, k[:, None] * kept, precision=precision)
    q = q * jnp.exp(total)[:, :, :, None]
    return scores, jnp.einsum("bikgh,bkhv->bikgv", q, state, precision=precision)
  scores = jnp.einsum("bikgh,bjkh->bkgij", q, k, precision=precision)
  inter = jnp.einsum("bikgh,bkhv->bikgv", q, state, precision=precision)
  if log_decay is None:
    keep = jnp.broadcast_to(ancestors[:, None, None], scores.shape)
    scores = jnp.where(keep, scores, 0.0)
  else:
    parts = [
      # HIGHEST: a bfloat16 matrix unit must not round the sums of log-decays.
      jnp.einsum("bij,bjk->bki", ancestors.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)
      for x in coarse_fine(log_decays(log_decay, None, (b, m, kv_heads)))
    ]
    exponent = sum(x[..., :, None] - x[..., None, :] for x in parts)
    keep = jnp.broadcast_to(ancestors[:, None], exponent.shape)
    scores = scores * jnp.exp(jnp.where(keep, exponent, MASKED))[:, :, None]
    inter = inter * jnp.exp(jnp.moveaxis(sum(parts), 1, 2))[..., None, None]
  return scores, inter


def _path_decays(log_decay, ancestors):
  """``s_i - s_j [B,M,M,K,H]`` and ``s_i [B,M,K,H]`` of channel decays, see above."""
  parts = [
    jnp.einsum("bij,bjkh->bikh", ancestors.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)
    for x in coarse_fine(log_decays(log_decay, None, log_decay.shape))
  ]
  return sum(x[:, :, None] - x[:, None] for x in parts), sum(parts)


def update_state(
  state: Float[Array, "B K H V"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  *,
  log_decay: Float[Array, "B T K"] | Float[Array, "B T K H"] | None = None,
  valid: Bool[Array, "B T"],
) -> Float[Array, "B K H V"]:
  """The state after T more tokens, in one masked sum (the commit of a few accepted nodes).

  S <- exp(G_T) S + sum_t exp(G_T - G_t) k_t^T v_t, over the tokens that are ``valid``.
  """
  k, v, g = leave_out(k, v, log_decay, valid)
  k, v = k.astype(state.dtype), v.astype(state.dtype)
  if g is None:
    return state + jnp.einsum("btkh,btkv->bkhv", k, v)
  g = g if g.ndim == k.ndim else g[..., None]
  parts = coarse_fine(log_decays(g, None, g.shape))
  # What comes after a token is summed by itself: total minus prefix loses the small decays.
  after = sum(jax.lax.cumsum(_shifted(x), axis=1, reverse=True) for x in parts)
  update = jnp.einsum("btkh,btkv->bkhv", k * jnp.exp(after), v)
  total = sum(jnp.sum(x, axis=1) for x in parts)
  return jnp.exp(total)[..., None] * state + update


def leave_out(k, v, log_decay, valid):
  """Keys, values and log-decays ``[B,T,K,..]`` whose invalid tokens leave the state unchanged."""
  here = valid[:, :, None]
  k, v = (jnp.where(here[..., None], x, 0) for x in (k, v))
  if log_decay is not None:
    here = here if log_decay.ndim == 3 else here[..., None]
    log_decay = jnp.where(here, log_decay, 0)
  return k, v, log_decay


def _shifted(x):
  return jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
