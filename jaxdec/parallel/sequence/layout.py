# SPDX-License-Identifier: Apache-2.0
"""Which tokens a rank holds, and how host arrays are brought into that order.

``contiguous``: rank r of W holds tokens ``[rL, (r+1)L)``, one run. ``zigzag``: the sequence is cut
into 2W blocks and rank r holds block r, then block 2W-1-r, two runs of L/2, so that under a causal
mask every rank has the same work: block b sees b + 1/2 blocks, and r + (2W-1-r) does not depend on
r. For W = 4 the blocks lie as ``0 7 | 1 6 | 2 5 | 3 4``.

A zigzag batch is permuted once, where it is loaded, and never back: the loss is a sum over tokens.
Labels must be shifted before (``zigzag_batch`` does it), positions travel with the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.errors import UserError
from jaxdec.parallel.sequence.config import LAYOUTS, check_choice

Axis = str | tuple[str, ...] | None


def axis_size(axis_name: Axis) -> int:
  """Ranks along ``axis_name`` (a tuple: its product), a Python int; 1 for None."""
  return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def axis_rank(axis_name: Axis) -> jax.Array | int:
  """This rank's number; 0 for None."""
  return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def blocks_of(ranks: int, layout: str) -> tuple[tuple[int, ...], ...]:
  """Numbers of the blocks that each rank holds, one a run, in the order it holds them."""
  check_choice("layout", layout, LAYOUTS)
  if layout == "contiguous":
    return tuple((r,) for r in range(ranks))
  return tuple((r, 2 * ranks - 1 - r) for r in range(ranks))


def num_runs(layout: str) -> int:
  """Runs of consecutive tokens in a shard: 1 or 2."""
  return len(blocks_of(1, layout)[0])


def run_blocks(axis_name: Axis, layout: str) -> tuple[Any, ...]:
  """Block number of each run of this rank, scalars that depend on the rank."""
  rank, ranks = axis_rank(axis_name), axis_size(axis_name)
  return (rank,) if num_runs(layout) == 1 else (rank, 2 * ranks - 1 - rank)


def split_runs(x: jax.Array, layout: str, *, name: str = "x") -> jax.Array:
  """``[B,L,...]`` to ``[B,runs,L/runs,...]``."""
  runs = num_runs(layout)
  if x.shape[1] % runs:
    raise UserError(
      f"{name} has {x.shape[1]} tokens on each rank, and the zigzag layout holds two runs of equal "
      "length; use a sequence length that twice the size of the sequence axis divides"
    )
  return x.reshape(x.shape[0], runs, x.shape[1] // runs, *x.shape[2:])


def join_runs(x: jax.Array) -> jax.Array:
  """``[B,runs,l,...]`` to ``[B,runs*l,...]``."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def token_index(axis_name: Axis, length: int, layout: str = "contiguous") -> jax.Array:
  """Place in the whole sequence of each of this rank's ``length`` tokens, int32 ``[length]``."""
  runs = num_runs(layout)
  start = jnp.stack([jnp.asarray(b, jnp.int32) for b in run_blocks(axis_name, layout)])
  each = length // runs
  return (start[:, None] * each + jnp.arange(each, dtype=jnp.int32)).reshape(length)


def zigzag_order(ranks: int) -> np.ndarray:
  """Blocks in the order in which they lie: ``[0, 2W-1, 1, 2W-2, ...]``."""
  return np.array(blocks_of(ranks, "zigzag"), np.int32).reshape(-1)


def to_zigzag(x: Any, ranks: int, *, axis: int = 1) -> Any:
  """Permutes a whole sequence (numpy or jax array) into the zigzag order of ``ranks`` ranks.

  Splitting the result evenly along ``axis`` gives rank r its blocks r and 2W-1-r.

  Raises:
    UserError: twice the number of ranks does not divide the sequence.
  """
  return _permute_blocks(x, zigzag_order(ranks), axis)


def from_zigzag(x: Any, ranks: int, *, axis: int = 1) -> Any:
  """The inverse of ``to_zigzag``."""
  return _permute_blocks(x, np.argsort(zigzag_order(ranks)), axis)


def _permute_blocks(x: Any, order: np.ndarray, axis: int) -> Any:
  array = jnp if isinstance(x, jax.Array) else np
  length = x.shape[axis]
  if length % len(order):
    raise UserError(
      f"a sequence of {length} tokens cannot be cut into {len(order)} zigzag blocks (two a rank); "
      f"use a multiple of {len(order)} tokens"
    )
  axis %= x.ndim
  split = x.reshape(*x.shape[:axis], len(order), length // len(order), *x.shape[axis + 1 :])
  return array.take(split, order, axis=axis).reshape(x.shape)


def zigzag_batch(batch: Mapping[str, Any], ranks: int) -> dict[str, Any]:
  """A batch of host arrays in zigzag order, with what cannot be found afterwards made first.

  The next token of a shard's last token lies elsewhere, so labels are shifted before permuting:
  ``labels`` and ``label_mask`` as ``jaxdec.training.tasks.language_model.next_token_targets``
  defines them, and ``positions`` (0 ... T-1) where absent. Every array ``[B,T,...]`` is permuted.

  Args:
    batch: ``tokens [B,T]``, optionally ``segment_ids``, ``loss_mask``, ``positions``, and others.
    ranks: W, the size of the sequence axis.
  """
  tokens = np.asarray(batch["tokens"])

  def shift(x):
    return np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], axis=1)

  mask = shift(np.asarray(batch.get("loss_mask", np.ones(tokens.shape)), np.float32))
  if (segments := batch.get("segment_ids")) is not None:
    segments = np.asarray(segments)
    following = shift(segments)
    mask = mask * ((following == segments) & (following != 0))
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  made = {"positions": positions, **batch, "labels": shift(tokens), "label_mask": mask}
  made = {name: np.asarray(x) for name, x in made.items()}
  return {
    name: to_zigzag(x, ranks) if x.shape[:2] == tokens.shape else x for name, x in made.items()
  }
