# SPDX-License-Identifier: Apache-2.0
"""Portable block-sparse attention: loops over rows of tiles, with an explicit backward pass.

A row is one query block of one key/value head: its G query heads, folded, meet each listed tile of
keys once, so K and V are never repeated. The inner loop runs over chunks of the row's own list with
an online softmax (FlashAttention-2, arXiv 2307.08691) and stops at its end: tiles that are not
listed, or that the token rule hides, cost nothing. Full tiles come first and are taken without mask
code. The backward pass walks the same lists once, computes each tile again from the log-sum-exp,
and adds to dk and dv in place, in a fixed order.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import current_target
from pallas_kernels.block_sparse_attention._gradients import with_gradients
from pallas_kernels.block_sparse_attention._short import (
  LONGEST,
  short_attention,
  short_gradients,
)
from pallas_kernels.block_sparse_attention.lists import Lists, tile_lists
from pallas_kernels.block_sparse_attention.pattern import BlockPattern, dense_pattern
from pallas_kernels.manual import vary, varying


@dataclasses.dataclass(frozen=True)
class XLAConfig:
  """How much is computed at once.

  Attributes:
    keys: keys of one step of the inner loop, rounded to whole blocks (at least one); None: 64 on a
      CPU, where a tile at a time is fastest from blocks of 64 on, else 512.
    rows: rows of tiles (query blocks of a key/value head) at once, cut to a divisor of B*K; None:
      1 on a CPU, where each row then stops at its own length, else B*K.
  """

  keys: int | None = None
  rows: int | None = None

  def __post_init__(self):
    if any(x is not None and x < 1 for x in (self.keys, self.rows)):
      raise ValueError(
        f"XLAConfig: keys and rows are at least 1, got keys={self.keys}, rows={self.rows}."
      )


class _Rows(NamedTuple):
  """All rows, in steps of r at once: a pytree that ``scan`` walks. Rm = rows of queries folded."""

  head: jax.Array  # [steps,r] batch entry and key/value head, b*K + k
  block: jax.Array  # [steps] query block
  num_full: jax.Array  # [steps] chunks in which every tile of every row is full
  chunks: jax.Array  # [steps] chunks in all
  num: jax.Array  # [steps,r]
  idx: jax.Array  # [steps,r,C], C padded to whole chunks


class _Plan:
  """Sizes and rearrangements of one call; everything here is static."""

  def __init__(self, q, k, v, pattern: BlockPattern, lists: Lists, rule, config: XLAConfig | None):
    config = config or XLAConfig()
    self.B, self.T, self.N, self.H = q.shape
    self.S, self.K = k.shape[1:3]
    self.G = self.N // self.K
    self.bq, self.bk = pattern.block_q, pattern.block_kv
    self.nq, self.nk = pattern.num_q_blocks, pattern.num_kv_blocks
    self.causal, self.window, self.logit_cap, self.scale = rule
    # A list for each query head: the heads of a group take turns (A), else they are folded (F).
    per_head = lists.num.shape[1] == self.N and self.G > 1
    self.A, self.F = (self.G, 1) if per_head else (1, self.G)
    on_cpu = current_target().platform == "cpu"
    most = self.B * self.K
    rows = (1 if on_cpu else most) if config.rows is None else min(config.rows, most)
    self.r = next(d for d in range(rows, 0, -1) if most % d == 0)
    keys = config.keys or (64 if on_cpu else 512)
    self.c = max(1, min(keys // self.bk, lists.idx.shape[-1]))
    self.accumulator = jnp.promote_types(q.dtype, jnp.float32)
    # CPUs multiply bfloat16 matrices many times slower than float32 ones.
    self.compute = self.accumulator if on_cpu else q.dtype
    wide = jnp.dtype(self.compute).itemsize >= 4
    self.precision = jax.lax.Precision.HIGHEST if wide else None

  def dot(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(
      equation,
      x.astype(self.compute),
      y.astype(self.compute),
      precision=self.precision,
      preferred_element_type=self.accumulator,
    )

  def _steps(self, x: jax.Array) -> jax.Array:
    """``[A,Nq,B*K,...]`` to ``[steps,r,...]``: groups of heads outermost, as they share keys."""
    x = x.reshape(*x.shape[:2], -1, self.r, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(-1, *x.shape[3:])

  def rows(self, lists: Lists) -> _Rows:
    def by_row(x):  # [Bm,Hm,Nq,...] -> [steps,r,...]
      hm = self.N if self.A > 1 else self.K
      x = jnp.repeat(x, hm // x.shape[1], axis=1)
      x = jnp.broadcast_to(x, (self.B, *x.shape[1:]))
      x = x.reshape(self.B, self.K, self.A, self.nq, *x.shape[3:])
      x = jnp.moveaxis(x, (2, 3), (0, 1))
      return self._steps(x.reshape(self.A, self.nq, -1, *x.shape[4:]))

    num_full, num, idx = map(by_row, lists)
    extra = -idx.shape[-1] % self.c
    idx = jnp.pad(idx, ((0, 0), (0, 0), (0, extra)), mode="edge")
    each = jnp.arange(self.B * self.K, dtype=jnp.int32)
    block = jnp.arange(self.nq, dtype=jnp.int32)
    return _Rows(
      head=self._steps(jnp.broadcast_to(each, (self.A, self.nq, each.size))),
      block=self._steps(jnp.broadcast_to(block[None, :, None], (self.A, self.nq, each.size)))[:, 0],
      num_full=jnp.min(num_full, axis=1) // self.c,
      chunks=-(-jnp.max(num, axis=1) // self.c),
      num=num,
      idx=idx,
    )

  def queries(self, x: jax.Array) -> jax.Array:
    """``[B,T,N,...]`` to ``[steps,r,F*bq,...]``."""
    rest = x.shape[3:]
    x = jnp.pad(x, ((0, 0), (0, self.nq * self.bq - self.T), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(self.B, self.nq, self.bq, self.K, self.A, self.F, *rest)
    x = jnp.moveaxis(x, (4, 1, 0, 3, 5, 2), (0, 1, 2, 3, 4, 5))
    return self._steps(x.reshape(self.A, self.nq, self.B * self.K, self.F * self.bq, *rest))

  def from_queries(self, x: jax.Array) -> jax.Array:
    """``[steps,r,F*bq,...]`` to ``[B,T,N,...]``."""
    x = self.from_steps(x)
    rest = x.shape[4:]
    x = x.reshape(self.A, self.nq, self.B, self.K, self.F, self.bq, *rest)
    x = jnp.moveaxis(x, (0, 1, 2, 3, 4, 5), (4, 1, 0, 3, 5, 2))
    return x.reshape(self.B, self.nq * self.bq, self.N, *rest)[:, : self.T]

  def from_steps(self, x: jax.Array) -> jax.Array:
    """``[steps,r,...]`` to ``[A,Nq,B*K,...]``."""
    x = x.reshape(-1, self.A, self.nq, *x.shape[1:])
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(self.A, self.nq, self.B * self.K, *x.shape[4:])

  def keys(self, x: jax.Array) -> jax.Array:
    """``[B,S,K,H]`` to ``[B*K,Nk,bk,H]``."""
    x = jnp.pad(x, ((0, 0), (0, self.nk * self.bk - self.S), (0, 0), (0, 0)))
    x = x.swapaxes(1, 2).astype(self.compute)
    return x.reshape(self.B * self.K, self.nk, self.bk, x.shape[-1])

  def from_keys(self, x: jax.Array) -> jax.Array:
    """``[B*K,Nk,bk,H]`` to ``[B,S,K,H]``."""
    x = x.reshape(self.B, self.K, self.nk * self.bk, -1)
    return x[:, :, : self.S].swapaxes(1, 2)

  def ids(self, segment_ids) -> tuple[jax.Array, jax.Array] | None:
    """Padded to blocks: ``[B,Nq,bq]``, ``[B,Nk,bk]``."""
    if segment_ids is None:
      return None
    sizes = ((self.nq, self.bq), (self.nk, self.bk))
    return tuple(
      jnp.pad(x, ((0, 0), (0, n * b - x.shape[1])), constant_values=-1).reshape(-1, n, b)
      for x, (n, b) in zip(segment_ids, sizes)
    )

  def visible(self, row: _Rows, slot: jax.Array, idx: jax.Array, ids) -> jax.Array:
    """The token rule for a chunk: bool ``[r,bq,c*bk]``. ``slot [c]``, ``idx [r,c]``."""
    position = (idx[..., None] * self.bk + jnp.arange(self.bk)).reshape(self.r, 1, -1)
    behind = row.block * self.bq + jnp.arange(self.bq)[:, None] + (self.S - self.T) - position
    listed = jnp.repeat(slot < row.num[:, None], self.bk, axis=1)[:, None]
    seen = listed & (position < self.S)
    if self.causal:
      seen = seen & (behind >= 0)
    if self.window is not None:
      seen = seen & (behind < self.window)
    if ids is not None:
      batch = row.head // self.K
      q_ids = ids[0][batch, row.block][:, :, None]
      kv_ids = ids[1][batch[:, None], idx].reshape(self.r, 1, -1)
      seen = seen & (q_ids == kv_ids) & (q_ids >= 0)
    return jnp.broadcast_to(seen, (self.r, self.bq, self.c * self.bk))

  def chunk(self, row: _Rows, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``slot [c]`` and ``idx [r,c]`` of chunk t."""
    slot = t * self.c + jnp.arange(self.c)
    return slot, jax.lax.dynamic_slice_in_dim(row.idx, t * self.c, self.c, axis=1)

  def tiles(self, x: jax.Array, row: _Rows, idx: jax.Array) -> jax.Array:
    """The chunk's tiles of ``x [B*K,Nk,bk,H]``: ``[r,c*bk,H]``."""
    return x[row.head[:, None], idx].reshape(self.r, self.c * self.bk, x.shape[-1])

  def logits(self, q: jax.Array, k: jax.Array) -> jax.Array:
    s = self.scale * self.dot("rmh,rkh->rmk", q, k)
    return s if self.logit_cap is None else self.logit_cap * jnp.tanh(s / self.logit_cap)

  def masked(self, x: jax.Array, seen: jax.Array, value: float) -> jax.Array:
    """``x [r,F*bq,c*bk]`` where seen ``[r,bq,c*bk]``."""
    folded = x.reshape(self.r, self.F, self.bq, -1)
    return jnp.where(seen[:, None], folded, value).reshape(x.shape)

  def over(self, row: _Rows, body: Any, carry: Any) -> Any:
    """Runs ``body(t, carry, with_mask)`` over the row's chunks, full ones first."""
    carry = jax.lax.fori_loop(0, row.num_full, lambda t, x: body(t, x, False), carry)
    return jax.lax.fori_loop(row.num_full, row.chunks, lambda t, x: body(t, x, True), carry)


def _forward(plan: _Plan, q, k, v, rows: _Rows, ids, block_max: bool):
  keys, values = plan.keys(k), plan.keys(v)
  queries, f32 = plan.queries(q), plan.accumulator
  m_rows, axes = plan.F * plan.bq, varying(q, k, v, rows, ids)

  def step(_, x):
    row, query = x

    def body(t, carry, with_mask):
      top, total, acc, tops = carry
      slot, idx = plan.chunk(row, t)
      s = plan.logits(query, plan.tiles(keys, row, idx))
      if with_mask:
        s = plan.masked(s, plan.visible(row, slot, idx, ids), -jnp.inf)
      now = jnp.maximum(top, jnp.max(s, axis=-1))
      finite = jnp.where(now > -jnp.inf, now, 0.0)
      p = jnp.exp(s - finite[..., None])
      decay = jnp.exp(top - finite)
      total = decay * total + jnp.sum(p, axis=-1)
      acc = decay[..., None] * acc + plan.dot("rmk,rkh->rmh", p, plan.tiles(values, row, idx))
      if tops is not None:
        here = jnp.max(s.reshape(*s.shape[:2], plan.c, plan.bk), axis=-1)
        tops = jax.lax.dynamic_update_slice_in_dim(tops, here, t * plan.c, axis=2)
      return now, total, acc, tops

    empty = jnp.full((plan.r, m_rows), -jnp.inf, f32)
    tops = jnp.full((plan.r, m_rows, row.idx.shape[-1]), -jnp.inf, f32) if block_max else None
    carry = (empty, jnp.zeros_like(empty), jnp.zeros((plan.r, m_rows, v.shape[-1]), f32), tops)
    top, total, acc, tops = plan.over(row, body, vary(carry, axes))
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
    peak = None
    if tops is not None:  # P's largest entry in a tile, from its largest logit in every row
      p = jnp.exp(tops - jnp.where(seen, lse, 0.0)[..., None])
      p = p.reshape(plan.r, plan.F, plan.bq, -1)
      real = row.block * plan.bq + jnp.arange(plan.bq) < plan.T  # the rest is padding
      p = jnp.max(jnp.where(real[:, None], p, 0.0), axis=2)
      spread = jnp.zeros((plan.r, plan.F, plan.nk), f32)
      peak = spread.at[jnp.arange(plan.r)[:, None], :, row.idx].max(p.swapaxes(1, 2))
    return None, ((acc / total[..., None]).astype(q.dtype), lse, peak)

  _, (out, lse, peak) = jax.lax.scan(step, None, (rows, queries))
  out, lse = plan.from_queries(out), plan.from_queries(lse).swapaxes(1, 2)
  if peak is not None:
    peak = plan.from_steps(peak).reshape(plan.A, plan.nq, plan.B, plan.K, plan.F, plan.nk)
    peak = jnp.moveaxis(peak, (0, 1, 2, 3, 4, 5), (2, 4, 0, 1, 3, 5))
    peak = peak.reshape(plan.B, plan.N, plan.nq, plan.nk)
  return out, lse, peak


def _backward(plan: _Plan, q, k, v, rows: _Rows, ids, lse, dout, delta, dtype):
  keys, values = plan.keys(k), plan.keys(v)
  per_query = [plan.queries(x.swapaxes(1, 2)) for x in (lse, delta)]
  m_rows, f32 = plan.F * plan.bq, plan.accumulator
  axes = varying(q, k, v, rows, ids, dout)

  def add(total, row, idx, update):
    update = update.reshape(plan.r, plan.c, plan.bk, -1)
    if plan.r > 1:
      return total.at[row.head[:, None], idx].add(update)

    def one(slot, total):
      start = jnp.zeros((), idx.dtype)  # under jax_enable_x64 a plain 0 is of another type
      where = (row.head[0], idx[0, slot], start, start)
      here = jax.lax.dynamic_slice(total, where, (1, 1, *total.shape[2:]))
      more = jax.lax.dynamic_slice_in_dim(update, slot, 1, axis=1)
      return jax.lax.dynamic_update_slice(total, here + more, where)

    # A loop: with two updates in a row, or a scatter, XLA:CPU copies the whole array.
    return one(0, total) if plan.c == 1 else jax.lax.fori_loop(0, plan.c, one, total)

  def step(totals, x):
    row, query, d_out, lse, delta = x
    seen_any = lse > -jnp.inf
    finite = jnp.where(seen_any, lse, 0.0)[..., None]

    def body(t, carry, with_mask):
      dq, dk, dv = carry
      slot, idx = plan.chunk(row, t)
      key = plan.tiles(keys, row, idx)
      s = plan.logits(query, key)
      p = jnp.exp(s - finite)
      if with_mask:
        p = plan.masked(p, plan.visible(row, slot, idx, ids), 0.0)
      dp = plan.dot("rmh,rkh->rmk", d_out, plan.tiles(values, row, idx))
      ds = p * (dp - delta[..., None])
      if plan.logit_cap is not None:
        ds = ds * (1.0 - (s / plan.logit_cap) ** 2)
      ds = plan.scale * ds
      dq = dq + plan.dot("rmk,rkh->rmh", ds, key)
      dk = add(dk, row, idx, plan.dot("rmk,rmh->rkh", ds, query))
      dv = add(dv, row, idx, plan.dot("rmk,rmh->rkh", p, d_out))
      return dq, dk, dv

    zero = jnp.zeros((plan.r, m_rows, plan.H), f32)
    dq, dk, dv = plan.over(row, body, (vary(zero, axes), *totals))
    return (dk, dv), dq.astype(dtype)

  zeros = tuple(jnp.zeros(x.shape, f32) for x in (keys, values))
  xs = (rows, plan.queries(q), plan.queries(dout), *per_query)
  (dk, dv), dq = jax.lax.scan(step, vary(zeros, axes), xs)
  return plan.from_queries(dq), plan.from_keys(dk), plan.from_keys(dv)


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
  config: XLAConfig | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  rule = {"causal": causal, "window": window, "logit_cap": logit_cap, "scale": scale}
  if _is_short(q, k, blocks, config):
    return *short_attention(q, k, v, segment_ids, **rule), None
  plan, extra = _planned(q, k, v, blocks, segment_ids, config=config, **rule)

  def forward(q, k, v, extra):
    return _forward(plan, q, k, v, *extra, block_max)

  def backward(q, k, v, extra, lse, dout, delta):
    return _backward(plan, q, k, v, *extra, lse, dout, delta, q.dtype)

  return with_gradients(forward, backward)(q, k, v, extra)


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
  config: XLAConfig | None,
  **rule: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  if _is_short(q, k, blocks, config):
    return short_gradients(q, k, v, segment_ids, lse, dout, delta, **rule)
  plan, extra = _planned(q, k, v, blocks, segment_ids, config=config, **rule)
  return _backward(plan, q, k, v, *extra, lse, dout, delta, plan.accumulator)


def _is_short(q, k, blocks, config) -> bool:
  short = blocks is None and config is None and max(q.shape[1], k.shape[1]) <= LONGEST
  return short and current_target().platform == "cpu"


def _planned(q, k, v, blocks, segment_ids, *, config, causal, window, logit_cap, scale):
  """The plan of a call, and its lists and ids."""
  T, S = q.shape[1], k.shape[1]
  if blocks is None:
    blocks = dense_pattern(T, S, causal=causal, window=window)
  lists, _ = tile_lists(blocks, T=T, S=S, causal=causal, window=window, segment_ids=segment_ids)
  plan = _Plan(q, k, v, blocks, lists, (causal, window, logit_cap, scale), config)
  return plan, (plan.rows(lists), plan.ids(segment_ids))
