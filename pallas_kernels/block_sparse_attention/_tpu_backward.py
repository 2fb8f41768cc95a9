# SPDX-License-Identifier: Apache-2.0
"""Backward TPU kernel: one key block at a time walks its list of query blocks; dq, dk, dv in one.

As in the forward pass a query is a lane. With q and do transposed, five products make a tile
(``s = k q^T``, statistics as rows):

  p   = exp2(k q^T - lse)
  dv^T += do^T p^T      dp = v do^T      ds = p (dp - di)
  dk^T += q^T ds^T      dq^T += k^T ds

so no tile is transposed: the products that need ``p^T`` contract their lanes. q^T, do^T and the
float32 dq^T of a head (or of a range of its queries) stay in VMEM while its key blocks pass by;
every sum is taken in one order, so gradients are the same in every run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu
from pallas_kernels.block_sparse_attention._tpu_forward import Rule, product, walk


def _kernel(rows, q, do, lse, di, k, k_t, v, *refs, rule: Rule, per_trip: int, has_ids: bool):
  refs = list(refs)
  q_ids, kv_ids = (refs.pop(0), refs.pop(0)) if has_ids else (None, None)
  dq, dk, dv, dk_acc, dv_acc = refs
  count, query_blocks = k.shape[3], q.shape[3]
  query_base = pl.program_id(2) * query_blocks
  key_base = pl.program_id(3) * count

  def clear(i, _):
    dq[0, 0, 0, i] = jnp.zeros(dq.shape[4:], dq.dtype)
    return 0

  jax.lax.fori_loop(0, jnp.where(pl.program_id(3) == 0, query_blocks, 0), clear, 0)

  def row(r, _):
    num_full, num = rows[0, r, 0], rows[0, r, 1]
    keys, keys_t, values = k.at[0, 0, 0, r], k_t.at[0, 0, 0, r], v.at[0, 0, 0, r]
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

    def visit(t, tiles, masked):
      dk_sum, dv_sum = [], []
      for n in range(tiles):
        block = rows[0, r, 2 + t + n]
        queries, cotangent = q[0, 0, 0, block], do[0, 0, 0, block]
        s, bounded = rule.logits(product(keys[...], queries))
        p = jnp.exp2(s - lse[0, 0, 0, pl.ds(block, 1), :])
        if masked:
          ids = None
          if has_ids:
            ids = q_ids[0, 0, pl.ds(block, 1), :], kv_ids[0, 0, pl.ds(r, 1), :]
          seen = rule.visible(query_base + block, key_base + r, ids)
          p = p if seen is None else jnp.where(seen, p, 0.0)
        dp = product(values[...], cotangent)
        ds = p * (dp - di[0, 0, 0, pl.ds(block, 1), :])
        if bounded is not None:
          ds = ds * (1.0 - bounded * bounded)
        ds, p = ds.astype(q.dtype), p.astype(q.dtype)
        dv_sum.append(product(cotangent, p, transposed=True))
        dk_sum.append(product(queries, ds, transposed=True))
        dq[0, 0, 0, block] += product(keys_t[...], ds)
      dv_acc[...] += functools.reduce(jnp.add, dv_sum)
      dk_acc[...] += functools.reduce(jnp.add, dk_sum)

    t = walk(0, num_full, per_trip, functools.partial(visit, tiles=per_trip, masked=False))
    walk(t, num, 1, functools.partial(visit, tiles=1, masked=True))
    dk[0, 0, 0, 0, r] = dk_acc[...].astype(dk.dtype)
    dv[0, 0, 0, 0, r] = dv_acc[...].astype(dv.dtype)
    return 0

  jax.lax.fori_loop(0, count, row, 0)


def backward(
  rows: jax.Array,
  q: jax.Array,
  do: jax.Array,
  lse: jax.Array,
  di: jax.Array,
  k: jax.Array,
  k_t: jax.Array,
  v: jax.Array,
  ids: tuple[jax.Array, jax.Array] | None,
  *,
  rule: Rule,
  per_trip: int,
  batch_lists: int,
  head_lists: int,
  sum_dtype: Any,
  interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Unscaled gradients, for every range of queries and every query head.

  Letters as in the forward pass, with ranges over queries: R ranges of X query blocks, Y steps of c
  key blocks.

  Args:
    rows: i32 ``[batch_lists * head_lists * R * Y, c, W]``: full tiles, all tiles, query blocks.
    q, do: ``[B,N,R,X,H,bq]``, ``[B,N,R,X,Hv,bq]``.
    lse, di: f32 ``[B,N,R,X,bq]``: of base 2, +inf in rows that see nothing; ``sum(do * out)``
      less the cotangent of lse.
    k, v: ``[B,K,Y,c,bk,H]``, ``[B,K,Y,c,bk,Hv]``. k_t: ``[B,K,Y,c,H,bk]``.
    ids: i32 ``[B,R,X,bq]`` and ``[B,Y,c,bk]``.

  Returns:
    dq f32 ``[B,N,R,X,H,bq]``, dk ``[R,B,N,Y,c,H,bk]`` and dv ``[R,B,N,Y,c,Hv,bk]`` in sum_dtype.
  """
  B, N, R, X, H, bq = q.shape
  K, Y, c, bk = k.shape[1:5]
  Hv, W = v.shape[5], rows.shape[-1]
  G = N // K

  def list_row(b, n, r, y):
    of_batch = b if batch_lists > 1 else 0
    of_head = jax.lax.div(n, N // head_lists)
    return (((of_batch * head_lists + of_head) * R + r) * Y + y, 0, 0)

  def resident(*shape):
    return pl.BlockSpec(
      (1, 1, 1, X, *shape), lambda b, n, r, y: (b, n, r) + (0,) * (1 + len(shape))
    )

  def passing(*shape):
    return pl.BlockSpec((1, 1, 1, c, *shape), lambda b, n, r, y: (b, jax.lax.div(n, G), y, 0, 0, 0))

  def summed(*shape):
    return pl.BlockSpec((1, 1, 1, 1, c, *shape), lambda b, n, r, y: (r, b, n, y, 0, 0, 0))

  in_specs = [
    pl.BlockSpec((1, c, W), list_row, memory_space=pltpu.SMEM),
    resident(H, bq), resident(Hv, bq), resident(bq), resident(bq),
    passing(bk, H), passing(H, bk), passing(bk, Hv),
  ]  # fmt: skip
  if ids is not None:
    in_specs.append(pl.BlockSpec((1, 1, X, bq), lambda b, n, r, y: (b, r, 0, 0)))
    in_specs.append(pl.BlockSpec((1, 1, c, bk), lambda b, n, r, y: (b, y, 0, 0)))
  tiles = B * N * R * Y * c * (W - 2)  # at most
  return _tpu.call(
    functools.partial(_kernel, rule=rule, per_trip=per_trip, has_ids=ids is not None),
    name="block_sparse_backward",
    out_shape=(
      jax.ShapeDtypeStruct(q.shape, jnp.float32),
      jax.ShapeDtypeStruct((R, B, N, Y, c, H, bk), sum_dtype),
      jax.ShapeDtypeStruct((R, B, N, Y, c, Hv, bk), sum_dtype),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0,
      grid=(B, N, R, Y),
      in_specs=in_specs,
      out_specs=(resident(H, bq), summed(H, bk), summed(Hv, bk)),
      scratch_shapes=[pltpu.VMEM((H, bk), jnp.float32), pltpu.VMEM((Hv, bk), jnp.float32)],
    ),
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    flops=2 * tiles * bq * bk * (3 * H + 2 * Hv),
    bytes_accessed=2 * q.nbytes + do.nbytes + G * R * (k.nbytes + k_t.nbytes + v.nbytes) * 2,
    transcendentals=tiles * bq * bk,
    interpret=interpret,
    vmem_limit_bytes=_tpu.chip().vmem_bytes * 15 // 16,
    disable_bounds_checks=True,
  )(rows, q, do, lse, di, k, k_t, v, *(ids or ()))
