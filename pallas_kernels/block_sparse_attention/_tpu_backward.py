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
from pallas_kernels.block_sparse_attention._tpu_forward import HEADER, Rule, product, run


def _kernel(jobs, q, do, lse, di, k, k_t, v, *refs, rule: Rule, per_trip: int, has_ids: bool):
  refs = list(refs)
  q_ids, kv_ids = (refs.pop(0), refs.pop(0)) if has_ids else (None, None)
  dq, dk, dv, dk_acc, dv_acc = refs
  count, query_blocks = k.shape[3], q.shape[2]
  query_base, key_base = jobs[0, 0, 2], pl.program_id(2) * count

  def clear_queries(i, _):
    dq[0, 0, i] = jnp.zeros(dq.shape[3:], dq.dtype)
    return 0

  jax.lax.fori_loop(0, jnp.where(pl.program_id(2) == 0, query_blocks, 0), clear_queries, 0)

  def clear(r, _):
    dk_acc[r] = jnp.zeros(dk_acc.shape[1:], dk_acc.dtype)
    dv_acc[r] = jnp.zeros(dv_acc.shape[1:], dv_acc.dtype)
    return 0

  jax.lax.fori_loop(0, count, clear, 0)

  def first_products(row, block):
    return product(k[0, 0, 0, row], q[0, 0, block]), product(v[0, 0, 0, row], do[0, 0, block])

  def last_products(row, block, s, dp, *, masked, listed):
    s, bounded = rule.logits(s)
    p = jnp.exp2(s - lse[0, 0, pl.ds(listed, 1), :])
    if masked:
      ids = None
      if has_ids:
        ids = q_ids[0, pl.ds(block, 1), :], kv_ids[0, 0, pl.ds(row, 1), :]
      seen = rule.visible(query_base + block, key_base + row, ids)
      p = p if seen is None else jnp.where(seen, p, 0.0)
    ds = p * (dp - di[0, 0, pl.ds(listed, 1), :])
    if bounded is not None:
      ds = ds * (1.0 - bounded * bounded)
    ds, p = ds.astype(q.dtype), p.astype(q.dtype)
    return (
      product(k_t[0, 0, 0, row], ds),
      product(q[0, 0, block], ds, transposed=True),
      product(do[0, 0, block], p, transposed=True),
    )

  def of_one_row(row, blocks):
    made = [first_products(row, block) for block in blocks]
    parts = [
      last_products(row, block, *x, masked=False, listed=block) for block, x in zip(blocks, made)
    ]
    for block, (of_queries, _, _) in zip(blocks, parts):
      dq[0, 0, block] += of_queries
    dk_acc[row] += functools.reduce(jnp.add, [x for _, x, _ in parts])
    dv_acc[row] += functools.reduce(jnp.add, [x for _, _, x in parts])

  def of_any(tiles):
    tiles = [(row, jnp.minimum(block, query_blocks - 1), block) for row, block in tiles]
    made = [first_products(row, block) for row, block, _ in tiles]
    for (row, block, listed), x in zip(tiles, made):
      of_queries, of_keys, of_values = last_products(row, block, *x, masked=True, listed=listed)
      dq[0, 0, block] += of_queries
      dk_acc[row] += of_keys
      dv_acc[row] += of_values

  run(jobs, per_trip, of_one_row, of_any)

  def finish(r, _):
    dk[0, 0, 0, r] = dk_acc[r].astype(dk.dtype)
    dv[0, 0, 0, r] = dv_acc[r].astype(dv.dtype)
    return 0

  jax.lax.fori_loop(0, count, finish, 0)


def backward(
  jobs: jax.Array,
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
  **compiler: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Unscaled gradients of every query head, from the queries of a range.

  Letters as in the forward pass, with the range over queries: X query blocks, Y steps of c key
  blocks.

  Args:
    jobs: i32 ``[batch_lists * head_lists * Y, 1, W]`` as in the forward pass, of key rows and query
      blocks. Block X is no block: tiles that fill up the last trip.
    q, do: ``[B,N,X,H,bq]``, ``[B,N,X,Hv,bq]``.
    lse, di: f32 ``[B,N,X+1,bq]``: of base 2, +inf in rows that see nothing and in the last;
      ``sum(do * out)`` less the cotangent of lse.
    k, v: ``[B,K,Y,c,bk,H]``, ``[B,K,Y,c,bk,Hv]``. k_t: ``[B,K,Y,c,H,bk]``.
    ids: i32 ``[B,X,bq]`` and ``[B,Y,c,bk]``.

  Returns:
    dq f32 ``[B,N,X,H,bq]``, dk ``[B,N,Y,c,H,bk]`` and dv ``[B,N,Y,c,Hv,bk]`` in sum_dtype.
  """
  B, N, X, H, bq = q.shape
  K, Y, c, bk = k.shape[1:5]
  Hv, W = v.shape[5], jobs.shape[-1]
  G = N // K

  def of_step(b, n, y):
    of_batch = b if batch_lists > 1 else 0
    of_head = jax.lax.div(n, N // head_lists)
    return ((of_batch * head_lists + of_head) * Y + y, 0, 0)

  def staying(*shape):
    index = (0,) * len(shape)
    return pl.BlockSpec((1, 1, *shape), lambda b, n, y: (b, n, *index))

  def passing(*shape):
    return pl.BlockSpec((1, 1, 1, c, *shape), lambda b, n, y: (b, jax.lax.div(n, G), y, 0, 0, 0))

  def summed(*shape):
    return pl.BlockSpec((1, 1, 1, c, *shape), lambda b, n, y: (b, n, y, 0, 0, 0))

  in_specs = [
    pl.BlockSpec((1, 1, W), of_step, memory_space=pltpu.SMEM),
    staying(X, H, bq), staying(X, Hv, bq), staying(X + 1, bq), staying(X + 1, bq),
    passing(bk, H), passing(H, bk), passing(bk, Hv),
  ]  # fmt: skip
  if ids is not None:
    in_specs.append(pl.BlockSpec((1, X, bq), lambda b, n, y: (b, 0, 0)))
    in_specs.append(pl.BlockSpec((1, 1, c, bk), lambda b, n, y: (b, y, 0, 0)))
  tiles = B * N * Y * (W - HEADER)  # at most
  return _tpu.call(
    functools.partial(_kernel, rule=rule, per_trip=per_trip, has_ids=ids is not None),
    name="block_sparse_backward",
    out_shape=(
      jax.ShapeDtypeStruct(q.shape, jnp.float32),
      jax.ShapeDtypeStruct((B, N, Y, c, H, bk), sum_dtype),
      jax.ShapeDtypeStruct((B, N, Y, c, Hv, bk), sum_dtype),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0,
      grid=(B, N, Y),
      in_specs=in_specs,
      out_specs=(staying(X, H, bq), summed(H, bk), summed(Hv, bk)),
      scratch_shapes=[pltpu.VMEM((c, H, bk), jnp.float32), pltpu.VMEM((c, Hv, bk), jnp.float32)],
    ),
    dimension_semantics=("parallel", "parallel", "arbitrary"),
    flops=2 * tiles * bq * bk * (3 * H + 2 * Hv),
    bytes_accessed=2 * q.nbytes + do.nbytes + G * (k.nbytes + k_t.nbytes + v.nbytes) * 2,
    transcendentals=tiles * bq * bk,
    disable_bounds_checks=True,
    **compiler,
  )(jobs, q, do, lse, di, k, k_t, v, *(ids or ()))
