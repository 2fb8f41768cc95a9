# SPDX-License-Identifier: Apache-2.0
"""Which tiles of the attention map are computed, as lists of block numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.lists import (
  block_ids,
  compact,
  repeat_last,
  tile_class,
)

_ARRAYS = ("num", "idx", "full", "overflow", "t_num", "t_idx", "t_full")


@dataclasses.dataclass(frozen=True)
class BlockPattern:
  """Per query block, the key blocks it attends to; and the same by key block, for gradients.

  An ordinary pytree of arrays: it may be computed inside ``jit`` from scores, passed through
  ``scan``, saved. It has a fixed maximum count C per row; only the blocks counted are computed. It
  is per batch entry and per head, or shared: ``B|1`` stands for either, and Hm is 1, K (key/value
  heads) or N (query heads). It chooses tiles; which tokens are visible inside a tile is the op's
  rule (causal, window, documents).

  Build one with ``from_rule``, ``from_dense``, ``from_scores`` or ``from_threshold``.

  Attributes:
    num: i32 ``[B|1,Hm,Nq]``, key blocks listed for each query block.
    idx: i32 ``[B|1,Hm,Nq,C]``, ascending; entries past ``num`` repeat the last one (0 if none).
    full: bool ``[B|1,Hm,Nq,C]``, the constructor's own rule hides no token of that tile. A hint:
      the op classifies every tile by its own rule.
    overflow: bool ``[]``, some row asked for more blocks than it can list; those left out are lost.
    t_num, t_idx, t_full: the same transposed, query blocks listed for each key block
      (``[...,Nk]``, ``[...,Nk,Ct]``).
    block_q, block_kv: tokens in a block, static.
  """

  num: jax.Array
  idx: jax.Array
  full: jax.Array
  overflow: jax.Array
  t_num: jax.Array
  t_idx: jax.Array
  t_full: jax.Array
  block_q: int
  block_kv: int

  @property
  def num_q_blocks(self) -> int:
    return self.num.shape[-1]

  @property
  def num_kv_blocks(self) -> int:
    return self.t_num.shape[-1]

  @classmethod
  def from_rule(
    cls,
    T: int,
    S: int | None = None,
    *,
    block_q: int,
    block_kv: int,
    causal: bool = True,
    window: int | None = None,
    prefix: int = 0,
    sinks: int = 0,
    segment_ids: Any = None,
  ) -> BlockPattern:
    """Every tile in which the rule lets some query see some key.

    Query i sees key j, with ``d = S - T``, if both are of one document and

      (j <= i + d and i + d - j < window)  or  (j <= i + d and j < sinks)  or  j < prefix

    (without ``causal`` the conditions ``j <= i + d`` fall away). The rule acts by whole tiles: the
    sinks of a window (StreamingLLM, arXiv 2309.17453) are kept by a pattern with ``window`` and
    ``sinks`` and the op's own ``window=None``. C is the longest row of the rule without documents.

    Args:
      segment_ids: ids ``[B,T]``, or a pair ``([B,T], [B,S])``; may be traced.
    """
    S = T if S is None else S
    _check_blocks(block_q, block_kv)
    _check_rule(window, prefix, sinks)
    d, nq, nk = S - T, -(-T // block_q), -(-S // block_kv)
    # The rule's tiles are [0, front) and [low, high] in every row, and one interval in each column.
    i, j = np.arange(nq), np.arange(nk)
    q0, q1 = i * block_q, np.minimum((i + 1) * block_q, T) - 1
    k0, k1 = j * block_kv, np.minimum((j + 1) * block_kv, S) - 1
    high = (q1 + d) // block_kv if causal else np.full(nq, nk - 1)
    high = np.clip(high, -1, nk - 1)
    low = np.zeros(nq, np.int64)
    if window is not None:
      low = np.maximum((q0 + d - window + 1) // block_kv, 0)
    sink_blocks, prefix_blocks = -(-min(sinks, S) // block_kv), -(-min(prefix, S) // block_kv)
    front = np.maximum(prefix_blocks, np.minimum(sink_blocks, high + 1))
    low = np.minimum(np.maximum(low, front), np.maximum(high + 1, front))
    num = front + np.maximum(high + 1 - low, 0)
    slot = np.arange(max(int(num.max(initial=0)), 1))
    idx = np.where(slot < front[:, None], slot, low[:, None] + slot - front[:, None])

    first = np.maximum(k0 - d, 0) // block_q if causal else np.zeros(nk, np.int64)
    last = np.full(nk, nq - 1)
    if window is not None:  # the last i with q0 + d - window < k1
      last = np.minimum(np.where(j < sink_blocks, nq - 1, (k1 + window - d - 1) // block_q), nq - 1)
    first, last = (np.where(j < prefix_blocks, x, y) for x, y in ((0, first), (nq - 1, last)))
    t_num = np.maximum(last + 1 - first, 0)
    t_slot = np.arange(max(int(t_num.max(initial=0)), 1))

    def built(num, idx, transposed):
      num, idx = jnp.asarray(num, jnp.int32)[None, None], jnp.asarray(idx, jnp.int32)[None, None]
      row = jnp.arange(idx.shape[2], dtype=jnp.int32)[None, None, :, None]
      i, j = (idx, row) if transposed else (row, idx)
      ids = None
      if segment_ids is not None:
        q_ids, kv_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
        ids = block_ids(q_ids, block_q).at(i), block_ids(kv_ids, block_kv).at(j)
      rule = dict(T=T, S=S, block_q=block_q, block_kv=block_kv, ids=ids)
      skip, full = tile_class(i, j, **rule, causal=causal, window=window)
      hidden, early = tile_class(i, j, **rule, causal=causal, window=None)
      unseen, some = tile_class(i, j, **rule, causal=False, window=None)
      end = (j + 1) * block_kv
      skip = skip & (hidden | (j >= sink_blocks)) & (unseen | (j >= prefix_blocks))
      full = full | (early & (end <= sinks)) | (some & (end <= prefix))
      kept = (jnp.arange(idx.shape[-1]) < num[..., None]) & ~skip
      return (*compact(jnp.zeros((), jnp.int32), kept, idx), _take_kept(kept, full))

    num, idx, full = built(num, idx, transposed=False)
    t_num, t_idx, t_full = built(t_num, first[:, None] + t_slot, transposed=True)
    return cls(num, idx, full, jnp.zeros((), bool), t_num, t_idx, t_full, block_q, block_kv)

  @classmethod
  def from_dense(
    cls,
    block_mask: Any,
    *,
    block_q: int,
    block_kv: int,
    max_blocks: int | None = None,
    max_queries: int | None = None,
  ) -> BlockPattern:
    """From a boolean array of blocks ``[B|1,Hm,Nq,Nk]``, which may be traced.

    Args:
      max_blocks: C, default Nk. A row with more keeps its last C (the diagonal among them) and sets
        ``overflow``.
      max_queries: Ct, default Nq: how many query blocks one key block may be listed by. A column
        with more loses gradients of k and v and sets ``overflow``.
    """
    _check_blocks(block_q, block_kv)
    mask = _four_axes("block_mask", jnp.asarray(block_mask, bool))
    nk = mask.shape[-1]
    most = _cap("max_blocks", max_blocks, nk)
    count = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    before = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - mask
    kept = mask & (before >= (count - most)[..., None])
    column = jnp.where(kept, jnp.arange(nk, dtype=jnp.int32), nk)
    num, idx = jnp.minimum(count, most), jnp.sort(column, axis=-1)[..., :most]
    return _with_transposed(
      num, repeat_last(num, idx), nk, jnp.any(count > most), max_queries, block_q, block_kv
    )

  @classmethod
  def from_scores(
    cls,
    scores: Any,
    top_k: int,
    *,
    block_q: int,
    block_kv: int,
    T: int | None = None,
    S: int | None = None,
    causal: bool = True,
    diagonal: bool = True,
    sinks: int = 0,
    max_queries: int | None = None,
  ) -> BlockPattern:
    """The ``top_k`` key blocks of highest score in every row.

    Selection is under ``stop_gradient``; of equal scores the lower block wins; a score of -inf (or
    NaN) is never taken.

    Args:
      scores: ``[B|1,Hm,Nq,Nk]``. top_k: C, forced blocks counted.
      T, S: lengths, default ``Nq * block_q`` and ``Nk * block_kv``; they align queries with keys.
      causal: leave out blocks wholly in a query block's future.
      diagonal: always take the blocks that hold the queries' own positions.
      sinks: always take the blocks of this many first tokens.
      max_queries: as in ``from_dense``.
    """
    _check_blocks(block_q, block_kv)
    scores = _four_axes("scores", jax.lax.stop_gradient(jnp.asarray(scores)))
    nq, nk = scores.shape[-2:]
    top_k = _cap("top_k", top_k, nk)
    T, S = _lengths(T, S, nq, nk, block_q, block_kv)
    allowed, forced = _allowed_forced(T, S, block_q, block_kv, causal, diagonal, sinks)
    if (least := int(forced.sum(axis=-1).max(initial=0))) > top_k:
      raise ValueError(
        f"BlockPattern: top_k={top_k} is less than the {least} blocks that diagonal and sinks "
        "force into one row; raise top_k or switch those off."
      )
    score = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    score = jnp.where(forced, jnp.inf, jnp.where(allowed, score, -jnp.inf))
    best, idx = jax.lax.top_k(score, top_k)
    num = jnp.sum(best > -jnp.inf, axis=-1, dtype=jnp.int32)
    idx = jnp.sort(jnp.where(best > -jnp.inf, idx.astype(jnp.int32), nk), axis=-1)
    return _with_transposed(
      num, repeat_last(num, idx), nk, jnp.zeros((), bool), max_queries, block_q, block_kv
    )

  @classmethod
  def from_threshold(
    cls,
    scores: Any,
    threshold: Any,
    *,
    block_q: int,
    block_kv: int,
    T: int | None = None,
    S: int | None = None,
    causal: bool = True,
    diagonal: bool = True,
    sinks: int = 0,
    max_blocks: int | None = None,
    max_queries: int | None = None,
  ) -> BlockPattern:
    """The key blocks whose score is above the threshold; arguments as in ``from_scores``.

    A row with more than ``max_blocks`` (default Nk) keeps those of highest score and sets
    ``overflow``.
    """
    scores = _four_axes("scores", jax.lax.stop_gradient(jnp.asarray(scores)))
    nq, nk = scores.shape[-2:]
    above = jnp.where(scores > threshold, scores, -jnp.inf)
    most = _cap("max_blocks", max_blocks, nk)
    pattern = cls.from_scores(
      above, most, block_q=block_q, block_kv=block_kv, T=T, S=S, causal=causal,
      diagonal=diagonal, sinks=sinks, max_queries=max_queries,
    )  # fmt: skip
    T, S = _lengths(T, S, nq, nk, block_q, block_kv)
    allowed, forced = _allowed_forced(T, S, block_q, block_kv, causal, diagonal, sinks)
    asked = jnp.sum(forced | (allowed & (above > -jnp.inf)), axis=-1)
    return dataclasses.replace(pattern, overflow=pattern.overflow | jnp.any(asked > most))

  def dense(self) -> jax.Array:
    """The listed tiles as bool ``[B|1,Hm,Nq,Nk]``."""
    nk = self.num_kv_blocks
    listed = jnp.arange(self.idx.shape[-1]) < self.num[..., None]
    flat = jnp.where(listed, self.idx, nk).reshape(-1, self.idx.shape[-1])
    mask = jnp.zeros((flat.shape[0], nk), bool)
    mask = mask.at[jnp.arange(flat.shape[0])[:, None], flat].set(True, mode="drop")
    return mask.reshape(*self.num.shape, nk)

  def union_heads(self, heads: int) -> BlockPattern:
    """One pattern for each of ``heads`` equal groups of heads: all that any of a group lists."""
    b, hm, nq = self.num.shape
    if heads < 1 or hm % heads:
      raise ValueError(
        f"BlockPattern: union_heads({heads}) of a pattern with {hm} heads; use a divisor of {hm}."
      )
    mask = self.dense().reshape(b, heads, hm // heads, nq, -1).any(axis=2)
    most = min(self.num_kv_blocks, self.idx.shape[-1] * (hm // heads))
    union = self.from_dense(mask, block_q=self.block_q, block_kv=self.block_kv, max_blocks=most)
    return dataclasses.replace(union, overflow=self.overflow)


jax.tree_util.register_dataclass(
  BlockPattern, data_fields=_ARRAYS, meta_fields=("block_q", "block_kv")
)


def dense_pattern(T: int, S: int, *, causal: bool, window: int | None) -> BlockPattern:
  """All tiles the rule does not hide, in blocks that keep the lists short: ``blocks=None``."""
  block = 128 if max(T, S) <= 8192 else 512
  return BlockPattern.from_rule(T, S, block_q=block, block_kv=block, causal=causal, window=window)


def _check_blocks(block_q: int, block_kv: int) -> None:
  for name, size in (("block_q", block_q), ("block_kv", block_kv)):
    if not isinstance(size, int | np.integer) or size < 1:
      raise ValueError(f"BlockPattern: {name} is a number of tokens, at least 1, got {size!r}.")


def _check_rule(window: int | None, prefix: int, sinks: int) -> None:
  if window is not None and window < 1:
    raise ValueError(f"BlockPattern: window is at least 1, got {window}; use None for no window.")
  if prefix < 0 or sinks < 0:
    raise ValueError(
      f"BlockPattern: prefix and sinks count tokens from the start, got {prefix} and {sinks}; use "
      "0 for none."
    )


def _four_axes(name: str, x: jax.Array) -> jax.Array:
  if x.ndim != 4:
    raise ValueError(
      f"BlockPattern: {name} has shape {x.shape}, expected [B|1, heads, T/block_q, S/block_kv]."
    )
  return x


def _cap(name: str, value: int | None, most: int) -> int:
  if value is not None and value < 1:
    raise ValueError(f"BlockPattern: {name} is at least 1, got {value}.")
  return most if value is None else min(int(value), most)


def _lengths(T, S, nq, nk, block_q, block_kv) -> tuple[int, int]:
  T, S = nq * block_q if T is None else T, nk * block_kv if S is None else S
  if (-(-T // block_q), -(-S // block_kv)) != (nq, nk):
    raise ValueError(
      f"BlockPattern: T={T}, S={S} make {-(-T // block_q)} x {-(-S // block_kv)} blocks of "
      f"{block_q} x {block_kv}, but the scores have {nq} x {nk}."
    )
  return T, S


def _allowed_forced(T, S, block_q, block_kv, causal, diagonal, sinks):
  """bool ``[Nq,Nk]`` twice: blocks a selector may take, and blocks it must."""
  q0 = np.arange(-(-T // block_q))[:, None] * block_q + S - T
  q1 = np.minimum(q0 + block_q, S) - 1
  k0 = np.arange(-(-S // block_kv)) * block_kv
  k1 = k0 + block_kv - 1
  allowed = k0 <= q1 if causal else np.ones((len(q0), len(k0)), bool)
  forced = np.broadcast_to(k0 < sinks, allowed.shape)
  if diagonal:
    forced = forced | ((k0 <= q1) & (k1 >= q0))
  return allowed, forced & allowed


def _take_kept(kept: jax.Array, flags: jax.Array) -> jax.Array:
  """Flags in the order ``compact`` gives equal ranks; False past the kept ones."""
  order = jnp.argsort(~kept, axis=-1, stable=True)
  return jnp.take_along_axis(jnp.broadcast_to(flags, kept.shape) & kept, order, axis=-1)


def _with_transposed(num, idx, nk, overflow, max_queries, block_q, block_kv) -> BlockPattern:
  """Adds the lists by key block: a stable sort of all entries by key block keeps queries ascending.

  Every tile counts as full: a choice of whole blocks hides no token inside one.
  """
  nq, c = idx.shape[-2:]
  most = _cap("max_queries", max_queries, nq)
  listed = jnp.arange(c) < num[..., None]
  column = jnp.where(listed, idx, nk).reshape(*idx.shape[:2], nq * c)
  order = jnp.argsort(column, axis=-1, stable=True)
  edges = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, jnp.arange(nk + 1))))(
    jnp.take_along_axis(column, order, axis=-1)
  )
  count = jnp.diff(edges, axis=-1).astype(jnp.int32)
  t_num = jnp.minimum(count, most)
  slot = jnp.minimum(edges[..., :-1, None] + jnp.arange(most), nq * c - 1)
  t_idx = jnp.take_along_axis(order, slot.reshape(*idx.shape[:2], -1), axis=-1) // c
  t_idx = repeat_last(t_num, t_idx.reshape(slot.shape).astype(jnp.int32))
  return BlockPattern(
    num=num,
    idx=idx,
    full=listed,
    overflow=overflow | jnp.any(count > most),
    t_num=t_num,
    t_idx=t_idx,
    t_full=jnp.arange(most) < t_num[..., None],
    block_q=block_q,
    block_kv=block_kv,
  )
