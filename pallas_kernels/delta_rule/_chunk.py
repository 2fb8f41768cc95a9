# SPDX-License-Identifier: Apache-2.0
"""One chunk of the delta rule in WY form, forward and backward, on tiles.

Within a chunk the writes ``vn`` (what each token really adds, beside its decayed past) solve a unit
lower triangular system, ``(I + A) vn = beta V - Kb S`` with ``A = beta scores(K, K)``: Yang et al.,
"Parallelizing Linear Transformers with the Delta Rule" (arXiv:2406.06484), with decays as in "Gated
Delta Networks" (arXiv:2412.06464) and "Kimi Linear" (arXiv:2510.26692). What doesn't depend on the
state comes first, for all chunks at once (``prepare``); the walk over states is two products a
chunk; the gradients that need states, not their order, come last (``gradients``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Products, grid

Decay = Any  # ScalarDecay or ChannelDecay


class Tiles(NamedTuple):
  q: jax.Array  # [C,H]
  k: jax.Array  # [C,H]
  v: jax.Array  # [C,Hv]
  beta: jax.Array  # [C,1]
  decay: Decay


class Prepared(NamedTuple):
  scores: jax.Array  # [C,C] what tokens read of one another's writes
  inverse: jax.Array  # [C,C] (I + A)^-1
  erase: jax.Array  # [C,H] beta k, decayed since the chunk's start
  fresh: jax.Array  # [C,Hv] writes of a chunk that starts from an empty state
  seen: jax.Array  # [C,H] writes = fresh - seen @ state
  enter: jax.Array  # [C,H] queries, decayed since the chunk's start
  leave: jax.Array  # [C,H] keys, decayed until the chunk's end
  state: jax.Array  # [1,1] or [H,1] decay of the state


def prepare(
  chunks: list[Tiles],
  dot: Products,
  invert: Callable[[list[jax.Array]], list[jax.Array]],
) -> list[Prepared]:
  """What of chunks doesn't depend on the state, all in step: see ``_inverse.on_lanes``."""
  inverses = invert([c.beta * c.decay.scores(c.k, c.k, dot) for c in chunks])
  scores = [c.decay.scores(c.q, c.k, dot, diagonal=True) for c in chunks]
  fresh = [dot(x, c.beta * c.v) for x, c in zip(inverses, chunks)]
  erase = [c.beta * (c.decay.enter * c.k) for c in chunks]
  seen = [dot(x, e) for x, e in zip(inverses, erase)]
  return [
    Prepared(*parts, c.decay.enter * c.q, c.decay.leave * c.k, c.decay.state)
    for *parts, c in zip(scores, inverses, erase, fresh, seen, chunks)
  ]


def advance(p: Prepared, state: jax.Array, dot: Products) -> tuple[jax.Array, jax.Array]:
  """The chunk's writes ``[C,Hv]`` and the state ``[H,Hv]`` after it."""
  writes = p.fresh - dot(p.seen, state)
  return writes, p.state * state + dot(p.leave, writes, "tn")


def read(p: Prepared, state: jax.Array, writes: jax.Array, dot: Products) -> jax.Array:
  """The outputs ``[C,Hv]`` of a chunk that starts from ``state``."""
  return dot(p.enter, state) + dot(p.scores, writes)


def retreat(
  p: Prepared, d_out: jax.Array, d_state: jax.Array, dot: Products
) -> tuple[jax.Array, jax.Array]:
  """From the gradient of the state after a chunk to that of the state before it.

  Returns:
    The gradient of ``beta V - Kb S`` ``[C,Hv]`` and that of the state.
  """
  d_writes = dot(p.scores, d_out, "tn") + dot(p.leave, d_state)
  d_right = dot(p.inverse, d_writes, "tn")
  return d_right, p.state * d_state + dot(p.enter, d_out, "tn") - dot(p.erase, d_right, "tn")


class Gradients(NamedTuple):
  q: jax.Array  # [C,H]
  k: jax.Array  # [C,H]
  v: jax.Array  # [C,Hv]
  beta: jax.Array  # [C,1]
  later: jax.Array  # [C,1] or [C,H]: a log-decay's gradient is the sum of these from its token on
  earlier: jax.Array  # .. plus the sum of these before its token


def gradients(
  chunk: Tiles,
  state: jax.Array,
  writes: jax.Array,
  d_out: jax.Array,
  d_right: jax.Array,
  d_state: jax.Array,
  dot: Products,
) -> Gradients:
  """Gradients of a chunk's inputs.

  That of a log-decay is a sum, within the chunk, over the pairs (written before t, read at t or
  later) that it lies between: sums of products of one magnitude. The shorter ``q dq - k dk``,
  summed over the whole sequence, subtracts large numbers and keeps no digit under strong decay.

  Args:
    state: ``[H,Hv]`` before the chunk. writes: of ``advance``.
    d_out: gradient of the unscaled output times scale. d_right: of ``retreat``.
    d_state: gradient of the state after the chunk.
  """
  q, k, v, beta, decay = chunk
  d_scores, d_erase = dot(d_out, writes, "nt"), -dot(d_right, writes, "nt")  # strict part is used
  d_diagonal = jnp.sum(d_out * writes, axis=1, keepdims=True)
  d_enter = decay.enter * dot(d_out, state, "nt")
  d_leave = decay.leave * dot(writes, d_state, "nt")
  reads = d_enter + decay.read(d_scores, k, dot)
  erases = decay.read(d_erase, k, dot) - decay.enter * dot(d_right, state, "nt")
  written = decay.write(d_scores, q, dot) + decay.write(beta * d_erase, k, dot)
  later = decay.per_decay(q * reads + k * (beta * erases - written))
  earlier = decay.per_decay(k * d_leave)
  whole = decay.total * decay.per_decay(row(jnp.sum(state * d_state, axis=1, keepdims=True)))
  last = grid(*later.shape)[0] == later.shape[0] - 1
  return Gradients(
    q=reads + d_diagonal * k,
    k=written + d_diagonal * q + d_leave + beta * erases,
    v=beta * d_right,
    beta=jnp.sum(d_right * v, axis=1, keepdims=True) + jnp.sum(k * erases, axis=1, keepdims=True),
    later=later + jnp.where(last, whole, 0),
    earlier=earlier,
  )


def row(column: jax.Array) -> jax.Array:
  """``[H,1]`` as ``[1,H]``, through a whole register."""
  return jnp.broadcast_to(column, (column.shape[0], 8)).T[:1]
