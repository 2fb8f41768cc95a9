# SPDX-License-Identifier: Apache-2.0
"""Forward TPU kernel: one query block at a time walks its list of key blocks.

Everything is transposed: logits are ``s = k q^T`` of ``[block_kv, block_q]``, so that

* a query is a lane: maximum and sum over keys are sums of registers, with no reduction over lanes,
  and the running maximum of a block of queries is one row;
* the second product is ``o^T += v^T p``: p is used as it was made, in the dtype of v.

K and V^T of a head (or of a range of its keys) stay in VMEM while all query blocks of all heads
that share them pass by: a tile costs no copy and no grid step, only its arithmetic, and trip counts
are data. A row's full tiles come first, several to a trip, so that the softmax of one tile runs
under the products of another; what is left runs one tile a trip, with masks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
FLOOR = -(2.0**120)  # maximum of no logits; finite, for -inf minus -inf is NaN


@dataclasses.dataclass(frozen=True)
class Rule:
  """Which tokens see which, inside a tile, and what becomes of logits; all static.

  Attributes:
    T, S: real lengths; the last query is aligned with the last key.
    causal, window: as in the op. tail: some keys are padding that no other rule hides.
    logit_cap: None or the bound of the logits. scale: of the logits.
  """

  T: int
  S: int
  block_q: int
  block_kv: int
  causal: bool
  window: int | None
  tail: bool
  logit_cap: float | None
  scale: float

  @property
  def query_scale(self) -> float:
    """What queries are multiplied with: logits come out in base 2, or ready for ``tanh``."""
    return self.scale * LOG2E if self.logit_cap is None else self.scale / self.logit_cap

  def logits(self, product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Logits in base 2 of ``k (query_scale q)^T``, and their ``tanh`` where they are capped."""
    if self.logit_cap is None:
      return product, None
    bounded = jnp.tanh(product)
    return bounded * (self.logit_cap * LOG2E), bounded

  def visible(
    self,
    i: jax.Array,
    j: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
  ) -> jax.Array | None:
    """bool ``[block_kv,block_q]`` of query block i and key block j; None: all of it.

    ``ids``: those of the queries ``[1,block_q]`` and of the keys ``[1,block_kv]``.
    """
    shape = (self.block_kv, self.block_q)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    ahead = i * self.block_q + (self.S - self.T) - j * self.block_kv  # of query 0 over key 0
    rules = []
    if self.causal:
      rules.append(key - query <= ahead)
    if self.window is not None:
      rules.append(key - query > ahead - self.window)
    if self.tail:
      rules.append(key < self.S - j * self.block_kv)
    if ids is not None:
      of_query, of_key = ids
      of_key = column(of_key)
      rules.append((of_key == of_query) & (of_query >= 0))
    return functools.reduce(jnp.logical_and, rules) if rules else None


def column(row: jax.Array) -> jax.Array:
  """``[1,n]`` as ``[n,1]``: integers beside sublanes instead of along lanes."""
  return jnp.broadcast_to(row, (_tpu.LANES, row.shape[-1])).T[:, :1]


def product(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
  """``a b`` or ``a b^T``, accumulated in float32."""
  contract = (((1,), (1 if transposed else 0,)), ((), ()))
  return jax.lax.dot_general(
    a, b, contract, precision=_tpu.precision(a.dtype), preferred_element_type=jnp.float32
  )


def walk(first, stop, per_trip: int, visit) -> jax.Array:
  """Calls ``visit(t)`` for t = first, first + per_trip, ... while a whole trip fits before stop."""
  trips = jax.lax.div(stop - first, per_trip)

  def body(trip, _):
    visit(first + trip * per_trip)
    return 0

  jax.lax.fori_loop(0, trips, body, 0)
  return first + trips * per_trip


def _kernel(rows, q, k, v, *refs, rule: Rule, per_trip: int, has_ids: bool, block_max: bool):
  refs = list(refs)
  q_ids, kv_ids = (refs.pop(0), refs.pop(0)) if has_ids else (None, None)
  out, lse = refs.pop(0), refs.pop(0)
  tile_max = refs.pop(0) if block_max else None
  acc, top, total = refs[:3]
  tile_top = refs[3] if block_max else None
  count, key_blocks = q.shape[3], k.shape[3]
  key_base = pl.program_id(2) * key_blocks
  query_base = pl.program_id(4) * count

  def row(r, _):
    num_full, num = rows[0, r, 0], rows[0, r, 1]
    queries = q.at[0, 0, 0, r]
    acc[...] = jnp.zeros_like(acc)
    top[...] = jnp.full_like(top, FLOOR)
    total[...] = jnp.zeros_like(total)

    def visit(t, tiles, masked):
      blocks = [rows[0, r, 2 + t + n] for n in range(tiles)]
      logits = []
      for block in blocks:
        s, _ = rule.logits(product(k[0, 0, 0, block], queries[...]))
        if masked:
          ids = None
          if has_ids:
            ids = q_ids[0, 0, pl.ds(r, 1), :], kv_ids[0, 0, pl.ds(block, 1), :]
          seen = rule.visible(query_base + r, key_base + block, ids)
          s = s if seen is None else jnp.where(seen, s, -jnp.inf)
        logits.append(s)
      if block_max:
        tops = [jnp.max(s, axis=0, keepdims=True) for s in logits]
        for n, x in enumerate(tops):
          tile_top[pl.ds(t + n, 1), :] = x
        highest = functools.reduce(jnp.maximum, tops)
      else:
        highest = jnp.max(functools.reduce(jnp.maximum, logits), axis=0, keepdims=True)
      before = top[...]
      now = jnp.maximum(before, highest)
      fade = jnp.exp2(before - now)
      weights = [jnp.exp2(s - now) for s in logits]
      summed = functools.reduce(jnp.add, weights)
      # Sums over keys stay apart in the eight sublanes until the end.
      summed = jnp.sum(summed.reshape(-1, _tpu.SUBLANES, summed.shape[-1]), axis=0)
      top[...] = now
      total[...] = fade * total[...] + summed
      seen = (product(v[0, 0, 0, b], p.astype(v.dtype)) for b, p in zip(blocks, weights))
      acc[...] = fade * acc[...] + functools.reduce(jnp.add, seen)

    t = walk(0, num_full, per_trip, functools.partial(visit, tiles=per_trip, masked=False))
    walk(t, num, 1, functools.partial(visit, tiles=1, masked=True))

    mass = jnp.sum(total[...], axis=0, keepdims=True)
    some = mass > 0
    share = jnp.where(some, 1.0 / jnp.where(some, mass, 1.0), 0.0)
    out[0, 0, 0, 0, r] = (acc[...] * share).astype(out.dtype)
    log_sum = (top[...] + jnp.log2(jnp.where(some, mass, 1.0))) * LN2
    lse[0, 0, 0, 0, pl.ds(r, 1), :] = jnp.where(some, log_sum, -jnp.inf)
    if block_max:
      lane = jax.lax.broadcasted_iota(jnp.int32, (1, rule.block_q), 1)
      real = lane < rule.T - (query_base + r) * rule.block_q
      peak = jnp.exp2(tile_top[...] - top[...]) * jnp.where(real, share, 0.0)
      listed = jax.lax.broadcasted_iota(jnp.int32, peak.shape, 0) < num
      peak = jnp.max(jnp.where(listed, peak, 0.0), axis=1, keepdims=True)  # [tiles,1]
      tile_max[0, 0, 0, 0, pl.ds(r, 1), :] = jnp.broadcast_to(peak, (peak.shape[0], _tpu.LANES)).T[
        :1
      ]
    return 0

  jax.lax.fori_loop(0, count, row, 0)


def forward(
  rows: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ids: tuple[jax.Array, jax.Array] | None,
  *,
  rule: Rule,
  per_trip: int,
  batch_lists: int,
  head_lists: int,
  block_max: bool,
  out_dtype: Any,
  interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Attention of every query block to the key blocks of every range of keys.

  Letters: G query heads of each of K key heads; R ranges of X key blocks; Y steps of c query blocks
  (bq, bk tokens); W = 2 + most tiles of a row.

  Args:
    rows: i32 ``[batch_lists * head_lists * R * Y, c, W]``: full tiles, all tiles, key blocks.
    q: ``[B,K*G,Y,c,H,bq]``. k: ``[B,K,R,X,bk,H]``. v: ``[B,K,R,X,Hv,bk]``.
    ids: i32 ``[B,Y,c,bq]`` and ``[B,R,X,bk]``.

  Returns:
    out ``[R,B,K*G,Y,c,Hv,bq]``, lse f32 ``[R,B,K*G,Y,c,bq]``, and with block_max the largest
    attention weight of each listed tile, f32 ``[R,B,K*G,Y,c,W']`` in the order of the list.
  """
  B, N, Y, c, H, bq = q.shape
  K, R, X, bk = k.shape[1:5]
  Hv, W = v.shape[4], rows.shape[-1]
  G = N // K

  def head(kh, g):
    return kh * G + g

  def list_row(b, kh, r, g, y):
    of_batch = b if batch_lists > 1 else 0
    of_head = jax.lax.div(head(kh, g), N // head_lists)
    return (((of_batch * head_lists + of_head) * R + r) * Y + y, 0, 0)

  in_specs = [
    pl.BlockSpec((1, c, W), list_row, memory_space=pltpu.SMEM),
    pl.BlockSpec((1, 1, 1, c, H, bq), lambda b, kh, r, g, y: (b, head(kh, g), y, 0, 0, 0)),
    pl.BlockSpec((1, 1, 1, X, bk, H), lambda b, kh, r, g, y: (b, kh, r, 0, 0, 0)),
    pl.BlockSpec((1, 1, 1, X, Hv, bk), lambda b, kh, r, g, y: (b, kh, r, 0, 0, 0)),
  ]
  if ids is not None:
    in_specs.append(pl.BlockSpec((1, 1, c, bq), lambda b, kh, r, g, y: (b, y, 0, 0)))
    in_specs.append(pl.BlockSpec((1, 1, X, bk), lambda b, kh, r, g, y: (b, r, 0, 0)))
  out_shape = [
    jax.ShapeDtypeStruct((R, B, N, Y, c, Hv, bq), out_dtype),
    jax.ShapeDtypeStruct((R, B, N, Y, c, bq), jnp.float32),
  ]
  out_specs = [
    pl.BlockSpec((1, 1, 1, 1, c, Hv, bq), lambda b, kh, r, g, y: (r, b, head(kh, g), y, 0, 0, 0)),
    pl.BlockSpec((1, 1, 1, 1, c, bq), lambda b, kh, r, g, y: (r, b, head(kh, g), y, 0, 0)),
  ]
  scratch = [
    pltpu.VMEM((Hv, bq), jnp.float32),
    pltpu.VMEM((1, bq), jnp.float32),
    pltpu.VMEM((_tpu.SUBLANES, bq), jnp.float32),
  ]
  if block_max:
    most = pl.cdiv(W - 2, _tpu.LANES) * _tpu.LANES
    out_shape.append(jax.ShapeDtypeStruct((R, B, N, Y, c, most), jnp.float32))
    out_specs.append(
      pl.BlockSpec((1, 1, 1, 1, c, most), lambda b, kh, r, g, y: (r, b, head(kh, g), y, 0, 0))
    )
    scratch.append(pltpu.VMEM((most, bq), jnp.float32))

  tiles = B * N * R * Y * c * (W - 2)  # at most: how many, only the lists know
  outputs = _tpu.call(
    functools.partial(
      _kernel, rule=rule, per_trip=per_trip, has_ids=ids is not None, block_max=block_max
    ),
    name="block_sparse_forward",
    out_shape=tuple(out_shape),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0,
      grid=(B, K, R, G, Y),
      in_specs=in_specs,
      out_specs=tuple(out_specs),
      scratch_shapes=scratch,
    ),
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
    flops=2 * tiles * bq * bk * (H + Hv),
    bytes_accessed=q.nbytes + k.nbytes + v.nbytes + rows.nbytes + 2 * R * q.nbytes,
    transcendentals=tiles * bq * bk,
    interpret=interpret,
    vmem_limit_bytes=_tpu.chip().vmem_bytes * 15 // 16,
    disable_bounds_checks=True,
  )(rows, q, k, v, *(ids or ()))
  return outputs if block_max else (*outputs, None)
