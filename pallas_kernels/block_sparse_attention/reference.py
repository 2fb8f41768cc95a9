# SPDX-License-Identifier: Apache-2.0
"""The definition: one masked softmax over all keys, in float32, with its gradient by autodiff."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.pattern import BlockPattern


def token_mask(
  T: int,
  S: int,
  *,
  causal: bool,
  window: int | None,
  segment_ids: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
  """The token rule, bool ``[B|1,T,S]``."""
  behind = jnp.arange(T)[:, None] + (S - T) - jnp.arange(S)
  mask = jnp.ones((1, T, S), bool)
  if causal:
    mask = mask & (behind >= 0)
  if window is not None:
    mask = mask & (behind < window)
  if segment_ids is not None:
    q_ids, kv_ids = (x[:, :, None] for x in segment_ids)
    mask = mask & (q_ids == kv_ids.swapaxes(1, 2)) & (q_ids >= 0)
  return mask


def block_sparse_attention(
  q: jax.Array,  # [B,T,N,H]
  k: jax.Array,  # [B,S,K,H]
  v: jax.Array,  # [B,S,K,Hv]
  blocks: BlockPattern | None,
  segment_ids: tuple[jax.Array, jax.Array] | None,
  *,
  causal: bool,
  window: int | None,
  logit_cap: float | None,
  scale: float,
  block_max: bool,
  config: None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  mask = token_mask(T, S, causal=causal, window=window, segment_ids=segment_ids)[:, None]
  if blocks is not None:
    tiles = jnp.repeat(blocks.dense(), N // blocks.num.shape[1], axis=1)
    tiles = jnp.repeat(jnp.repeat(tiles, blocks.block_q, axis=2), blocks.block_kv, axis=3)
    mask = mask & tiles[:, :, :T, :S]

  k, v = (jnp.repeat(x.astype(dtype), N // K, axis=2) for x in (k, v))
  highest = jax.lax.Precision.HIGHEST
  s = scale * jnp.einsum("btnh,bsnh->bnts", q.astype(dtype), k, precision=highest)
  if logit_cap is not None:
    s = logit_cap * jnp.tanh(s / logit_cap)
  s = jnp.where(mask, s, -jnp.inf)
  top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
  top = jnp.where(top > -jnp.inf, top, 0.0)
  p = jnp.exp(s - top)
  total = jnp.sum(p, axis=-1, keepdims=True)
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  p = p / total
  out = jnp.einsum("bnts,bsnh->btnh", p, v, precision=highest).astype(q.dtype)
  lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)[..., 0]
  if not block_max:
    return out, lse, None
  assert blocks is not None
  bq, bk = blocks.block_q, blocks.block_kv
  p = jnp.pad(jax.lax.stop_gradient(p), ((0, 0), (0, 0), (0, -T % bq), (0, -S % bk)))
  p = p.reshape(*p.shape[:2], p.shape[2] // bq, bq, p.shape[3] // bk, bk)
  return out, lse, jnp.max(p, axis=(3, 5))


def block_sparse_attention_gradients(
  q: jax.Array,  # [B,T,N,H]
  k: jax.Array,  # [B,S,K,H]
  v: jax.Array,  # [B,S,K,Hv]
  blocks: BlockPattern | None,
  segment_ids: tuple[jax.Array, jax.Array] | None,
  lse: jax.Array,  # [B,N,T]
  dout: jax.Array,  # [B,T,N,Hv]
  delta: jax.Array,  # [B,N,T]
  *,
  config: None = None,
  **rule: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  wide = [x.astype(lse.dtype) for x in (q, k, v)]

  def attend(q, k, v):
    return block_sparse_attention(q, k, v, blocks, segment_ids, block_max=False, **rule)[:2]

  # By the gradient of softmax attention over these keys alone: P = w P' with w = exp(lse' - lse),
  # and the cotangent of lse' turns its own delta into w delta.
  (out, own), pull = jax.vjp(attend, *wide)
  seen = own > -jnp.inf
  w = jnp.where(seen, jnp.exp(own - jnp.where(seen, lse, 0.0)), 0.0)
  dout = w.swapaxes(1, 2)[..., None] * dout.astype(lse.dtype)
  return pull((dout, jnp.sum(dout * out, axis=-1).swapaxes(1, 2) - w * delta))
