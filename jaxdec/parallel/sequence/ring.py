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
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxdec.parallel.sequence import block_attention as block
from jaxdec.parallel.sequence.layout import Axis, axis_rank, blocks_of
from pallas_kernels.manual import vary, varying

UNROLLED = 16  # steps of a ring written out one by one


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


class _Met(NamedTuple):
  """A step under way: ``pairs`` are queries' run, keys' run, kinds and which of them holds here."""

  first: bool
  shift: jax.Array | int
  gap: int  # ranks that the keys then travel; after the last step, home
  pairs: tuple[tuple[int, int, tuple[block.Kind, ...], jax.Array | int], ...]


class _Plan(NamedTuple):
  ring: Ring
  steps: tuple[Step, ...]
  runs: int
  rule: block.Rule
  width: int  # H of k

  def split(self, x: jax.Array, axis: int = 1) -> list[jax.Array]:
    return jnp.split(x, self.runs, axis=axis)

  def ids(self, ids: jax.Array | None, shift: jax.Array | int) -> list[Any]:
    """Per run, of the rank that is met in the step."""
    if ids is None:
      return [None] * self.runs
    rank = (self.ring.rank - shift) % self.ring.size
    return self.split(jax.lax.dynamic_index_in_dim(ids, rank, axis=1, keepdims=False))

  def walk(self, body: Callable[[jax.Array, Any, _Met], Any], kv: jax.Array, carry: Any) -> Any:
    """``carry = body(kv, carry, met)`` step by step, while the next step's keys travel.

    The keys do not travel after the last step. Long rings are a loop between the first step and the
    last: a program, and the time to compile it, else grows with the ranks.
    """
    shifts = [step.shift for step in self.steps]
    gaps = [b - a for a, b in zip(shifts, [*shifts[1:], 0])]
    last = len(shifts) - 1
    rolled = last > UNROLLED and len(set(gaps[1:last])) == 1
    index = 0
    while index <= last:
      inside = range(1, last) if rolled and index == 1 else range(index, index + 1)
      tables = self._tables(inside)

      def one(state, x, index=index, tables=tables):
        kv, carry = state
        shift, rows = x
        following = self.ring.rotate(kv, gaps[index]) if index < last else kv
        pairs = tuple((*pair, row[self.ring.rank]) for pair, row in zip(tables, rows))
        return (following, body(kv, carry, _Met(index == 0, shift, gaps[index], pairs))), None

      xs = jnp.array([shifts[i] for i in inside]), [jnp.asarray(x) for x in tables.values()]
      if len(inside) > 1:
        (kv, carry), _ = jax.lax.scan(one, (kv, carry), xs)
      else:
        (kv, carry), _ = one((kv, carry), jax.tree.map(lambda x: x[0], xs))
      index = inside.stop
    return carry

  def _tables(self, inside: range) -> dict[tuple[int, int, tuple[block.Kind, ...]], np.ndarray]:
    """Of all pairs in these steps: their kinds, and which of them holds, ``[steps, ranks]``."""
    seen = [{(p.queries, p.keys): p.kinds for p in self.steps[i].pairs} for i in inside]
    hidden = ("hidden",) * self.ring.size
    tables = {}
    for runs in sorted(set().union(*seen)):
      rows = [step.get(runs, hidden) for step in seen]
      kinds = tuple(sorted(set().union(*rows), key=str))
      tables[*runs, kinds] = np.array([[kinds.index(k) for k in row] for row in rows], np.int32)
    return tables


def _forward(plan: _Plan, q, k, v, ids):
  queries, q_ids = plan.split(q), plan.ids(ids, 0)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  batch, each, heads = q.shape[0], q.shape[1] // plan.runs, q.shape[2]
  empty = (
    jnp.zeros((batch, each, heads, v.shape[-1]), wide),
    jnp.full((batch, heads, each), -jnp.inf, wide),
  )

  def branch(kind):
    if kind == "hidden":
      return lambda part, *_: part
    return lambda part, *xs: block.merge(part, block.attend(kind, *xs, plan.rule))

  def body(kv, parts, met: _Met):
    keys, values = map(plan.split, block.unpack(kv, plan.width))
    kv_ids, parts = plan.ids(ids, met.shift), list(parts)
    for a, b, kinds, here in met.pairs:
      pair = None if ids is None else (q_ids[a], kv_ids[b])
      operands = parts[a], queries[a], keys[b], values[b], pair
      parts[a] = block.choose(kinds, here, branch, *operands)
    return parts

  parts = [vary(empty, varying(q, k, v))] * plan.runs
  outs, lses = zip(*plan.walk(body, block.pack(k, v), parts))
  return jnp.concatenate(outs, axis=1).astype(q.dtype), jnp.concatenate(lses, axis=2)


def _backward(plan: _Plan, q, k, v, ids, out, lse, dout):
  wide, axes = lse.dtype, varying(q, k, v, dout)
  delta = jnp.sum(dout.astype(wide) * out.astype(wide), axis=-1).swapaxes(1, 2)
  queries, douts, q_ids = plan.split(q), plan.split(dout), plan.ids(ids, 0)
  lses, deltas = plan.split(lse, 2), plan.split(delta, 2)

  def zeros(arrays):
    return [vary(jnp.zeros(x.shape, wide), axes) for x in arrays]

  def branch(kind):
    if kind == "hidden":
      return lambda sums, *_: sums

    def add(sums, *xs):
      more = block.gradients(kind, *xs, plan.rule)
      return tuple(x + y for x, y in zip(sums, more, strict=True))

    return add

  def body(kv, carry, met: _Met):
    dq, home, travelling = carry
    keys, values = map(plan.split, block.unpack(kv, plan.width))
    kv_ids, dq = plan.ids(ids, met.shift), list(dq)
    dk, dv = zeros(keys), zeros(values)
    for a, b, kinds, here in met.pairs:
      pair = None if ids is None else (q_ids[a], kv_ids[b])
      operands = queries[a], keys[b], values[b], pair, lses[a], douts[a], deltas[a]
      sums = dq[a], dk[b], dv[b]
      dq[a], dk[b], dv[b] = block.choose(kinds, here, branch, sums, *operands)
    share = block.pack(*(jnp.concatenate(x, axis=1) for x in (dk, dv)))
    if met.first:
      return dq, share, travelling  # of this rank's own keys: it need not travel
    # Added after the step: the step itself does not wait for what arrives.
    return dq, home, plan.ring.rotate(share + travelling, met.gap)

  # The keys go round again, the other way and tied to the cotangent: the compiler must not find the
  # permutes of the forward ring in these, and keep what every one of them brought until here.
  plan = plan._replace(steps=(plan.steps[0], *plan.steps[:0:-1]))
  kv, _ = jax.lax.optimization_barrier((block.pack(k, v), dout))
  (empty,) = zeros([kv])
  dq, home, travelling = plan.walk(body, kv, (zeros(queries), empty, empty))
  dk, dv = block.unpack(home + travelling, plan.width)
  return jnp.concatenate(dq, axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
