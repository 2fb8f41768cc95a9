# SPDX-License-Identifier: Apache-2.0
"""Block sizes, packed ancestors, and the merge of two partial attentions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

WORD = 32  # ancestors in one word
Levels = tuple[tuple[jax.Array, jax.Array, jax.Array], ...]  # keys and values, heads first; lengths


@dataclasses.dataclass(frozen=True)
class XLAConfig:
  """How the cache is walked.

  Attributes:
    block: slots a step of a loop that ends at the longest row; 0: the whole cache in one pass.
    dense: where the longest row fills more than this share of the cache, one pass is taken instead
      (a branch at run time); 1: never.
  """

  block: int = 0
  dense: float = 1.0

  def __post_init__(self):
    if self.block < 0:
      raise ValueError(f"XLAConfig: block is 0 (one pass) or a number of slots, got {self.block}.")
    if not 0 <= self.dense <= 1:
      raise ValueError(f"XLAConfig: dense is a share between 0 and 1, got {self.dense}.")


@dataclasses.dataclass(frozen=True)
class TPUConfig:
  """Tile sizes of the TPU kernel.

  By the compiler's schedules a tile of 1,024 slots hides most of the latency of a step: 16 nodes of
  four query heads each take half (v5e) to three quarters (v6e) of the time the tile's copy takes.

  Attributes:
    block_s: cache slots in a tile, a multiple of 128.
    block_rows: the rows (nodes x query heads of one key/value head) are split into tiles of at most
      this many, a multiple of 16; the cache is read once a tile.
    transposed: slots along sublanes and rows along lanes; None: for tiles of more than 256 rows.
  """

  block_s: int = 1024
  block_rows: int = 512
  transposed: bool | None = None

  def __post_init__(self):
    if self.block_s <= 0 or self.block_s % 128:
      raise ValueError(f"TPUConfig: block_s is a multiple of 128, got {self.block_s}.")
    if self.block_rows <= 0 or self.block_rows % 16:
      raise ValueError(f"TPUConfig: block_rows is a multiple of 16, got {self.block_rows}.")


def pack_ancestors(ancestors: jax.Array) -> jax.Array:
  """Bool ``[...,M,M]`` to ``uint32 [...,M,ceil(M/32)]``: node j is bit j % 32 of word j // 32.

  >>> import jax.numpy as jnp
  >>> pack_ancestors(jnp.tril(jnp.ones((3, 3), bool)))
  Array([[1],
         [3],
         [7]], dtype=uint32)
  """
  m = ancestors.shape[-1]
  padding = [(0, 0)] * (ancestors.ndim - 1) + [(0, -m % WORD)]
  bits = jnp.pad(ancestors, padding).reshape(*ancestors.shape[:-1], -1, WORD)
  return jnp.sum(
    bits.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32), -1, dtype=jnp.uint32
  )


def unpack_ancestors(words: jax.Array) -> jax.Array:
  """The inverse of ``pack_ancestors``: ``uint32 [...,M,ceil(M/32)]`` to bool ``[...,M,M]``."""
  bits = (words[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & jnp.uint32(1)
  return bits.reshape(*words.shape[:-1], -1)[..., : words.shape[-2]] != 0


def combine(
  out1: jax.Array, lse1: jax.Array, out2: jax.Array, lse2: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Merges attentions over two disjoint sets of keys into attention over their union, exactly.

  ``L = log(e^L1 + e^L2)``, ``O = e^(L1-L) O1 + e^(L2-L) O2``: associative, commutative, with
  ``(0, -inf)`` as its unit, and without NaN (in gradients too) where both sets are empty.

  Args:
    out1, out2: ``[B,M,N,H]``. lse1, lse2: ``[B,N,M]`` float32.

  Returns:
    ``(out, lse)`` of the union.
  """
  top = jnp.maximum(lse1, lse2)
  top = jax.lax.stop_gradient(jnp.where(top > -jnp.inf, top, 0.0))
  w1, w2 = jnp.exp(lse1 - top), jnp.exp(lse2 - top)
  total = w1 + w2
  safe = jnp.where(total > 0, total, 1.0)  # before dividing: a select afterwards leaves NaN behind
  lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
  w1, w2 = (jnp.swapaxes(w / safe, 1, 2)[..., None] for w in (w1, w2))  # [B,M,N,1]
  return (w1 * out1 + w2 * out2).astype(out1.dtype), lse


def with_prefix(
  attend: Callable[..., tuple[jax.Array, jax.Array]],
  q: jax.Array,
  own: tuple[jax.Array, jax.Array],
  levels: Levels,
  position: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Adds prefixes that rows share, level by level, to what each row has seen for itself.

  One attention a level, in which each group is a row: B / G * M queries meet its keys at once.
  ``attend(q, k, v, length, position)`` attends to a heads-first cache alone.
  """
  b, m, n, h = q.shape
  for k, v, length in reversed(levels):  # [G,K,P,H], [G,K,P,Hv], [G]
    groups = k.shape[0]
    if position is not None:  # from the start of this level on
      position = position + jnp.repeat(length, b // groups)[:, None]
    out, lse = attend(
      q.reshape(groups, -1, n, h), k, v, length,
      None if position is None else position.reshape(groups, -1),
    )  # fmt: skip
    lse = lse.reshape(groups, n, -1, m).swapaxes(1, 2).reshape(b, n, m)
    own = combine(*own, out.reshape(b, m, n, -1), lse)
  return own


def fold(x: jax.Array, kv_heads: int) -> jax.Array:
  """``[B,M,N,H] -> [B,K,G*M,H]``: all query rows that read one key/value head, head by head."""
  b, m, n, h = x.shape
  x = x.reshape(b, m, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
  return x.reshape(b, kv_heads, -1, h)


def unfold(x: jax.Array, nodes: int) -> jax.Array:
  """The inverse of ``fold``: ``[B,K,G*M,H] -> [B,M,N,H]``."""
  b, kv_heads, rows, h = x.shape
  x = x.reshape(b, kv_heads, rows // nodes, nodes, h).transpose(0, 3, 1, 2, 4)
  return x.reshape(b, nodes, -1, h)


def boolean(ancestors: jax.Array) -> jax.Array:
  return ancestors if ancestors.dtype == jnp.bool_ else unpack_ancestors(ancestors)


def precision(*arrays: Any) -> jax.lax.Precision:
  """Accelerators round float32 operands of matrix products unless told not to."""
  wide = all(jnp.dtype(x.dtype).itemsize >= 4 for x in arrays)
  return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
