# SPDX-License-Identifier: Apache-2.0
"""States that enter each shard, from every shard's map: the only communication of linear layers.

Shard r takes the state by ``S' = M_r S + U_r`` (``summary``), so what enters it is a fold over the
shards before it, and the gradient E of what leaves it is the transposed fold over those behind::

  S_r = M_{r-1} S_{r-1} + U_{r-1}          E_r = M_{r+1}^T E_{r+1} + dS_{r+1}
  dU_r = E_r,   dM_r = E_r S_r^T           (summed over what shares a log-decay)

Both are the same exchange, run in opposite directions. With P the elements of a packed map
(``payload_elements``), P_U those of a state, and W ranks:

========  ====================================  ================================================
exchange  collectives, one way                  elements received by a rank, one way
========  ====================================  ================================================
gather    1 all-gather                          (W-1) P
scan      ceil(log2 W) permutes                 (ceil(log2 W) - 1) P + P_U
chain     W + slices - 2 permutes               P_U (ids of documents with each slice)
========  ====================================  ================================================

Zigzag shards hold two runs of tokens: gather then moves two maps a rank in its one collective, scan
and chain go up the ranks and down again. The state behind the last token comes with gather; scan
and chain broadcast it by one masked sum, absent where it isn't used.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxdec.parallel.sequence.ranks import Plan
from jaxdec.parallel.sequence.summary import (
  FORGET,
  Summary,
  adjoint,
  after,
  compose,
  cut,
  ending,
  map_gradient,
  meet,
  pack,
  unpack,
)
from pallas_kernels.manual import vary, varying

SAVED = "sequence_state"  # the checkpoint name of what a rematerialised layer must keep


def incoming(
  run: Summary, initial_state: jax.Array | None, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """The state that enters each run of this shard, and the one behind the last token.

  Args:
    run: of this rank, ``[runs,B,..]``.
    initial_state: ``[B,N,H,Hv]``, before the first token of all, the same on all ranks; or None.

  Returns:
    ``[runs,B,N,H,Hv]``, and ``[B,N,H,Hv]``, the same on all ranks.
  """
  if plan.exchange == "gather":
    first = plan.own == 0
    run, start = _start_from(run, initial_state, first[:, None, None, None, None])
    state, final = gather(plan, run)
    if not plan.invariant:
      final = _shared(plan.axis, final)
    return state + start, final
  runs = [jax.tree.map(lambda x, i=i: x[i], run) for i in range(plan.runs)]
  up = dataclasses.replace(plan, runs=1)
  state, leaving = _one_way(runs[0], initial_state, up)
  if plan.runs == 1:
    return state[None], _broadcast(leaving, up)
  # The second runs lie in the opposite order: the state turns round on the last rank.
  middle = cut(leaving, meet(runs[0], runs[1]))
  second, leaving = _one_way(runs[1], middle, up.back)
  return jnp.stack([state, second]), _broadcast(leaving, up.back)


def _one_way(run: Summary, initial_state, plan: Plan):
  """States that enter and leave each rank's run."""
  run, start = _start_from(run, initial_state, plan.position == 0)
  state = fold(plan, run)
  return state + start, after(run, state)


def _start_from(run: Summary, initial_state, here):
  """A start from ``initial_state`` as one from zero, with a larger U where the first run lies.

  Returns:
    That run, and what its incoming state lacks.
  """
  if initial_state is None:
    return run, jnp.zeros((), run.update.dtype)
  # Cast once: the transpose of the cast is a sum over the ranks.
  state = vary(initial_state.astype(run.update.dtype), varying(run.update))
  if run.update.ndim > state.ndim:
    state = jnp.broadcast_to(state, run.update.shape)
  moved = jnp.where(here, after(run._replace(update=jnp.zeros_like(state)), state), 0)
  return run._replace(update=run.update + moved), jnp.where(here, state, 0)


def _broadcast(leaving: jax.Array, plan: Plan) -> jax.Array:
  """What leaves the last run, on all ranks."""
  last = plan.position == plan.ranks - 1
  return checkpoint_name(lax.psum(jnp.where(last, leaving, 0), plan.axis), SAVED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shared(axis: str, x: jax.Array) -> jax.Array:
  """``x``, equal on all ranks, each of which holds its own share of the gradient."""
  return x


_shared.defvjp(lambda axis, x: (x, None), lambda axis, _, dx: (lax.psum(dx, axis),))


# gather ------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(plan: Plan, run: Summary) -> tuple[jax.Array, jax.Array]:
  """LASP-2 (arXiv 2502.07563, algorithm 2) for maps of every kind: one all-gather each way.

  A reduce-scatter of W shares of gradients would do for the second one where M is diagonal. It
  moves as much and needs as much memory, and compilers for TPUs make it an all-reduce, twice the
  traffic, when an axis spans more than one dimension of the torus.

  Args:
    run: ``[runs,B,..]``.

  Returns:
    ``[runs,B,N,H,Hv]`` after a start from zero, and the state behind the last run ``[B,N,H,Hv]``.
  """
  return _gather_forward(plan, run)[0]


def _gather_forward(plan: Plan, run: Summary):
  state, final = (checkpoint_name(x, SAVED) for x in _gather(plan, run))
  return (state, final), (run._replace(update=None), state)


def _gather_backward(plan: Plan, saved, cotangents):
  run, state = saved
  d_state, d_final = cotangents
  first = plan.back.own == 0
  back, start = _start_from(adjoint(run, d_state), d_final, first[:, None, None, None, None])
  leaving = _gather(plan.back, back)[0] + start
  return (map_gradient(run, state, leaving),)


gather.defvjp(_gather_forward, _gather_backward)


def _gather(plan: Plan, run: Summary) -> tuple[jax.Array, jax.Array]:
  gathered = lax.all_gather(pack(run), plan.axis, to="invarying")  # [W,runs,B,E]
  blocks = unpack(plan.in_order(gathered), run)
  cuts = None
  if run.first is not None:
    cuts = jnp.pad(blocks.first[1:] != blocks.last[:-1], ((1, 0), (0, 0)))
  if run.dense is not None:
    return _fold_blocks(plan, blocks, cuts)

  def before(position):
    weights = _weights(blocks.log, cuts, plan.blocks, position)
    heads = blocks.update.shape[-3]
    return jnp.sum(_by_head(weights, heads) * blocks.update, axis=1)

  return before(plan.own), before(jnp.array([plan.blocks]))[0]


def _weights(logs, cuts, blocks: int, position: jax.Array) -> jax.Array:
  """What is left of each block's update before block ``position[p]``: ``[p,blocks,B|1,n|1,h|1]``.

  The exponents are sums of the log-decays between two blocks, never differences of longer sums: a
  shard may forget e^-10000, and its neighbour's e^-0.02 must survive beside that.
  """
  index = jnp.arange(blocks)[:, None, None, None]
  position = position[:, None, None, None, None]
  exponent = jnp.zeros((1, 1, 1, 1, 1), jnp.float32 if logs is None else logs.dtype)
  if logs is not None:
    forget = 0 if cuts is None else jnp.where(cuts, FORGET, 0).astype(logs.dtype)[..., None, None]
    passed = jnp.where(index < position, logs + forget, 0)  # [p,blocks,B,n,h]
    behind = jnp.pad(passed[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
    exponent = lax.cumsum(behind, axis=1, reverse=True)
    if cuts is not None:
      at = jnp.where(index == position, forget, 0)
      exponent = exponent + jnp.sum(at, axis=1, keepdims=True)
  return jnp.where(index < position, jnp.exp(exponent), 0)


def _by_head(weights: jax.Array, heads: int) -> jax.Array:
  """Weights ``[p,blocks,B,n,h]`` as factors of states ``[..,B,N,H,Hv]``."""
  n = weights.shape[3]
  return (weights if n == 1 else jnp.repeat(weights, heads // n, axis=3))[..., None]


def _fold_blocks(plan: Plan, blocks: Summary, cuts):
  """For matrices M: one product a block, in order."""
  own = plan.own[:, None, None, None, None]

  def step(carry, block):
    state, kept = carry
    index, run, here = block
    state = cut(state, here)
    kept = jnp.where(own == index, state, kept)
    return (after(run, state), kept), None

  state = jnp.zeros_like(blocks.update[0])
  kept = vary(jnp.zeros((plan.runs, *state.shape), state.dtype), varying(state, own))
  (state, kept), _ = lax.scan(step, (state, kept), (jnp.arange(plan.blocks), blocks, cuts))
  return kept, state


# scan and chain ----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fold(plan: Plan, run: Summary) -> jax.Array:
  """The state ``[B,N,H,Hv]`` that enters each rank after a start from zero, by permutes."""
  return _fold_forward(plan, run)[0]


def _fold_forward(plan: Plan, run: Summary):
  state = checkpoint_name((scan if plan.exchange == "scan" else chain)(plan, run), SAVED)
  return state, (run._replace(update=None), state)


def _fold_backward(plan: Plan, saved, d_state):
  run, state = saved
  back = (scan if plan.exchange == "scan" else chain)(plan.back, adjoint(run, d_state))
  return (map_gradient(run, state, back),)


fold.defvjp(_fold_forward, _fold_backward)


def scan(plan: Plan, run: Summary) -> jax.Array:
  """An exclusive scan of maps in ``ceil(log2 W)`` permutes (Hillis and Steele, 1986).

  Before the round of distance d, ``until`` is the map of the d runs up to this one (fewer at the
  start of the ranks), ``before`` that of the d - 1 runs before it. The last round sends no M. Where
  nobody sends, zeros arrive: a start from a state of zero, whatever M is.
  """
  until, before, distance = run, None, 1
  while distance < plan.ranks:
    more = 2 * distance < plan.ranks
    sent = until if more else until._replace(log=None, dense=None, first=None)
    got = unpack(plan.permute(pack(sent), distance), sent)
    before = ending(got, meet(got, run)) if before is None else compose(before, got)
    if more:
      until = compose(until, got)
    distance *= 2
  return before.update


def chain(plan: Plan, run: Summary) -> jax.Array:
  """Each rank hands the state on, the first to the last: LASP-1 (arXiv 2404.02882, algorithm 2).

  With ``slices > 1`` the state is cut along Hv and rank r hands on slice i at time ``r + i``, so
  that W ranks work on different slices at once (ZeCO, arXiv 2507.01004, All-Scan).
  """
  slices, position = plan.slices, plan.position
  pieces = jnp.stack(jnp.split(run.update, slices, axis=-1))
  state = jnp.zeros_like(pieces)

  def piece(x, index):
    return lax.dynamic_index_in_dim(x, jnp.clip(index, 0, slices - 1), keepdims=False)

  for time in range(plan.ranks + slices - 2):
    senders = range(max(0, time - slices + 1), min(time, plan.ranks - 2) + 1)
    mine = run._replace(update=piece(pieces, time - position))
    leaving = after(mine, piece(state, time - position))
    sent = Summary(leaving, last=run.last)
    got = unpack(plan.permute(pack(sent), 1, senders), sent)
    index = time - position + 1
    entering = piece(state, index) + cut(got.update, meet(got, run))
    state = lax.dynamic_update_index_in_dim(state, entering, jnp.clip(index, 0, slices - 1), axis=0)
  return jnp.concatenate(list(state), axis=-1)
