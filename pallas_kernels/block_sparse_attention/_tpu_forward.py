# SPDX-License-Identifier: Apache-2.0
"""Forward TPU kernel: one query block at a time walks its list of key blocks.

Everything is transposed: logits are ``s = k q^T`` of ``[block_kv, block_q]``, so that

* a query is a lane: maximum and sum over keys are sums of registers, with no reduction over lanes,
  and the running maximum of a block of queries is one row;
* the second product is ``o^T += v^T p``: p is used as it was made, in the dtype of v.

K and V^T of a head (or of a range of its keys) stay in VMEM while all query blocks of all heads
that share them pass by: a tile costs no copy and no grid step, only its arithmetic, and trip counts
are data. Tiles go several to a trip, so that the softmax of one runs under the products of another:
first full tiles of one row, under one maximum; then what is left of all rows of the step, masked,
each tile with a maximum of its own, so that rows of few tiles cost as many trips as their tiles
need together.
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
HEADER = 3  # entries before a step's jobs
ROW_BITS = 8  # of a packed job
MAX_ROWS = 1 << ROW_BITS
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


def unpack(job: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Row within its step, and block, of an entry of the job lists (``mosaic_tpu`` packs them)."""
  return job & (MAX_ROWS - 1), jax.lax.shift_right_logical(job, ROW_BITS)


def run(jobs, per_trip: int, of_one_row, of_any) -> None:
  """The trips of a step: ``of_one_row(row, blocks)`` of full tiles, then ``of_any(tiles)``."""
  first, trips = jobs[0, 0, 0], jobs[0, 0, 1]

  def tiles(t):
    return [unpack(jobs[0, 0, HEADER + t * per_trip + n]) for n in range(per_trip)]

  def full(t, _):
    listed = tiles(t)
    of_one_row(listed[0][0], [block for _, block in listed])
    return 0

  def rest(t, _):
    of_any(tiles(t))
    return 0

  jax.lax.fori_loop(0, first, full, 0)
  jax.lax.fori_loop(first, trips, rest, 0)


def _kernel(jobs, q, k, v, *refs, rule: Rule, per_trip: int, has_ids: bool, block_max: bool):
  refs = list(refs)
  q_ids, kv_ids = (refs.pop(0), refs.pop(0)) if has_ids else (None, None)
  out, lse = refs.pop(0), refs.pop(0)
  peaks = refs.pop(0) if block_max else None
  acc, top, total = refs[:3]
  tops = refs[3] if block_max else None
  count, key_base = q.shape[3], jobs[0, 0, 2]
  query_base = pl.program_id(3) * count

  def clear(r, _):
    acc[r] = jnp.zeros(acc.shape[1:], acc.dtype)
    top[r] = jnp.full(top.shape[1:], FLOOR, top.dtype)
    total[r] = jnp.zeros(total.shape[1:], total.dtype)
    if block_max:
      tops[r] = jnp.full(tops.shape[1:], -jnp.inf, tops.dtype)
    return 0

  jax.lax.fori_loop(0, count, clear, 0)

  def logits(row, block):
    return rule.logits(product(k[0, 0, block], q[0, 0, 0, row]))[0]

  def sum_keys(p):  # apart in the eight sublanes until the end
    return jnp.sum(p.reshape(-1, _tpu.SUBLANES, p.shape[-1]), axis=0)

  def of_one_row(row, blocks):
    made = [logits(row, block) for block in blocks]
    if block_max:
      for block, s in zip(blocks, made):
        tops[row, pl.ds(block, 1), :] = jnp.max(s, axis=0, keepdims=True)
    highest = jnp.max(functools.reduce(jnp.maximum, made), axis=0, keepdims=True)
    before = top[row]
    now = jnp.maximum(before, highest)
    fade = jnp.exp2(before - now)
    weights = [jnp.exp2(s - now) for s in made]
    parts = [product(v[0, 0, block], p.astype(v.dtype)) for block, p in zip(blocks, weights)]
    top[row] = now
    total[row] = fade * total[row] + sum_keys(functools.reduce(jnp.add, weights))
    acc[row] = fade * acc[row] + functools.reduce(jnp.add, parts)

  def of_any(tiles):
    # Each tile has a softmax of its own, so that none waits for another; then they are merged. All
    # first products come first: in this order the compiler overlaps the tiles best.
    tiles = [(row, jnp.minimum(row, count - 1), block) for row, block in tiles]
    made = [logits(query, block) for _, query, block in tiles]
    parts = []
    for (row, query, block), s in zip(tiles, made):
      ids = None
      if has_ids:
        ids = q_ids[0, 0, pl.ds(query, 1), :], kv_ids[0, pl.ds(block, 1), :]
      seen = rule.visible(query_base + query, key_base + block, ids)
      s = s if seen is None else jnp.where(seen, s, -jnp.inf)
      highest = jnp.max(s, axis=0, keepdims=True)
      if block_max:
        tops[row, pl.ds(block, 1), :] = highest
      own = jnp.maximum(highest, FLOOR)
      p = jnp.exp2(s - own)
      parts.append((row, own, sum_keys(p), product(v[0, 0, block], p.astype(v.dtype))))
    for row, own, mass, part in parts:
      before = top[row]
      now = jnp.maximum(before, own)
      fade, share = jnp.exp2(before - now), jnp.exp2(own - now)
      top[row] = now
      total[row] = fade * total[row] + share * mass
      acc[row] = fade * acc[row] + share * part

  run(jobs, per_trip, of_one_row, of_any)

  def finish(r, _):
    mass = jnp.sum(total[r], axis=0, keepdims=True)
    some = mass > 0
    share = jnp.where(some, 1.0 / jnp.where(some, mass, 1.0), 0.0)
    out[0, 0, 0, r] = (acc[r] * share).astype(out.dtype)
    log_sum = (top[r] + jnp.log2(jnp.where(some, mass, 1.0))) * LN2
    lse[0, 0, 0, pl.ds(r, 1), :] = jnp.where(some, log_sum, -jnp.inf)
    if block_max:
      lane = jax.lax.broadcasted_iota(jnp.int32, (1, rule.block_q), 1)
      real = lane < rule.T - (query_base + r) * rule.block_q
      peak = jnp.exp2(tops[r] - top[r]) * jnp.where(real, share, 0.0)
      peak = jnp.max(peak, axis=1, keepdims=True)  # [blocks,1]
      peak = jnp.broadcast_to(peak, (peak.shape[0], _tpu.LANES)).T[:1]
      peaks[0, 0, 0, pl.ds(r, 1), :] = peak
    return 0

  jax.lax.fori_loop(0, count, finish, 0)


def forward(
  jobs: jax.Array,
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
  **compiler: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Attention of every query block to the listed ones of a range of key blocks.

  Letters: G query heads of each of K key heads; X key blocks in the range; Y steps of c query
  blocks (bq, bk tokens).

  Args:
    jobs: i32 ``[batch_lists * head_lists * Y, 1, W]``: trips of full tiles of one row, trips in
      all, first block of the range, and a step's tiles packed. Row c is no row: tiles that fill up
      the last trip.
    q: ``[B,K*G,Y,c,H,bq]``. k: ``[B,K,X,bk,H]``. v: ``[B,K,X,Hv,bk]``.
    ids: i32 ``[B,Y,c,bq]`` and ``[B,X,bk]``.

  Returns:
    out ``[B,K*G,Y,c,Hv,bq]``, lse f32 ``[B,K*G,Y,c,bq]``, and with block_max the largest attention
    weight of each tile, f32 ``[B,K*G,Y,c,X]`` (X rounded up), 0 if not listed.
  """
  B, N, Y, c, H, bq = q.shape
  K, X, bk = k.shape[1:4]
  Hv, W = v.shape[3], jobs.shape[-1]
  G = N // K

  def of_step(b, kh, g, y):
    of_batch = b if batch_lists > 1 else 0
    of_head = jax.lax.div(kh * G + g, N // head_lists)
    return ((of_batch * head_lists + of_head) * Y + y, 0, 0)

  def passing(*shape):
    index = (0,) * len(shape)
    return pl.BlockSpec((1, 1, 1, *shape), lambda b, kh, g, y: (b, kh * G + g, y, *index))

  def staying(*shape):
    return pl.BlockSpec((1, 1, *shape), lambda b, kh, g, y: (b, kh, 0, 0, 0))

  in_specs = [
    pl.BlockSpec((1, 1, W), of_step, memory_space=pltpu.SMEM),
    passing(c, H, bq),
    staying(X, bk, H),
    staying(X, Hv, bk),
  ]
  if ids is not None:
    in_specs.append(pl.BlockSpec((1, 1, c, bq), lambda b, kh, g, y: (b, y, 0, 0)))
    in_specs.append(pl.BlockSpec((1, X, bk), lambda b, kh, g, y: (b, 0, 0)))
  out_shape = [
    jax.ShapeDtypeStruct((B, N, Y, c, Hv, bq), out_dtype),
    jax.ShapeDtypeStruct((B, N, Y, c, bq), jnp.float32),
  ]
  out_specs = [passing(c, Hv, bq), passing(c, bq)]
  scratch = [
    pltpu.VMEM((c + 1, Hv, bq), jnp.float32),
    pltpu.VMEM((c + 1, 1, bq), jnp.float32),
    pltpu.VMEM((c + 1, _tpu.SUBLANES, bq), jnp.float32),
  ]
  if block_max:
    most = pl.cdiv(X, _tpu.LANES) * _tpu.LANES
    out_shape.append(jax.ShapeDtypeStruct((B, N, Y, c, most), jnp.float32))
    out_specs.append(passing(c, most))
    scratch.append(pltpu.VMEM((c + 1, most, bq), jnp.float32))

  tiles = B * N * Y * (W - HEADER)  # at most: how many, only the lists know
  outputs = _tpu.call(
    functools.partial(
      _kernel, rule=rule, per_trip=per_trip, has_ids=ids is not None, block_max=block_max
    ),
    name="block_sparse_forward",
    out_shape=tuple(out_shape),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0,
      grid=(B, K, G, Y),
      in_specs=in_specs,
      out_specs=tuple(out_specs),
      scratch_shapes=scratch,
    ),
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    flops=2 * tiles * bq * bk * (H + Hv),
    bytes_accessed=q.nbytes + k.nbytes + v.nbytes + jobs.nbytes + 2 * q.nbytes,
    transcendentals=tiles * bq * bk,
    disable_bounds_checks=True,
    **compiler,
  )(jobs, q, k, v, *(ids or ()))
  return outputs if block_max else (*outputs, None)
