# SPDX-License-Identifier: Apache-2.0
"""Tree attention on a TPU: the cache stays in HBM and only its live, visible tiles are fetched.

One grid step serves one batch row, one key/value head and a tile of query rows (the nodes of the
head's whole query group, folded). It walks the row's tiles of the cache in a loop with two buffers
and its own copies: so a dead tile costs nothing, and all but the last one (and those at a window's
edge) run without mask code. The nodes come last, under their ancestor bits.

With few rows the logits are ``[rows, slots]``. With many they are ``[slots, rows]``: row statistics
then lie along lanes and reductions go over sublanes, mostly plain vector maxima and sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu
from pallas_kernels._dispatch import require_tpu
from pallas_kernels.tree_attention import xla
from pallas_kernels.tree_attention._common import (
  TPUConfig,
  boolean,
  fold,
  pack_ancestors,
  unfold,
  with_prefix,
)

_LOG2E = math.log2(math.e)
_FLOOR = -1e30  # running maximum before anything was seen: finite, so differences are no NaN


@dataclasses.dataclass(frozen=True)
class Rules:
  """What is fixed at trace time."""

  scale: float
  window: int | None
  logit_cap: float | None
  config: TPUConfig
  interpret: Any


def tree_attention(
  q, k_cache, v_cache, length, k_nodes, v_nodes, ancestors, position, prefix, *,
  scale, window, logit_cap, cache_layout, config=None,
):  # fmt: skip
  """See the public function; ``position [B,M]`` is given iff ``window`` is."""
  interpret = require_tpu("tree_attention")
  rules = Rules(scale, window, logit_cap, config or TPUConfig(), interpret)
  if cache_layout == "BSKH":
    k_cache, v_cache = k_cache.swapaxes(1, 2), v_cache.swapaxes(1, 2)
  words = ancestors if ancestors.dtype == jnp.uint32 else pack_ancestors(ancestors)
  own = attend(rules, q, k_cache, v_cache, length, k_nodes, v_nodes, words, position)

  def alone(q, k, v, length, position):
    return attend(rules, q, k, v, length, None, None, None, position)

  return with_prefix(alone, q, own, prefix, position)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(rules, q, k_cache, v_cache, length, k_nodes, v_nodes, words, position):
  """``(out [B,M,N,Hv], lse [B,N,M])``; the cache is heads-first; nodes may be None (no nodes)."""
  return _forward(rules, q, k_cache, v_cache, length, k_nodes, v_nodes, words, position)


def _attend_fwd(rules, *args):
  out, lse = _forward(rules, *args)
  return (out, lse), (*args, out, lse)


def _attend_bwd(rules, saved, cotangents):
  *arrays, words, position, out, lse = saved
  among = None if words is None else boolean(words)
  plain = xla.Rules(rules.scale, rules.window, rules.logit_cap, 0)
  return xla.backward(plain, (*arrays, among, position, out, lse), cotangents)


attend.defvjp(_attend_fwd, _attend_bwd)


def _pad(x, axis: int, multiple: int):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, padding) if padding[axis][1] else x


def tiles_of(config: TPUConfig, rows: int, slots: int) -> tuple[bool, int, int]:
  """``(transposed, rows in a tile, slots in a tile)``."""
  count = -(-rows // config.block_rows)
  transposed = config.transposed
  if transposed is None:
    transposed = rows > 256 * count
  unit = _tpu.LANES if transposed else 16
  tile_rows = -(-rows // (count * unit)) * unit
  return transposed, tile_rows, min(config.block_s, -(-max(slots, 1) // 16) * 16)


def _bounds(rules: Rules, tile: int, length, position):
  """int32 ``[B,5]``: live slots; tiles ``a..b`` masked, ``b..c`` without, ``c..d`` masked."""
  end, full_end = (length + tile - 1) // tile, length // tile
  first = full_first = jnp.zeros_like(length)
  if rules.window is not None:
    first = jnp.maximum(jnp.min(position, 1) - rules.window + 1, 0) // tile
    full_first = (jnp.maximum(jnp.max(position, 1) - rules.window + 1, 0) + tile - 1) // tile
  first = jnp.minimum(first, end)
  full_first = jnp.clip(full_first, first, end)
  full_end = jnp.clip(full_end, full_first, end)
  return jnp.stack([length, first, full_first, full_end, end], axis=1)


def _forward(rules: Rules, q, k_cache, v_cache, length, k_nodes, v_nodes, words, position):
  b, m, n, h = q.shape
  heads, width = k_cache.shape[1], v_cache.shape[-1]
  group, dtype, result = n // heads, k_cache.dtype, q.dtype
  rows = group * m
  transposed, tile_rows, tile = tiles_of(rules.config, rows, k_cache.shape[2])
  # Copies start at multiples of 16 rows; a capacity that is no multiple of 16 costs a padded copy.
  k_cache, v_cache = (_pad(x, 2, 16) for x in (k_cache, v_cache.astype(dtype)))
  slots = k_cache.shape[2]
  q = _pad(fold(q, heads).astype(dtype), 2, tile_rows)
  padded = q.shape[2]

  def by_row(x):
    """``[B,M,W] -> [B,rows,W]`` (or ``[B,W,rows]``): node r % M in row r."""
    x = _pad(jnp.tile(x, (1, group, 1)), 1, tile_rows)
    return x.swapaxes(1, 2) if transposed else x

  def row_spec(count):
    if transposed:
      return pl.BlockSpec((1, count, tile_rows), lambda b, k, r, *_: (b, 0, r))
    return pl.BlockSpec((1, tile_rows, count), lambda b, k, r, *_: (b, r, 0))

  def head_spec(x):
    return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, k, r, *_: (b, k, 0, 0))

  operands = [q, k_cache, v_cache]
  in_specs = [
    pl.BlockSpec((1, 1, tile_rows, h), lambda b, k, r, *_: (b, k, r, 0)),
    pl.BlockSpec(memory_space=pl.ANY),
    pl.BlockSpec(memory_space=pl.ANY),
  ]
  if position is not None:
    operands.append(by_row(position[:, :, None]))
    in_specs.append(row_spec(1))
  if words is not None:
    nodes = [_pad(x.swapaxes(1, 2).astype(dtype), 2, _tpu.LANES) for x in (k_nodes, v_nodes)]
    words = by_row(jax.lax.bitcast_convert_type(words, jnp.int32))
    operands += [*nodes, words]
    in_specs += [*map(head_spec, nodes), row_spec(words.shape[1 if transposed else 2])]

  def out(width):
    if transposed:
      shape, index = (width, tile_rows), lambda b, k, r, *_: (b, k, 0, r)
      full = (width, padded)
    else:
      shape, index = (tile_rows, width), lambda b, k, r, *_: (b, k, r, 0)
      full = (padded, width)
    return full, pl.BlockSpec((1, 1, *shape), index)

  (out_shape, out_spec), (lse_shape, lse_spec) = out(width), out(1)
  # Of two cores that share a grid each takes half of its first parallel axis that has two steps.
  chained = b > 1 or _tpu.chip().name not in ("v4", "v5p")
  kernel = functools.partial(
    _kernel, rules=rules, tile=tile, slots=slots, transposed=transposed,
    windowed=position is not None, with_nodes=words is not None, chained=chained,
  )  # fmt: skip
  acc, lse = _tpu.call(
    kernel,
    name="tree_attention_fwd",
    out_shape=[
      jax.ShapeDtypeStruct((b, heads, *out_shape), jnp.float32),
      jax.ShapeDtypeStruct((b, heads, *lse_shape), jnp.float32),
    ],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(b, heads, padded // tile_rows),
      in_specs=in_specs,
      out_specs=[out_spec, lse_spec],
      scratch_shapes=[
        pltpu.VMEM((2, tile, h), dtype),
        pltpu.VMEM((2, tile, width), dtype),
        pltpu.VMEM((width, tile_rows) if transposed else (tile_rows, width), jnp.float32),
        pltpu.VMEM((1, tile_rows) if transposed else (tile_rows, 1), jnp.float32),
        pltpu.VMEM((1, tile_rows) if transposed else (tile_rows, _tpu.LANES), jnp.float32),
        pltpu.SemaphoreType.DMA((2, 2)),
      ],
    ),
    dimension_semantics=("parallel", *(["arbitrary" if chained else "parallel"] * 2)),
    flops=2 * b * heads * rows * (slots + m) * (h + width),
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands) + 4 * q.size,
    transcendentals=b * heads * rows * (slots + m),
    interpret=rules.interpret,
  )(_bounds(rules, tile, length, position), *operands)
  if transposed:
    acc, lse = acc.swapaxes(2, 3), lse.swapaxes(2, 3)
  return unfold(acc[:, :, :rows], m).astype(result), lse[:, :, :rows, 0].reshape(b, n, m)


def _partial_sum(p):
  """``[rows,slots]`` summed over slots as far as plain vector adds go: to ``[rows,128]``."""
  lanes = _tpu.LANES
  if p.shape[1] % lanes:  # a short cache, met in one tile
    lane = jax.lax.broadcasted_iota(jnp.int32, (p.shape[0], lanes), 1)
    return jnp.where(lane == 0, jnp.sum(p, 1, keepdims=True), 0.0)
  return sum(jax.lax.slice_in_dim(p, i, i + lanes, axis=1) for i in range(0, p.shape[1], lanes))


def _kernel(
  bounds, q_ref, k_hbm, v_hbm, *refs, rules: Rules, tile: int, slots: int, transposed: bool,
  windowed: bool, with_nodes: bool, chained: bool,
):  # fmt: skip
  refs = list(refs)
  position_ref = refs.pop(0) if windowed else None
  k_nodes_ref, v_nodes_ref, words_ref = (
    (refs.pop(0) for _ in range(3)) if with_nodes else [None] * 3
  )
  out_ref, lse_ref, k_buffer, v_buffer, acc_ref, top_ref, total_ref, semaphores = refs
  row, head = pl.program_id(0), pl.program_id(1)
  length, first, full_first, full_end, end = (bounds[row, i] for i in range(5))
  key_axis = 0 if transposed else 1  # of the logits
  q = q_ref[0, 0]
  mul = functools.partial(
    jax.lax.dot_general,
    precision=_tpu.precision(q.dtype),
    preferred_element_type=jnp.float32,
  )

  def start_of(i):
    # The last tile of a capacity that is no multiple of the tile begins inside the one before.
    return pl.multiple_of(jnp.minimum(i * tile, slots - tile), 16)

  # Steps of a row follow each other on one core: a step's last fetch is the next step's first tile,
  # so a row waits for memory once and not once a head. Buffers alternate over all its tiles.
  count, tiles_of_rows = end - first, pl.num_programs(2)
  done = (head * tiles_of_rows + pl.program_id(2)) if chained else 0

  def side(i):
    return jax.lax.rem(done * count + i - first, 2)

  def copies(i, head, side):
    at = pl.ds(start_of(i), tile)
    return [
      pltpu.make_async_copy(hbm.at[row, head, at], buffer.at[side], semaphores.at[side, which])
      for which, (hbm, buffer) in enumerate(((k_hbm, k_buffer), (v_hbm, v_buffer)))
    ]

  def fetch(when, i, head, side):
    @pl.when(when)
    def _():
      for copy in copies(i, head, side):
        copy.start()

  def update(k, v, mask=None):
    """One block of keys: the online softmax, in base 2."""
    x = mul(k, q, (((1,), (1,)), ((), ()))) if transposed else mul(q, k, (((1,), (1,)), ((), ())))
    if rules.logit_cap is None:
      x = x * (rules.scale * _LOG2E)
    else:
      x = (rules.logit_cap * _LOG2E) * jnp.tanh(x * (rules.scale / rules.logit_cap))
    if mask is not None:
      x = jnp.where(mask, x, _FLOOR)
    top = top_ref[...]
    new = jnp.maximum(top, jnp.max(x, key_axis, keepdims=True))
    p = jnp.exp2(x - new)
    if mask is not None:
      p = jnp.where(mask, p, 0.0)  # a row without a visible key has new = _FLOOR
    keep = jnp.exp2(top - new)
    top_ref[...] = new
    total_ref[...] = total_ref[...] * keep + (
      jnp.sum(p, 0, keepdims=True) if transposed else _partial_sum(p)
    )
    p = p.astype(v.dtype)
    if transposed:
      gained = mul(v, p, (((0,), (0,)), ((), ())))  # [Hv,rows]
    else:
      gained = mul(p, v, (((1,), (0,)), ((), ())))  # [rows,Hv]
    acc_ref[...] = acc_ref[...] * keep + gained

  def walk(masked, i, carry):
    now, mask = side(i), None
    fetch(i + 1 < end, i + 1, head, 1 - now)
    if chained:
      more = (i + 1 == end) & (done + 1 < pl.num_programs(1) * tiles_of_rows)
      fetch(more, first, jax.lax.div(done + 1, tiles_of_rows), 1 - now)
    for copy in copies(i, head, now):
      copy.wait()
    if masked:
      shape = (tile, q.shape[0]) if transposed else (q.shape[0], tile)
      slot = start_of(i) + jax.lax.broadcasted_iota(jnp.int32, shape, key_axis)
      mask = (slot >= i * tile) & (slot < length)
      if windowed:
        mask = mask & (position_ref[0] - slot < rules.window)
    update(k_buffer[now], v_buffer[now], mask)
    return carry

  fetch((first < end) & (done == 0), first, head, 0)
  top_ref[...] = jnp.full_like(top_ref, _FLOOR)
  total_ref[...] = jnp.zeros_like(total_ref)
  acc_ref[...] = jnp.zeros_like(acc_ref)
  if windowed:
    jax.lax.fori_loop(first, full_first, functools.partial(walk, True), 0)
  jax.lax.fori_loop(full_first, full_end, functools.partial(walk, False), 0)
  jax.lax.fori_loop(full_end, end, functools.partial(walk, True), 0)

  if with_nodes:
    k, v, words = k_nodes_ref[0, 0], v_nodes_ref[0, 0], words_ref[0]
    shape = (k.shape[0], q.shape[0]) if transposed else (q.shape[0], k.shape[0])
    node = jax.lax.broadcasted_iota(jnp.int32, shape, key_axis)
    word = jnp.zeros(shape, jnp.int32)
    for w in range(words.shape[key_axis]):
      mine = jax.lax.slice_in_dim(words, w, w + 1, axis=key_axis)
      word = jnp.where(node >> 5 == w, mine, word)
    update(k, v, (jax.lax.shift_right_logical(word, node & 31) & 1) == 1)

  total = total_ref[...] if transposed else jnp.sum(total_ref[...], 1, keepdims=True)
  seen = total > 0
  safe = jnp.where(seen, total, 1.0)
  out_ref[0, 0] = acc_ref[...] / safe
  lse_ref[0, 0] = jnp.where(seen, (top_ref[...] + jnp.log2(safe)) * (1 / _LOG2E), -jnp.inf)
