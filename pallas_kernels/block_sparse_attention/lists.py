# SPDX-License-Identifier: Apache-2.0
"""Which listed tiles need a mask, which need none, and which hold nothing visible.

A tile is ``block_q`` queries times ``block_kv`` keys. The token rule of the op lets query i see key
j when all of these hold, with ``d = S - T`` (the last query is aligned with the last key):

  causal      j <= i + d
  window W    i + d - j < W
  documents   q_ids[i] == kv_ids[j], neither negative (negative ids are padding)
  length      i < T, j < S

Each rule tells from the corners of a tile, or from the range of its ids, that it hides the whole
tile (skip) or nothing of it (full). A tile is skipped if any rule skips it, full if every rule says
so, else partial. For T = S = 6 and blocks of 2 (0 skip, 1 partial, 2 full):

  causal       1 0 0    with W = 3   1 0 0    with ids 000111   1 0 0
               2 1 0                 1 1 0                      1 1 0
               2 2 1                 0 1 1                      0 1 1

Only index arithmetic on lists: no array here is larger than the pattern itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from pallas_kernels.block_sparse_attention.pattern import BlockPattern

_NONE = jnp.iinfo(jnp.int32).max  # smallest id of a block without any


class Lists(NamedTuple):
  """Visible tiles per block of rows: full ones first, then partial ones, then repeats of the last.

  Forward lists have rows of query blocks that list key blocks; transposed lists the reverse. A
  full tile hides no pair of tokens that exist: in a ragged last query block the rows past T are
  not looked at, so a backward pass must give them no weight (their log-sum-exp is -inf).

  Attributes:
    num_full: i32 ``[Bm,Hm,Nx]``. num: i32 ``[Bm,Hm,Nx]``, full and partial together.
    idx: i32 ``[Bm,Hm,Nx,C]``; 0 in rows with none.
  """

  num_full: jax.Array
  num: jax.Array
  idx: jax.Array


class Ids(NamedTuple):
  """Of each block of tokens: smallest and largest document id, and whether it holds padding."""

  low: jax.Array  # [B,Nx]
  high: jax.Array  # [B,Nx], -1 when all is padding
  padded: jax.Array  # [B,Nx]

  def at(self, block: jax.Array) -> Ids:
    """Those of the blocks numbered ``[B|1,...]``, batch entry by batch entry."""

    def take(x):
      rows = jnp.broadcast_to(block, (x.shape[0], *block.shape[1:]))
      return jax.vmap(lambda values, index: values[index])(x, rows)

    return Ids(*map(take, self))


def block_ids(ids: jax.Array, block: int) -> Ids:
  """The ranges of ``ids [B,T]`` over blocks of ``block`` tokens; a ragged tail adds nothing."""
  batch, length = ids.shape
  absent = jnp.pad(jnp.zeros(ids.shape, bool), ((0, 0), (0, -length % block)), constant_values=True)
  ids = jnp.pad(ids, ((0, 0), (0, -length % block)), constant_values=-1)
  ids, absent = (x.reshape(batch, -1, block) for x in (ids, absent))
  return Ids(
    low=jnp.min(jnp.where(ids >= 0, ids, _NONE), axis=-1),
    high=jnp.max(jnp.maximum(ids, -1), axis=-1),
    padded=jnp.any((ids < 0) & ~absent, axis=-1),
  )


def tile_class(
  i: jax.Array,
  j: jax.Array,
  *,
  T: int,
  S: int,
  block_q: int,
  block_kv: int,
  causal: bool,
  window: int | None,
  ids: tuple[Ids, Ids] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """``(skip, full)`` of the tiles (query block i, key block j); ``ids`` are those of i and of j."""
  d = S - T
  q0, k0 = i * block_q, j * block_kv
  q1, k1 = jnp.minimum(q0 + block_q, T) - 1, jnp.minimum(k0 + block_kv, S) - 1
  skip = (q0 >= T) | (k0 >= S)
  full = (k0 + block_kv <= S) & ~skip
  if causal:
    skip, full = skip | (k0 > q1 + d), full & (k1 <= q0 + d)
  if window is not None:
    skip, full = skip | (k1 <= q0 + d - window), full & (k0 > q1 + d - window)
  if ids is not None:
    q, k = ids
    skip = skip | (q.high < 0) | (k.high < 0) | (q.high < k.low) | (k.high < q.low)
    one = (q.low == q.high) & (k.low == k.high) & (q.low == k.low)
    full = full & one & ~q.padded & ~k.padded
  return skip, full & ~skip


def compact(rank: jax.Array, kept: jax.Array, idx: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Moves the kept entries to the front, in order of rank; then repeats the last.

  Returns:
    Number kept ``[...]`` and the new ``idx``.
  """
  order = jnp.argsort(jnp.where(kept, rank, _NONE), axis=-1, stable=True)
  idx = jnp.broadcast_to(idx, kept.shape)
  num = jnp.sum(kept, axis=-1, dtype=jnp.int32)
  return num, repeat_last(num, jnp.take_along_axis(idx, order, axis=-1))


def repeat_last(num: jax.Array, idx: jax.Array) -> jax.Array:
  """Entries past ``num`` become the last one before it (0 if none): always a block that exists."""
  slot = jnp.arange(idx.shape[-1])
  slot = jnp.minimum(jnp.broadcast_to(slot, idx.shape), jnp.maximum(num - 1, 0)[..., None])
  return jnp.where((num > 0)[..., None], jnp.take_along_axis(idx, slot, axis=-1), 0)


def tile_lists(
  pattern: BlockPattern,
  *,
  T: int,
  S: int,
  causal: bool,
  window: int | None,
  segment_ids: tuple[jax.Array, jax.Array] | None,
) -> tuple[Lists, Lists]:
  """The pattern's tiles under the token rule: lists of key blocks, and lists of query blocks.

  ``segment_ids`` is ``(q_ids [B,T], kv_ids [B,S])`` or None; with it the lists have B rows of their
  own.
  """
  rule = dict(
    T=T, S=S, block_q=pattern.block_q, block_kv=pattern.block_kv, causal=causal, window=window
  )
  ids = None
  if segment_ids is not None:
    ids = block_ids(segment_ids[0], pattern.block_q), block_ids(segment_ids[1], pattern.block_kv)

  def classified(num, idx, transposed):
    row = jnp.arange(idx.shape[-2], dtype=jnp.int32)[None, None, :, None]
    i, j = (idx, row) if transposed else (row, idx)
    here = None if ids is None else (ids[0].at(i), ids[1].at(j))
    skip, full = tile_class(i, j, **rule, ids=here)
    kept = (jnp.arange(idx.shape[-1]) < num[..., None]) & ~skip
    count, order = compact(jnp.where(full, 0, 1), kept, idx)
    return Lists(jnp.sum(kept & full, axis=-1, dtype=jnp.int32), count, order)

  forward = classified(pattern.num, pattern.idx, transposed=False)
  return forward, classified(pattern.t_num, pattern.t_idx, transposed=True)
