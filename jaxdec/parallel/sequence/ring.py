# SPDX-License-Identifier: Apache-2.0
"""Ring attention (arXiv 2310.01889): keys and values go round, each rank keeps its queries.

In step s rank r meets the keys of rank r - s; parts are merged by their log-sum-exp. While a step
computes, the keys of the next one travel. Steps in which no rank sees anything (a window shorter
than the sequence) are left out, and their permutes with them: a permute may go several ranks far.

Per device, with L = T/W tokens, K key/value heads of width H and n steps besides the first
(n = W - 1 without a window), along the axis of the ring:

  forward    n permutes of [K|V], ``2 B L K H`` elements each
  backward   the same again, and n permutes of [dK|dV] in float32, the last one brings them home

Under a causal mask a contiguous layout leaves rank r idle in W-1-r of the steps; under the zigzag
layout every rank sees exactly half of the pairs of blocks in every step (after the first).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxdec.parallel.sequence import block_attention as block
from jaxdec.parallel.sequence.layout import Axis, axis_rank, blocks_of
from pallas_kernels.manual import vary, varying


@dataclasses.dataclass(frozen=True)
class Ring:
  """Ranks that form a ring: every ``stride``-th along the axis, which holds ``stride`` rings."""

  axis: Axis
  size: int
  stride: int = 1

  @property
  def rank(self) -> jax.Array | int:
    return axis_rank(self.axis) // self.stride

  def rotate(self, x: jax.Array, shift: int) -> jax.Array:
    """``x`` of the rank ``shift`` places before this one."""
    moves = []
    for rank in range(self.size * self.stride):
      place, ring = divmod(rank, self.stride)
      moves.append((rank, (place + shift) % self.size * self.stride + ring))
    return jax.lax.ppermute(x, self.axis, moves)


class Pair(NamedTuple):
  """A run of queries and a run of keys in a step; ``kinds``: how each rank sees it."""

  queries: int
  keys: int
  kinds: tuple[block.Kind, ...]


class Step(NamedTuple):
  """Rank r meets the keys of rank r - shift."""

  shift: int
  pairs: tuple[Pair, ...]


def schedule(size: int, length: int, layout: str, rule: block.Rule) -> tuple[Step, ...]:
  """The steps in which any rank sees anything, and in them the pairs of runs that any rank sees.

  Args:
    length: tokens of a rank.
  """
  blocks = blocks_of(size, layout)
  runs = range(len(blocks[0]))
  each, steps = length // len(runs), []
  for shift in range(size):
    pairs = []
    for a in runs:
      for b in runs:
        distances = [blocks[r][a] - blocks[(r - shift) % size][b] for r in range(size)]
        kinds = tuple(block.kind_of(d, each, rule) for d in distances)
        if set(kinds) != {"hidden"}:
          pairs.append(Pair(a, b, kinds))
    if pairs:
      steps.append(Step(shift, tuple(pairs)))
  return tuple(steps)


def ring_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  ring: Ring,
  ids: jax.Array | None,
  layout: str,
  rule: block.Rule,
) -> jax.Array:
  """Attention over the keys of all ranks of the ring; gradients by a ring of their own.

  Args:
    q: ``[B,L,N,H]``. k, v: ``[B,L,K,H]``, this rank's shard.
    ids: documents of all tokens, int32 ``[B,size,L]`` by rank, or None.

  Returns:
    ``[B,L,N,Hv]`` in q's dtype. The parts are merged in float32 or wider.
  """
  steps = schedule(ring.size, q.shape[1], layout, rule)
  plan = _Plan(ring, steps, len(blocks_of(ring.size, layout)[0]), rule, k.shape[-1])

  @jax.custom_vjp
  def attention(q, k, v, ids):
    return _forward(plan, q, k, v, ids)[0]

  def keep(q, k, v, ids):
    out, lse = _forward(plan, q, k, v, ids)
    # With these a rematerialised layer needs no second forward ring.
    out, lse = checkpoint_name(out, "sequence_state"), checkpoint_name(lse, "sequence_state")
    return out, (q, k, v, ids, out, lse)

  def pull(kept, dout):
    return (*_backward(plan, *kept, dout), None)

  attention.defvjp(keep, pull)
  return attention(q, k, v, ids)


class _Plan(NamedTuple):
  ring: Ring
  steps: tuple[Step, ...]
  runs: int
  rule: block.Rule
  width: int  # H of k

  def split(self, x: jax.Array, axis: int = 1) -> list[jax.Array]:
    return jnp.split(x, self.runs, axis=axis)

  def gap(self, index: int) -> int:
    """How far keys travel after a step; after the last one, home."""
    after = self.steps[index + 1].shift if index + 1 < len(self.steps) else 0
    return after - self.steps[index].shift

  def ahead(self, index: int, kv: jax.Array) -> jax.Array | None:
    """Starts the permute of the next step's keys; nothing after the last step."""
    return self.ring.rotate(kv, self.gap(index)) if index + 1 < len(self.steps) else None

  def merged(self, kind: block.Kind) -> Callable[..., Any]:
    """Of a part and ``q, k, v, ids`` of a pair: the part with these keys too."""
    if kind == "hidden":
      return lambda part, *_: part
    return lambda part, *xs: block.merge(part, block.attend(kind, *xs, self.rule))

  def summed(self, kind: block.Kind) -> Callable[..., Any]:
    """Of sums ``dq, dk, dv`` and what ``gradients`` takes: the sums with this pair's share."""
    if kind == "hidden":
      return lambda sums, *_: sums
    return lambda sums, *xs: tuple(
      x + y for x, y in zip(sums, block.gradients(kind, *xs, self.rule), strict=True)
    )

  def ids(self, ids: jax.Array | None, shift: int) -> list[Any]:
    """Per run, of the rank that is met in the step."""
    if ids is None:
      return [None] * self.runs
    rank = (self.ring.rank - shift) % self.ring.size
    return self.split(jax.lax.dynamic_index_in_dim(ids, rank, axis=1, keepdims=False))


def _forward(plan: _Plan, q, k, v, ids):
  queries, q_ids = plan.split(q), plan.ids(ids, 0)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  batch, each, heads = q.shape[0], q.shape[1] // plan.runs, q.shape[2]
  empty = (
    jnp.zeros((batch, each, heads, v.shape[-1]), wide),
    jnp.full((batch, heads, each), -jnp.inf, wide),
  )
  parts = [vary(empty, varying(q, k, v))] * plan.runs
  kv = block.pack(k, v)
  for index, step in enumerate(plan.steps):
    following = plan.ahead(index, kv)
    keys, values = map(plan.split, block.unpack(kv, plan.width))
    kv_ids = plan.ids(ids, step.shift)
    for a, b, kinds in step.pairs:
      pair = None if ids is None else (q_ids[a], kv_ids[b])
      operands = parts[a], queries[a], keys[b], values[b], pair
      parts[a] = block.choose(kinds, plan.ring.rank, plan.merged, *operands)
    kv = following
  outs, lses = zip(*parts)
  return jnp.concatenate(outs, axis=1).astype(q.dtype), jnp.concatenate(lses, axis=2)


def _backward(plan: _Plan, q, k, v, ids, out, lse, dout):
  wide, axes = lse.dtype, varying(q, k, v, dout)
  delta = jnp.sum(dout.astype(wide) * out.astype(wide), axis=-1).swapaxes(1, 2)
  queries, douts, q_ids = plan.split(q), plan.split(dout), plan.ids(ids, 0)
  lses, deltas = plan.split(lse, 2), plan.split(delta, 2)
  dq = [vary(jnp.zeros(x.shape, wide), axes) for x in queries]
  home = travelling = None
  kv = block.pack(k, v)
  for index, step in enumerate(plan.steps):
    following = plan.ahead(index, kv)
    keys, values = map(plan.split, block.unpack(kv, plan.width))
    kv_ids = plan.ids(ids, step.shift)
    # Summed apart from what arrives, so that this step need not wait for it.
    dk, dv = ([vary(jnp.zeros(x.shape, wide), axes) for x in y] for y in (keys, values))
    for a, b, kinds in step.pairs:
      pair = None if ids is None else (q_ids[a], kv_ids[b])
      operands = (queries[a], keys[b], values[b], pair, lses[a], douts[a], deltas[a])
      sums = dq[a], dk[b], dv[b]
      dq[a], dk[b], dv[b] = block.choose(kinds, plan.ring.rank, plan.summed, sums, *operands)
    dkv = block.pack(*(jnp.concatenate(x, axis=1) for x in (dk, dv)))
    if index == 0:
      home = dkv  # of this rank's own keys: these need not travel
    else:
      travelling = plan.ring.rotate(
        dkv if travelling is None else dkv + travelling, plan.gap(index)
      )
    kv = following
  total = home if travelling is None else home + travelling
  dk, dv = block.unpack(total, plan.width)
  return jnp.concatenate(dq, axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
