# SPDX-License-Identifier: Apache-2.0
"""Tree attention in plain XLA: two products share one softmax; the cache is read as it lies.

The cached keys are met in one pass, or block by block in a loop that ends at the longest row (a
cache is as large as a request may become, and mostly emptier). Measured on a CPU in float32, M = 1
to 16, S = 2,048: the loop takes 1.05 to 1.7 times as long on a full cache, and a half to a quarter
of the time on one a quarter full; so caches from there on branch on the longest row. Accelerators
take the loop only where the logits of one pass would not fit well.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import current_target
from pallas_kernels._numerics import accumulator
from pallas_kernels.tree_attention._common import (
  XLAConfig,
  boolean,
  fold,
  precision,
  unfold,
  with_prefix,
)


@dataclasses.dataclass(frozen=True)
class Rules:
  """What is fixed at trace time."""

  scale: float
  window: int | None
  logit_cap: float | None
  block: int
  dense: float = 1.0


def heuristic(platform: str, logits: int, slots: int) -> XLAConfig:
  """``logits``: elements of one pass over the cache."""
  if platform == "cpu":
    return XLAConfig(256, dense=0.5) if slots >= 2048 else XLAConfig()
  return XLAConfig(1024 if logits > 2**26 else 0)


def tree_attention(
  q, k_cache, v_cache, length, k_nodes, v_nodes, ancestors, position, prefix, *,
  scale, window, logit_cap, cache_layout, config=None,
):  # fmt: skip
  """See the public function; ``position [B,M]`` is given iff ``window`` is."""
  if cache_layout == "BSKH":
    k_cache, v_cache = k_cache.swapaxes(1, 2), v_cache.swapaxes(1, 2)

  def rules(rows, slots):
    chosen = config or heuristic(current_target().platform, rows * q.shape[2] * slots, slots)
    return Rules(scale, window, logit_cap, min(chosen.block, slots), chosen.dense)

  rows = q.shape[0] * q.shape[1]
  fixed = rules(rows, k_cache.shape[2])
  among = boolean(ancestors)
  own = attend(fixed, q, k_cache, v_cache, length, k_nodes, v_nodes, among, position)

  def alone(q, k, v, length, position):
    fixed = rules(rows, k.shape[2])
    return attend(fixed, q, k, v, length, None, None, None, position)

  return with_prefix(alone, q, own, prefix, position)


def _cached(rules: Rules, start, width, length, position):
  """Which of the slots ``start .. start + width`` a row sees: ``[B,1,1,1|M,width]``."""
  slots = start + jnp.arange(width)
  seen = (slots < length[:, None])[:, None]  # [B,1,width]
  if rules.window is not None:
    seen = seen & (position[:, :, None] - slots < rules.window)
  return seen[:, None, None]


def _logits(rules: Rules, q, k, mask, nodes):
  """Capped logits ``[B,K,G,M,S]``, -inf where masked; ``q [B,K,G*M,H]``, ``k [B,K,S,H]``."""
  x = jnp.einsum(
    "bkrh,bksh->bkrs", q, k, precision=precision(q, k), preferred_element_type=accumulator(k)
  )
  b, heads, rows, width = x.shape
  x = x.reshape(b, heads, rows // nodes, nodes, width) * rules.scale
  if rules.logit_cap is not None:
    x = rules.logit_cap * jnp.tanh(x / rules.logit_cap)
  return jnp.where(mask, x, -jnp.inf)


def _values(p, v):
  """``p [B,K,G,M,S]``, ``v [B,K,S,Hv]`` to ``[B,K,G*M,Hv]``."""
  p = p.reshape(*p.shape[:2], -1, p.shape[-1]).astype(v.dtype)
  return jnp.einsum(
    "bkrs,bksh->bkrh", p, v, precision=precision(v), preferred_element_type=accumulator(v)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(rules: Rules, q, k_cache, v_cache, length, k_nodes, v_nodes, among, position):
  """``(out [B,M,N,Hv], lse [B,N,M])``; the cache is heads-first; nodes may be None (no nodes)."""
  return _forward(rules, q, k_cache, v_cache, length, k_nodes, v_nodes, among, position)


def _forward(rules, q, k_cache, v_cache, length, *rest):
  arrays = (q, k_cache, v_cache, length, *rest)
  if not rules.block or rules.dense >= 1:
    return _pass(rules, *arrays)
  return jax.lax.cond(
    jnp.max(length, initial=0) > rules.dense * k_cache.shape[2],
    functools.partial(_pass, dataclasses.replace(rules, block=0)),
    functools.partial(_pass, rules),
    *arrays,
  )


def _pass(rules, q, k_cache, v_cache, length, k_nodes, v_nodes, among, position):
  b, m, n, _ = q.shape
  heads, slots = k_cache.shape[1:3]
  rows = fold(q, heads).astype(k_cache.dtype)
  parts = []  # (logits, values) of all but the loop
  if among is not None:
    k, v = (x.swapaxes(1, 2).astype(k_cache.dtype) for x in (k_nodes, v_nodes))
    parts.append((_logits(rules, rows, k, among[:, None, None], m), v))
  if not rules.block:
    mask = _cached(rules, 0, slots, length, position)
    parts.append((_logits(rules, rows, k_cache, mask, m), v_cache))
  wide = accumulator(k_cache)
  top = jnp.full((b, heads, n // heads, m, 1), -jnp.inf, wide)
  for x, _ in parts:
    top = jnp.maximum(top, jnp.max(x, -1, initial=-jnp.inf, keepdims=True))
  total, acc = jnp.zeros_like(top), jnp.zeros((*rows.shape[:3], v_cache.shape[-1]), wide)
  for x, v in parts:
    p = jnp.exp(x - jnp.where(top > -jnp.inf, top, 0.0))
    total, acc = total + jnp.sum(p, -1, keepdims=True), acc + _values(p, v)

  if rules.block:
    width = rules.block

    def step(i, carry):
      top, total, acc = carry
      start = jnp.minimum(i * width, slots - width)  # the last block may overlap the one before
      k, v = (jax.lax.dynamic_slice_in_dim(x, start, width, 2) for x in (k_cache, v_cache))
      mask = _cached(rules, start, width, length, position)
      mask = mask & (start + jnp.arange(width) >= i * width)
      x = _logits(rules, rows, k, mask, m)
      new = jnp.maximum(top, jnp.max(x, -1, keepdims=True))
      safe = jnp.where(new > -jnp.inf, new, 0.0)
      p, keep = jnp.exp(x - safe), jnp.exp(top - safe)
      acc = acc * keep.reshape(*acc.shape[:-1], 1) + _values(p, v)
      return new, total * keep + jnp.sum(p, -1, keepdims=True), acc

    first = 0
    if rules.window is not None:
      first = jnp.maximum(jnp.min(position) - rules.window + 1, 0) // width
    last = jnp.minimum((jnp.max(length) + width - 1) // width, -(-slots // width))
    top, total, acc = jax.lax.fori_loop(first, last, step, (top, total, acc))

  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  out = acc / total.reshape(*acc.shape[:-1], 1)
  lse = jnp.where(empty, -jnp.inf, jnp.log(total) + top)
  return unfold(out, m).astype(q.dtype), lse.reshape(b, n, m)


def _attend_fwd(rules, *args):
  out, lse = _forward(rules, *args)
  return (out, lse), (*args, out, lse)


def backward(rules: Rules, saved, cotangents):
  """Recomputes the weights from ``lse``; ``dS = P (dO V^T - rowsum(dO O) + dlse)``."""
  q, k_cache, v_cache, length, k_nodes, v_nodes, among, position, out, lse = saved
  d_out, d_lse = cotangents
  m, (heads, slots) = q.shape[1], k_cache.shape[1:3]
  wide = accumulator(q)
  rows, d_rows = fold(q, heads), fold(d_out, heads).astype(wide)
  shape = (*rows.shape[:2], rows.shape[2] // m, m, 1)
  lse = lse.reshape(shape)
  # A row that sees nothing has no gradient: its weights are exp(-inf).
  lse, d_lse = (jnp.where(jnp.isneginf(lse), z, x) for z, x in (
    (jnp.inf, lse), (0.0, d_lse.reshape(shape))))  # fmt: skip
  shift = d_lse - jnp.sum(d_rows * fold(out, heads), -1).reshape(shape)

  def part(k, v, mask):
    x = _logits(rules, rows.astype(k.dtype), k, mask, m)
    p = jnp.exp(x - lse)
    d_p = jnp.einsum("bkrh,bksh->bkrs", d_rows, v.astype(wide), precision=precision(d_rows))
    d_x = p * (d_p.reshape(p.shape) + shift)
    if rules.logit_cap is not None:
      d_x = d_x * jnp.where(mask, 1.0 - jnp.square(x / rules.logit_cap), 0.0)
    d_x = (d_x * rules.scale).reshape(*rows.shape[:3], -1)
    p = p.reshape(d_x.shape)
    d_q = jnp.einsum("bkrs,bksh->bkrh", d_x, k.astype(wide), precision=precision(d_x))
    d_k = jnp.einsum("bkrs,bkrh->bksh", d_x, rows.astype(wide), precision=precision(d_x))
    d_v = jnp.einsum("bkrs,bkrh->bksh", p, d_rows, precision=precision(p))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

  d_q, d_kc, d_vc = part(k_cache, v_cache, _cached(rules, 0, slots, length, position))
  d_kn = d_vn = None
  if among is not None:
    d_n, d_kn, d_vn = part(k_nodes.swapaxes(1, 2), v_nodes.swapaxes(1, 2), among[:, None, None])
    d_q, d_kn, d_vn = d_q + d_n, d_kn.swapaxes(1, 2), d_vn.swapaxes(1, 2)
  return unfold(d_q, m).astype(q.dtype), d_kc, d_vc, None, d_kn, d_vn, None, None


attend.defvjp(_attend_fwd, backward)
