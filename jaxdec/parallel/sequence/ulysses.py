# SPDX-License-Identifier: Apache-2.0
"""Ulysses (arXiv 2309.14509) and USP (arXiv 2405.07719): ranks trade tokens for heads.

An all-to-all gives each of U ranks all of the group's tokens for N/U of the heads; attention is
then local (Ulysses: the group is the whole axis) or goes round a ring of such groups (USP, U of W
ranks: rank ``r = ring * U + u``). A second all-to-all returns the output.

Per device, with L = T/W tokens, along the axis of the group: forward two all-to-alls, of [Q|K|V],
``B L (N + 2 K') H`` elements of which (U-1)/U leave the device, and of the output, ``B L N H``;
backward the same two, transposed. ``K' = lcm(K, U)``: key/value heads are repeated only so far that
every rank gets as many; U divides N.

Under the zigzag layout the tokens of a group are two runs again, its blocks ``g`` and ``2R-1-g`` of
2R: the ring of groups is itself in zigzag order, and without a ring the sequence is in order.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxdec.parallel.sequence import block_attention as block
from jaxdec.parallel.sequence.layout import Axis, num_runs
from jaxdec.parallel.sequence.ring import Ring, ring_attention
from pallas_kernels.block_sparse_attention import block_sparse_attention


@dataclasses.dataclass(frozen=True)
class Group:
  """Consecutive ranks that trade heads: the whole axis, or groups of ``size`` ranks of it."""

  axis: Axis
  size: int
  groups: int = 1  # in the axis

  def all_to_all(self, x: jax.Array, *, split: int, concat: int) -> jax.Array:
    index = None
    if self.groups > 1:
      index = [[g * self.size + u for u in range(self.size)] for g in range(self.groups)]
    return jax.lax.all_to_all(x, self.axis, split, concat, axis_index_groups=index, tiled=True)


def repeated_heads(kv_heads: int, ranks: int) -> int:
  """Key/value heads that are sent: the fewest, at least K, that ``ranks`` ranks can share out."""
  return math.lcm(kv_heads, ranks)


def ulysses_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  group: Group,
  ring: Ring,
  ids: jax.Array | None,
  layout: str,
  rule: block.Rule,
) -> jax.Array:
  """Attention of this rank's queries to the keys of all ranks.

  Args:
    q: ``[B,L,N,H]``. k, v: ``[B,L,K,H]``, this rank's shard.
    group: the ranks that trade heads. ring: the ring of groups; of size 1 for plain Ulysses.
    ids: documents of all tokens, int32 ``[B,W,L]`` by rank, or None.

  Returns:
    ``[B,L,N,Hv]`` in q's dtype.
  """
  runs = num_runs(layout)
  heads = repeated_heads(k.shape[2], group.size)
  k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
  q, k, v = _to_heads((q, k, v), group, runs)
  q, k, v = (checkpoint_name(x, "sequence_kv") for x in (q, k, v))
  if ids is not None:
    B, _, L = ids.shape
    ids = ids.reshape(B * ring.size, group.size, runs, L // runs)
    ids = _in_order(ids).reshape(B, ring.size, -1)
  if ring.size == 1:
    out = block_sparse_attention(
      q, k, v, segment_ids=None if ids is None else ids[:, 0], **rule._asdict()
    )
  else:
    out = ring_attention(q, k, v, ring=ring, ids=ids, layout=layout, rule=rule)
  return _to_tokens(out, group, runs)


def _to_heads(arrays, group: Group, runs: int):
  """One all-to-all: ``[B,L,heads,H]`` to ``[B,U*L,heads/U,H]`` in the order of the sequence."""
  U = group.size
  B, L = arrays[0].shape[:2]
  flat = [x.reshape(B, L, U, -1) for x in arrays]  # by the rank that gets them
  widths = [x.shape[-1] for x in flat]
  x = group.all_to_all(jnp.concatenate(flat, axis=-1), split=2, concat=1)
  x = _in_order(x.reshape(B, U, runs, L // runs, -1)).reshape(B, U * L, -1)
  starts = [sum(widths[:i]) for i in range(1, len(widths))]
  return [
    y.reshape(B, U * L, a.shape[2] // U, a.shape[3])
    for y, a in zip(jnp.split(x, starts, axis=-1), arrays)
  ]


def _to_tokens(out: jax.Array, group: Group, runs: int) -> jax.Array:
  """The way back: ``[B,U*L,N/U,Hv]`` to ``[B,L,N,Hv]``."""
  (B, tokens), U = out.shape[:2], group.size
  x = out.reshape(B, runs, U, tokens // U // runs, *out.shape[2:])
  x = jnp.stack([x[:, 0], *(jnp.flip(x[:, i], 1) for i in range(1, runs))], axis=2)
  x = x.reshape(out.shape)
  return group.all_to_all(x, split=1, concat=2)


def _in_order(x: jax.Array) -> jax.Array:
  """``[B,U,runs,l,...]`` as ``[B,runs*U,l,...]``: first runs by rank, then second ones reversed."""
  runs = [x[:, :, 0], *(jnp.flip(x[:, :, i], 1) for i in range(1, x.shape[2]))]
  return jnp.concatenate(runs, axis=1)
