# SPDX-License-Identifier: Apache-2.0
"""Tree attention by definition: one masked softmax over (prefix, cache, nodes)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._numerics import accumulator
from pallas_kernels.tree_attention._common import boolean


def tree_attention(
  q, k_cache, v_cache, length, k_nodes, v_nodes, ancestors, position, prefix, *,
  scale, window, logit_cap, cache_layout, config=None,
):  # fmt: skip
  """See the public function; ``position [B,M]`` is given iff ``window`` is."""
  wide = accumulator(q)
  b, m, n, _ = q.shape
  if cache_layout == "BKSH":
    k_cache, v_cache = k_cache.swapaxes(1, 2), v_cache.swapaxes(1, 2)
  slots = k_cache.shape[1]
  keys, values = [k_cache, k_nodes], [v_cache, v_nodes]
  cached = jnp.broadcast_to(jnp.arange(slots) < length[:, None, None], (b, m, slots))
  if window is not None:
    cached &= position[:, :, None] - jnp.arange(slots) < window
  seen = [cached, boolean(ancestors)]
  for *kv, fill in reversed(prefix):
    k, v, fill = (jnp.repeat(x, b // fill.shape[0], axis=0) for x in (*kv, fill))
    keys.insert(0, k.swapaxes(1, 2))
    values.insert(0, v.swapaxes(1, 2))
    slots = jnp.arange(k.shape[2])
    before = jnp.broadcast_to(slots < fill[:, None, None], (b, m, slots.size))
    if window is not None:
      position = position + fill[:, None]
      before &= position[:, :, None] - slots < window
    seen.insert(0, before)
  k, v = (jnp.concatenate([x.astype(wide) for x in xs], axis=1) for xs in (keys, values))
  k, v = (jnp.repeat(x, n // x.shape[2], axis=2) for x in (k, v))  # [B,P+S+M,N,H]
  mask = jnp.concatenate(seen, axis=2)[:, None]  # [B,1,M,P+S+M]
  logits = scale * jnp.einsum("bmnh,bsnh->bnms", q.astype(wide), k, precision="highest")
  if logit_cap is not None:
    logits = logit_cap * jnp.tanh(logits / logit_cap)
  empty = ~jnp.any(mask, -1)
  top = jnp.max(jnp.where(mask, logits, -jnp.inf), -1, keepdims=True, initial=-jnp.inf)
  top = jax.lax.stop_gradient(jnp.where(empty[..., None], 0.0, top))
  p = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0.0)), 0.0)
  total = jnp.where(empty, 1.0, jnp.sum(p, -1))
  out = jnp.einsum("bnms,bsnh->bmnh", p / total[..., None], v, precision="highest")
  lse = jnp.where(empty, -jnp.inf, top[..., 0] + jnp.log(total))
  return out.astype(q.dtype), lse.astype(wide)
