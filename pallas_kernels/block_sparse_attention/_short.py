# SPDX-License-Identifier: Apache-2.0
"""Attention under a static rule over short sequences: one block of queries at a time, unrolled.

Each block meets only the keys that the rule can show it, in one softmax, so the causal half and
what lies before a window are never computed. There are no lists and no loop whose length is data,
which at such lengths cost a CPU more than they save; the weights that autodiff keeps are small.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.reference import token_mask

_BLOCK = 128
LONGEST = 512  # queries or keys; longer ones gain from the general form in most shapes


def short_attention(
  q: jax.Array,  # [B,T,N,H]
  k: jax.Array,  # [B,S,K,H]
  v: jax.Array,  # [B,S,K,Hv]
  segment_ids: tuple[jax.Array, jax.Array] | None,
  *,
  causal: bool,
  window: int | None,
  logit_cap: float | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """``(out [B,T,N,Hv], lse [B,N,T])``; see ``pallas_kernels.block_sparse_attention``."""
  T, S = q.shape[1], k.shape[1]
  wide, shift = jnp.promote_types(q.dtype, jnp.float32), S - T
  heads_first = [x.swapaxes(1, 2).astype(wide) for x in (k, v)]
  outs, lses = [], []
  for start in range(0, T, _BLOCK):
    stop = min(start + _BLOCK, T)
    last = min(max(stop + shift, 0), S) if causal else S
    first = 0 if window is None else min(max(start + shift - window + 1, 0), last)
    behind = jnp.arange(start, stop)[:, None] + shift - jnp.arange(first, last)
    seen = jnp.ones(behind.shape, bool) if not causal else behind >= 0
    if window is not None:
      seen = seen & (behind < window)
    seen = seen[None]
    if segment_ids is not None:
      of_q, of_k = segment_ids[0][:, start:stop, None], segment_ids[1][:, None, first:last]
      seen = seen & (of_q == of_k) & (of_q >= 0)
    keys, values = (x[:, :, first:last] for x in heads_first)
    out, lse = _block(q[:, start:stop].astype(wide) * scale, keys, values, seen, logit_cap)
    outs.append(out)
    lses.append(lse)
  return jnp.concatenate(outs, axis=1).astype(q.dtype), jnp.concatenate(lses, axis=2)


def _block(q, k, v, seen, logit_cap):
  """``q [B,t,N,H]``, ``k [B,K,s,H]``, ``v [B,K,s,Hv]``, ``seen [1|B,t,s]``; rows are G x t."""
  b, t, n, h = q.shape
  heads, s = k.shape[1:3]
  rows = q.reshape(b, t, heads, n // heads, h).transpose(0, 2, 3, 1, 4).reshape(b, heads, -1, h)
  exact = jax.lax.Precision.HIGHEST
  logits = jnp.einsum("bkrh,bksh->bkrs", rows, k, precision=exact)
  if logit_cap is not None:
    logits = logit_cap * jnp.tanh(logits / logit_cap)
  logits = logits.reshape(b, heads, n // heads, t, s)
  logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
  top = jax.lax.stop_gradient(jnp.max(logits, -1, initial=-jnp.inf, keepdims=True))
  top = jnp.where(top > -jnp.inf, top, 0.0)
  p = jnp.exp(logits - top)
  total = jnp.sum(p, -1, keepdims=True)
  some = total > 0
  safe = jnp.where(some, total, 1.0)  # before dividing: a select afterwards leaves NaN behind
  lse = jnp.where(some, jnp.log(safe) + top, -jnp.inf)
  out = jnp.einsum("bkrs,bksh->bkrh", p.reshape(b, heads, -1, s), v, precision=exact)
  out = out.reshape(b, heads, n // heads, t, -1) / safe
  out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)
  return out, lse.reshape(b, n, t)


def short_gradients(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: tuple[jax.Array, jax.Array] | None,
  lse: jax.Array,
  dout: jax.Array,
  delta: jax.Array,
  *,
  causal: bool,
  window: int | None,
  logit_cap: float | None,
  scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See ``pallas_kernels.block_sparse_attention.block_sparse_attention_gradients``; one block."""
  (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
  wide = lse.dtype
  q, dout = (x.astype(wide).reshape(B, T, K, N // K, -1) for x in (q, dout))
  lse, delta = (x.reshape(B, K, N // K, T)[..., None] for x in (lse, delta))
  k, v = k.astype(wide), v.astype(wide)
  dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  s = scale * dot("btkgh,bskh->bkgts", q, k)
  if logit_cap is not None:
    s = logit_cap * jnp.tanh(s / logit_cap)
  seen = token_mask(T, S, causal=causal, window=window, segment_ids=segment_ids)[:, None, None]
  seen = seen & (lse > -jnp.inf)
  p = jnp.where(seen, jnp.exp(jnp.where(seen, s - lse, 0.0)), 0.0)
  ds = p * (dot("btkgh,bskh->bkgts", dout, v) - delta)
  if logit_cap is not None:
    ds = ds * (1.0 - (s / logit_cap) ** 2)
  ds = scale * ds
  dq = dot("bkgts,bskh->btkgh", ds, k).reshape(B, T, N, -1)
  return dq, dot("bkgts,btkgh->bskh", ds, q), dot("bkgts,btkgh->bskh", p, dout)
