# SPDX-License-Identifier: Apache-2.0
"""Tokens from the neighbouring shards: halos, short convolutions, token shift, next tokens.

A halo of ``width`` rows is what a rank lacks for a local stencil. It travels by
``lax.ppermute`` along ``axis_name``: one permute of ``width * row bytes`` per run of the layout
(contiguous 1, zigzag 2), and one more per run for each further shard where a shard is shorter than
the halo. Nothing is sent for one rank. Autodiff sends the cotangents back the same way.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxdec.errors import UserError
from jaxdec.parallel.sequence.layout import (
  Axis,
  axis_rank,
  axis_size,
  blocks_of,
  join_runs,
  split_runs,
  token_index,
)


def from_block(x: jax.Array, shift: int, *, axis_name: Axis, layout: str) -> jax.Array:
  """``x [B,runs,...]`` of the block ``shift`` further on, 0 where the sequence ends before.

  One permute of x a run (rows of both runs differ in direction under zigzag), none for blocks on
  this rank.
  """
  ranks = axis_size(axis_name)
  blocks = blocks_of(ranks, layout)
  home = {b: (rank, run) for rank, held in enumerate(blocks) for run, b in enumerate(held)}
  result = []
  for run in range(x.shape[1]):
    moves = defaultdict(list)  # run there -> [(rank there, rank here)]
    for rank in range(ranks):
      if (source := home.get(blocks[rank][run] + shift)) is not None:
        moves[source[1]].append((source[0], rank))
    total = jnp.zeros_like(x[:, run])
    for source_run, pairs in moves.items():
      value = x[:, source_run]
      if remote := [(a, b) for a, b in pairs if a != b]:
        total = total + jax.lax.ppermute(value, axis_name, remote)  # zeros where none is sent
      if here := [b for a, b in pairs if a == b]:
        mine = jnp.any(axis_rank(axis_name) == jnp.array(here))
        total = jnp.where(mine, value, total) if ranks > 1 else value
    result.append(total)
  return jnp.stack(result, axis=1)


def halo(
  x: jax.Array,
  width: int,
  *,
  axis_name: Axis,
  layout: str = "contiguous",
  side: Literal["left", "right"] = "left",
  fill: float = 0,
  initial: jax.Array | None = None,
) -> jax.Array:
  """The ``width`` rows before (or after) each run of this rank's shard.

  Communicates along ``axis_name``: ``ceil(width / l)`` permutes a run of l rows, together
  ``width`` rows a run.

  Args:
    x: ``[B,L,...]``, this rank's shard.
    width: rows, at least 0.
    axis_name: mesh axis of the sequence; None: the whole sequence is here.
    layout: ``contiguous`` or ``zigzag``.
    side: ``left`` for the rows before a run, ``right`` for those after it.
    fill: value of rows outside of the sequence.
    initial: ``[B,width,...]``, the rows before the first token (``side="left"`` only).

  Returns:
    ``[B,runs,width,...]``, in the order of the sequence.
  """
  if side not in ("left", "right"):
    raise UserError(f"halo: side is 'left' or 'right', got {side!r}")
  if initial is not None and (side != "left" or initial.shape[1] != width):
    raise UserError(
      f"halo: initial holds the {width} rows before the first token and is for side='left', got "
      f"shape {initial.shape} and side={side!r}"
    )
  runs = split_runs(x, layout)
  each, left = runs.shape[2], side == "left"
  parts, missing = [], width
  hop = 1
  while missing > 0 and hop < axis_size(axis_name) * runs.shape[1]:
    rows = min(missing, each)
    edge = runs[:, :, each - rows :] if left else runs[:, :, :rows]
    part = from_block(edge, -hop if left else hop, axis_name=axis_name, layout=layout)
    parts.append(part)
    missing, hop = missing - rows, hop + 1
  if missing:
    parts.append(jnp.zeros_like(runs, shape=(*runs.shape[:2], missing, *runs.shape[3:])))
  if not parts:
    return runs[:, :, :0]
  result = jnp.concatenate(parts[::-1] if left else parts, axis=2)
  if initial is None and fill == 0:
    return result
  # Rows outside of the sequence: those with a place below 0, or from T on.
  start = token_index(axis_name, x.shape[1], layout).reshape(runs.shape[1], each)
  row = jnp.arange(width)
  place = start[:, :1] - width + row if left else start[:, -1:] + 1 + row
  outside = (place < 0) if left else place >= x.shape[1] * axis_size(axis_name)
  outside = outside.reshape(1, *outside.shape, *(1,) * (result.ndim - 3))
  if initial is None:
    return jnp.where(outside, jnp.asarray(fill, x.dtype), result)
  rows = jnp.take(initial.astype(x.dtype), jnp.clip(place + width, 0, width - 1), axis=1)
  return jnp.where(outside, rows, result)


def short_convolution(
  x: jax.Array,
  weight: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  axis_name: Axis = None,
  layout: str = "contiguous",
  initial: jax.Array | None = None,
  causal: bool = True,
) -> jax.Array:
  """Depthwise convolution over w tokens of the same document (Mamba, arXiv 2312.00752, Figure 3).

  ``y_t = sum_i weight[i] x[t - left + i]``, with ``left = w - 1`` (``causal``: the last tap is the
  token itself, as in published checkpoints) or ``left = (w - 1) // 2`` (centred); taps in another
  document, or before the first token, count 0. Sums in float32 or wider.

  Communicates along ``axis_name``: a halo of w - 1 rows of x, ``B (w-1) D`` elements a run, and of
  its segment ids where given (``4 B (w-1)`` bytes a run).

  Args:
    x: ``[B,L,D]``, this rank's shard. weight: ``[w,D]``.
    segment_ids: int ``[B,L]``, the document of each token.
    axis_name: mesh axis of the sequence; None: the whole sequence is here.
    initial: ``[B,w-1,D]``, the rows before the first token and of its document; None: none.

  Returns:
    ``[B,L,D]`` in x's dtype.
  """
  x, weight = jnp.asarray(x), jnp.asarray(weight)
  w = weight.shape[0]
  if weight.ndim != 2 or w < 1 or weight.shape[1] != x.shape[-1]:
    raise UserError(
      f"short_convolution: weight has shape {weight.shape}, expected [w, {x.shape[-1]}] for x with "
      f"{x.shape[-1]} channels"
    )
  if initial is not None and not causal:
    raise UserError("short_convolution: initial is for causal=True; leave it out otherwise")
  before, after = (w - 1, 0) if causal else ((w - 1) // 2, w // 2)
  where: dict[str, Any] = {"axis_name": axis_name, "layout": layout}
  if initial is not None and w == 1:
    initial = None
  wide = _extend(x, before, after, initial=initial, **where)
  ids = None
  if segment_ids is not None:
    ids = _extend(segment_ids, before, after, fill=-1, **where)
    if initial is not None:  # the rows before the first token are of its document
      start = token_index(axis_name, x.shape[1], layout).reshape(ids.shape[1], -1)[:, :1]
      outside = jnp.maximum(before - start, 0)
      first = jnp.take_along_axis(ids, outside[None], axis=2)
      ids = jnp.where(jnp.arange(ids.shape[2]) < outside, first, ids)
  each = wide.shape[2] - w + 1
  total = jnp.promote_types(jnp.promote_types(x.dtype, weight.dtype), jnp.float32)
  y = 0.0
  for i in range(w):
    tap = wide[:, :, i : i + each].astype(total)
    if ids is not None and i != before:
      same = ids[:, :, i : i + each] == ids[:, :, before : before + each]
      tap = jnp.where(same[..., None], tap, 0)
    y = y + weight[i].astype(total) * tap
  return join_runs(y).astype(x.dtype)


def _extend(x, before, after, *, axis_name, layout, initial=None, fill=0):
  """``[B,runs,before+l+after,...]``: the runs with their halos."""
  where = {"axis_name": axis_name, "layout": layout, "fill": fill}
  left = halo(x, before, side="left", initial=initial, **where)
  right = halo(x, after, side="right", **where)
  return jnp.concatenate([left, split_runs(x, layout), right], axis=2)


def token_shift(
  x: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  axis_name: Axis = None,
  layout: str = "contiguous",
  initial: jax.Array | None = None,
) -> jax.Array:
  """The row of the token before, ``x_{t-1}``, 0 at the start of a document (RWKV, 2305.13048).

  A halo of one row; ``initial [B,1,D]`` is the row before the first token.
  """
  weight = jnp.array([[1], [0]], x.dtype) * jnp.ones_like(x, shape=(1, x.shape[-1]))
  return short_convolution(
    x, weight, segment_ids=segment_ids, axis_name=axis_name, layout=layout, initial=initial
  )


def next_token(
  x: jax.Array, *, axis_name: Axis = None, layout: str = "contiguous", fill: float = 0
) -> jax.Array:
  """The row of the token after, ``x_{t+1}``, and ``fill`` at the end: labels at shard borders.

  Communicates along ``axis_name``: one row a run. x: ``[B,L,...]``, also integers.
  """
  after = halo(x, 1, axis_name=axis_name, layout=layout, side="right", fill=fill)
  return join_runs(jnp.concatenate([split_runs(x, layout)[:, :, 1:], after], axis=2))
