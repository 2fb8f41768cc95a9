# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on TPUs: layouts and gradients around the two Mosaic kernels.

XLA lays arrays out in blocks, transposed as the kernels want them (once, in passing: head-major
copies are needed anyway), kernels do the rest. What a kernel keeps in VMEM is a head's K and V, or
in the backward pass its queries; longer sequences are cut into ranges that fit, lists with them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _tpu
from pallas_kernels._dispatch import Unsupported, require_tpu
from pallas_kernels.block_sparse_attention._tpu_backward import backward
from pallas_kernels.block_sparse_attention._tpu_forward import (
  LN2,
  LOG2E,
  MAX_ROWS,
  ROW_BITS,
  Rule,
  forward,
)
from pallas_kernels.block_sparse_attention.lists import Lists, compact, tile_lists
from pallas_kernels.block_sparse_attention.pattern import BlockPattern

_KEYS_PER_TRIP = 512
_QUERIES_PER_TRIP = 256
_TOKENS_PER_STEP = 1024
_BLOCK = 512  # where the call brings no pattern
_LARGEST = 1024


@dataclasses.dataclass(frozen=True)
class TPUConfig:
  """How the TPU kernels go through the lists; block sizes are the pattern's.

  Attributes:
    tiles_per_trip: key blocks a trip of the forward loop takes; None: as many as make 512 keys.
    backward_tiles_per_trip: the same for query blocks, backward; None: as many as make 256 queries.
    rows_per_step: most rows of the lists that one grid step takes; None: as many as make 1,024
      tokens and take a quarter of the chip's VMEM.
    resident_bytes: VMEM for what stays there over many rows (forward: K and V, backward: queries,
      cotangents, dq); None: half of the chip's. Longer sequences are cut into ranges, one
      call of the kernel each.
  """

  tiles_per_trip: int | None = None
  backward_tiles_per_trip: int | None = None
  rows_per_step: int | None = None
  resident_bytes: int | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      optional = field.default is None
      if not (value is None and optional) and (not isinstance(value, int) or value < 1):
        raise ValueError(
          f"TPUConfig: {field.name} is {value!r}, expected a whole number of at least 1"
          f"{' or None' if optional else ''}."
        )


class Layout(NamedTuple):
  """Grid steps and rows of the lists in each; ranges and blocks in each that stay in VMEM."""

  steps: int
  rows: int
  ranges: int
  blocks: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything static about a call."""

  rule: Rule
  config: TPUConfig
  block_max: bool
  interpret: Any
  chip: _tpu.Chip

  @property
  def compiler(self) -> dict[str, Any]:
    return dict(interpret=self.interpret, vmem_limit_bytes=self.chip.vmem_bytes * 15 // 16)

  @property
  def forward_tiles(self) -> int:
    return self.config.tiles_per_trip or max(_KEYS_PER_TRIP // self.rule.block_kv, 1)

  @property
  def backward_tiles(self) -> int:
    return self.config.backward_tiles_per_trip or max(_QUERIES_PER_TRIP // self.rule.block_q, 1)

  def forward_layout(self, T: int, S: int, H: int, Hv: int, dtype: Any) -> Layout:
    """Query blocks pass, K and V stay."""
    size, rule = jnp.dtype(dtype).itemsize, self.rule
    passing = rule.block_q * (2 * size * H + 12 * Hv)  # q, out and its sum
    staying = rule.block_kv * 2 * size * (H + Hv)
    return self._layout(rule.block_q, T, passing, rule.block_kv, S, staying, size)

  def backward_layout(self, T: int, S: int, H: int, Hv: int, dtype: Any) -> Layout:
    """Key blocks pass; queries, cotangents and dq stay."""
    size, rule = jnp.dtype(dtype).itemsize, self.rule
    passing = rule.block_kv * (2 * size * (2 * H + Hv) + 12 * (H + Hv))
    staying = rule.block_q * 2 * (size * (H + Hv) + 4 * H)
    return self._layout(rule.block_kv, S, passing, rule.block_q, T, staying, size)

  def _layout(self, row, row_tokens, passing, block, block_tokens, staying, size) -> Layout:
    """``passing``, ``staying``: VMEM of a row and of a block, with the copy under way."""
    rows, blocks = -(-row_tokens // row), -(-block_tokens // block)
    vmem = self.chip.vmem_bytes * 7 // 8
    c = self.config.rows_per_step or min(_TOKENS_PER_STEP // row, vmem // 4 // passing)
    c = max(min(c, rows, MAX_ROWS - 1), 1)
    # A tile of logits is held several times over: seen in the compiler's placement of spills.
    tiles = max(self.forward_tiles, self.backward_tiles) * row * block * (12 if size < 4 else 28)
    free = vmem - c * passing - tiles
    if free < staying:
      raise Unsupported(
        f"block_sparse_attention: mosaic_tpu needs {c * passing + tiles + staying} bytes of VMEM "
        f"for blocks of {self.rule.block_q} x {self.rule.block_kv} and the compiler has {vmem} on "
        f"{self.chip.name}; use smaller blocks or implementation='xla'."
      )
    fit = max(min(self.config.resident_bytes or vmem // 2, free) // staying, 1)
    ranges = -(-blocks // fit)
    return Layout(-(-rows // c), c, ranges, -(-blocks // ranges))


def block_sparse_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  blocks: BlockPattern | None,
  segment_ids: tuple[jax.Array, jax.Array] | None,
  *,
  causal: bool,
  window: int | None,
  logit_cap: float | None,
  scale: float,
  block_max: bool,
  config: TPUConfig | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """See ``pallas_kernels.block_sparse_attention``."""
  rule = {"causal": causal, "window": window, "logit_cap": logit_cap, "scale": scale}
  return _attend(*_planned(q, k, v, blocks, segment_ids, config, block_max=block_max, **rule))


def block_sparse_attention_gradients(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  blocks: BlockPattern | None,
  segment_ids: tuple[jax.Array, jax.Array] | None,
  lse: jax.Array,
  dout: jax.Array,
  delta: jax.Array,
  *,
  config: TPUConfig | None,
  **rule: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  plan, q, k, v, lists, ids = _planned(q, k, v, blocks, segment_ids, config, **rule)
  return _gradients(plan, q, k, v, lists[1], ids, lse, dout, delta)


def _planned(
  q, k, v, blocks, segment_ids, config, *, causal, window, logit_cap, scale, block_max=False
):
  """What ``_attend`` takes."""
  interpret = require_tpu("block_sparse_attention")
  T, S = q.shape[1], k.shape[1]
  if blocks is None:
    # All tiles of the rule. jax's splash attention serves such a mask too; by the schedules of both
    # it takes 1.6 times the cycles at these blocks (static_cost --against splash), gives no
    # gradient through lse, and wants every query to see a key.
    block = min(_BLOCK, -(-max(T, S) // _tpu.LANES) * _tpu.LANES)
    blocks = BlockPattern.from_rule(
      T, S, block_q=block, block_kv=block, causal=causal, window=window
    )
  block_q, block_kv = blocks.block_q, blocks.block_kv
  tail = S % block_kv != 0 and not causal  # else no query of the T sees keys past S
  rule = Rule(T, S, block_q, block_kv, causal, window, tail, logit_cap, scale)
  plan = Plan(rule, config or TPUConfig(), block_max, interpret, _tpu.chip())
  _check(q, k, v, plan)
  lists = tile_lists(blocks, T=T, S=S, causal=causal, window=window, segment_ids=segment_ids)
  if segment_ids is not None:
    segment_ids = tuple(jnp.broadcast_to(x, (q.shape[0], x.shape[1])) for x in segment_ids)
  return plan, q, k, v, lists, segment_ids


def _check(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> None:
  dtype, rule = jnp.result_type(q, k, v), plan.rule
  if dtype not in (jnp.bfloat16, jnp.float32):
    raise Unsupported(
      f"block_sparse_attention: mosaic_tpu computes in bfloat16 or float32, got {dtype}; cast the "
      "inputs or use implementation='xla'."
    )
  for name, size in (("block_q", rule.block_q), ("block_kv", rule.block_kv)):
    if size % _tpu.LANES or size > _LARGEST:
      raise Unsupported(
        f"block_sparse_attention: mosaic_tpu takes blocks of a multiple of {_tpu.LANES} tokens up "
        f"to {_LARGEST}, got {name}={size}; use such blocks or implementation='xla'."
      )
  sizes = q.shape[1], k.shape[1], k.shape[3], v.shape[3], dtype
  plan.backward_layout(*sizes)
  if plan.block_max and plan.forward_layout(*sizes).ranges > 1:
    raise Unsupported(
      "block_sparse_attention: mosaic_tpu gives block_max where K and V of a head stay in VMEM "
      f"and {k.shape[1]} keys don't; raise TPUConfig.resident_bytes or use implementation='xla'."
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, lists, ids):
  return _forward(plan, q, k, v, lists, ids)[0]


def _forward(plan: Plan, q, k, v, lists: tuple[Lists, Lists], ids):
  rule, dtype = plan.rule, jnp.result_type(q, k, v)
  B, T, N, _ = q.shape
  S, H, Hv = k.shape[1], k.shape[3], v.shape[3]
  Y, c, R, X = plan.forward_layout(T, S, H, Hv, dtype)
  queries = _lanes((q.astype(jnp.float32) * rule.query_scale).astype(dtype), rule.block_q, (Y, c))
  q_ids, kv_ids = _ids(ids, (rule.block_q, Y, c), (rule.block_kv, R, X))

  def attend(jobs, keys, values, kv_ids):
    return forward(
      jobs, queries, keys, values, None if ids is None else (q_ids, kv_ids),
      rule=rule, per_trip=plan.forward_tiles, batch_lists=lists[0].num.shape[0],
      head_lists=lists[0].num.shape[1], block_max=plan.block_max,
      out_dtype=dtype if R == 1 else jnp.float32, **plan.compiler,
    )  # fmt: skip

  def merge(carry, of_range):  # attention to disjoint keys: each weighs by its share of the mass
    out, lse = carry
    more, of_more, _ = attend(*of_range)
    top = jnp.maximum(lse, of_more)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    weights = jnp.exp(lse - top), jnp.exp(of_more - top)
    mass = weights[0] + weights[1]
    some = mass > 0
    safe = jnp.where(some, mass, 1.0)
    parts = [(w / safe)[..., None, :] * x for w, x in zip(weights, (out, more))]
    return (parts[0] + parts[1], jnp.where(some, top + jnp.log(safe), -jnp.inf)), None

  xs = (
    _jobs(lists[0], R, X, c, Y, plan.forward_tiles, filler=c),
    jnp.moveaxis(_sublanes(k.astype(dtype), rule.block_kv, (R, X)), 2, 0),
    jnp.moveaxis(_lanes(v.astype(dtype), rule.block_kv, (R, X)), 2, 0),
    None if ids is None else jnp.moveaxis(kv_ids, 1, 0),
  )
  out, lse, peak = attend(*jax.tree.map(lambda x: x[0], xs))
  if R > 1:
    (out, lse), _ = jax.lax.scan(merge, (out, lse), jax.tree.map(lambda x: x[1:], xs))
  out = _tokens(out, T).astype(q.dtype)
  lse = lse.reshape(B, N, -1)[..., :T]
  if peak is not None:
    peak = peak.reshape(B, N, Y * c, -1)
    peak = peak[:, :, : -(-T // rule.block_q), : -(-S // rule.block_kv)]
  return (out, lse, peak), (q, k, v, out, lse, lists, ids)


def _backward(plan: Plan, saved, cotangents):
  q, k, v, out, lse, (_, lists), ids = saved
  dout, dlse, _ = cotangents  # the largest weight of a tile is a target, not a path of gradients
  di = jnp.einsum("btnh,btnh->bnt", dout.astype(jnp.float32), out.astype(jnp.float32))
  gradients = _gradients(plan, q, k, v, lists, ids, lse, dout, di - dlse)
  return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v))), None, None


def _gradients(plan: Plan, q, k, v, lists: Lists, ids, lse, dout, di):
  """Of q, k and v, in float32; ``lists`` are the transposed ones."""
  rule, dtype = plan.rule, jnp.result_type(q, k, v)
  B, T, N, H = q.shape
  S, K, Hv = k.shape[1], k.shape[2], v.shape[-1]
  Y, c, R, X = plan.backward_layout(T, S, H, Hv, dtype)
  scaled = (q.astype(jnp.float32) * rule.query_scale).astype(dtype)
  some = lse > -jnp.inf
  di = jnp.where(some, di, 0.0)
  base2 = jnp.where(some, lse * LOG2E, jnp.inf)
  keys = _sublanes(k.astype(dtype), rule.block_kv, (Y, c))
  keys_t, values = keys.swapaxes(-1, -2), _sublanes(v.astype(dtype), rule.block_kv, (Y, c))
  q_ids, kv_ids = _ids(ids, (rule.block_q, R, X), (rule.block_kv, Y, c))

  def rows_of(x, nothing):  # [B,N,R,X+1,block_q]: the last row of a range weighs nothing
    x = _padded(x, 2, R * X * rule.block_q, nothing).reshape(B, N, R, X, rule.block_q)
    return _padded(x, 3, X + 1, nothing)

  def add(sums, of_range):
    jobs, queries, cotangents, base2, di, q_ids = of_range
    dq, *more = backward(
      jobs, queries, cotangents, base2, di, keys, keys_t, values,
      None if ids is None else (q_ids, kv_ids),
      rule=rule, per_trip=plan.backward_tiles, batch_lists=lists.num.shape[0],
      head_lists=lists.num.shape[1], sum_dtype=dtype if N == K and R == 1 else jnp.float32,
      **plan.compiler,
    )  # fmt: skip
    more = [x.reshape(B, K, N // K, *x.shape[2:]) for x in more]  # query heads of a key head
    more = [jnp.sum(x, axis=2, dtype=jnp.float32) for x in more]
    return [x + y for x, y in zip(sums, more)] if sums else more, dq

  xs = (
    _jobs(lists, R, X, c, Y, plan.backward_tiles, filler=X << ROW_BITS),
    *(
      jnp.moveaxis(x, 2, 0)
      for x in (
        _lanes(scaled, rule.block_q, (R, X)),
        _lanes(dout.astype(dtype), rule.block_q, (R, X)),
        rows_of(base2, jnp.inf),
        rows_of(di, 0.0),
      )
    ),
    None if ids is None else jnp.moveaxis(q_ids, 1, 0),
  )
  (dk, dv), dq = add((), jax.tree.map(lambda x: x[0], xs))
  dq = dq[None]
  if R > 1:  # one range after the other: sums for each of them would not fit in memory
    (dk, dv), rest = jax.lax.scan(add, [dk, dv], jax.tree.map(lambda x: x[1:], xs))
    dq = jnp.concatenate([dq, rest])
  key_scale = LN2 if rule.logit_cap is None else rule.logit_cap
  dq = _tokens(jnp.moveaxis(dq, 0, 2), T) * rule.scale
  return dq, _tokens(dk, S) * key_scale, _tokens(dv, S)


_attend.defvjp(_forward, _backward)


def _padded(x: jax.Array, axis: int, size: int, value: Any = 0) -> jax.Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, constant_values=value)


def _blocks(x: jax.Array, block: int, split: tuple[int, int]) -> jax.Array:
  """``[B,T,N,H]`` as ``[B,Y,c,block,N,H]``, zeros behind."""
  x = _padded(x, 1, split[0] * split[1] * block)
  return x.reshape(x.shape[0], *split, block, *x.shape[2:])


def _sublanes(x: jax.Array, block: int, split: tuple[int, int]) -> jax.Array:
  """``[B,N,Y,c,block,H]``: tokens along sublanes."""
  return _blocks(x, block, split).transpose(0, 4, 1, 2, 3, 5)


def _lanes(x: jax.Array, block: int, split: tuple[int, int]) -> jax.Array:
  """``[B,N,Y,c,H,block]``: tokens along lanes."""
  return _blocks(x, block, split).transpose(0, 4, 1, 2, 5, 3)


def _tokens(x: jax.Array, length: int) -> jax.Array:
  """``[B,N,Y,c,H,block]`` as ``[B,T,N,H]``."""
  B, N, Y, c, H, block = x.shape
  return x.transpose(0, 2, 3, 5, 1, 4).reshape(B, Y * c * block, N, H)[:, :length]


def _ids(ids, queries: tuple[int, int, int], keys: tuple[int, int, int]):
  """Ids of queries and of keys in blocks, -1 behind."""
  if ids is None:
    return None, None
  made = []
  for x, (block, *split) in zip(ids, (queries, keys)):
    x = _padded(x.astype(jnp.int32), 1, split[0] * split[1] * block, -1)
    made.append(x.reshape(x.shape[0], *split, block))
  return tuple(made)


def _jobs(
  lists: Lists, ranges: int, size: int, c: int, steps: int, per_trip: int, filler: int
) -> jax.Array:
  """i32 ``[ranges, Bm*Hm*steps, 1, 3 + W]``: what each grid step has to do, tile by tile.

  First the trips that take full tiles of one row only, then what is left of all c rows of the step,
  one after the other; ``filler`` completes the last trip. Before them: the number of trips of the
  first kind, of both, and the first block of the range. A range lists what of a row's list is in
  it, counted from its first block.
  """
  num_full, num, idx = (x[:, :, None] for x in lists)  # [Bm,Hm,1,Nx(,C)]
  if ranges > 1:
    first = jnp.arange(ranges, dtype=jnp.int32)[:, None, None] * size
    slot = jnp.arange(idx.shape[-1])
    inside = (slot < num[..., None]) & (idx >= first) & (idx < first + size)
    full = slot < num_full[..., None]
    num, idx = compact(jnp.where(full, 0, 1), inside, idx - first)
    num_full = jnp.sum(inside & full, axis=-1, dtype=jnp.int32)
    idx = idx[..., : min(size, idx.shape[-1])]
  C = idx.shape[-1]
  of_step = (*idx.shape[:3], steps, c)
  num_full, num = (_padded(x, 3, steps * c).reshape(of_step) for x in (num_full, num))
  idx = _padded(idx, 3, steps * c).reshape(*of_step[:-1], c * C)

  num_full = num_full // per_trip * per_trip
  full_end = jnp.cumsum(num_full, axis=-1)
  rest_end = full_end[..., -1:] + jnp.cumsum(num - num_full, axis=-1)
  count = rest_end[..., -1:]
  at = jnp.arange(-(-c * C // per_trip) * per_trip, dtype=jnp.int32)

  def row_and_slot(end, length):  # of the entry at each place, in one half of the joined list
    row = jnp.sum(at >= end[..., None], axis=-2, dtype=jnp.int32)
    row = jnp.minimum(row, c - 1)
    return row, at - jnp.take_along_axis(end - length, row, axis=-1)

  full_row, full_slot = row_and_slot(full_end, num_full)
  row, slot = row_and_slot(rest_end, num - num_full)
  slot = slot + jnp.take_along_axis(num_full, row, axis=-1)
  is_full = at < full_end[..., -1:]
  row, slot = jnp.where(is_full, full_row, row), jnp.where(is_full, full_slot, slot)
  block = jnp.take_along_axis(idx, jnp.clip(row * C + slot, 0, c * C - 1), axis=-1)
  jobs = jnp.where(at < count, block << ROW_BITS | row, filler)
  plain, trips = full_end[..., -1:] // per_trip, (count + per_trip - 1) // per_trip
  first = jnp.arange(ranges, dtype=jnp.int32)[:, None, None] * size
  first = jnp.broadcast_to(first, plain.shape)
  jobs = jnp.moveaxis(jnp.concatenate([plain, trips, first, jobs], axis=-1), 2, 0)
  return jobs.reshape(ranges, -1, 1, jobs.shape[-1])
