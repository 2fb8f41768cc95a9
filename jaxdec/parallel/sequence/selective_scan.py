# SPDX-License-Identifier: Apache-2.0
"""Mamba's selective scan over a sequence that is split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdec.parallel.sequence.exchange import incoming
from jaxdec.parallel.sequence.linear import check_runs, enter, leave, make_plan
from jaxdec.parallel.sequence.shard import join_runs, split_runs
from jaxdec.parallel.sequence.summary import FORGET, Summary
from pallas_kernels import selective_scan as selective_op
from pallas_kernels.numerics import accumulator


def selective_scan(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None = None,
  *,
  z: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  axis_name: str,
  exchange: str = "gather",
  layout: str = "contiguous",
  chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """A Mamba-1 layer's recurrence inside ``jax.shard_map``: the arrays are this rank's tokens.

  Per channel d and state s, over the tokens of shard r::

    h' = M h + U,   M = exp(A[d,s] sum_t dt_t[d]),   U = the op's state after a start from zero

  and outputs gain ``C_t`` times what is left at token t of the state that enters: the op once more,
  of ``x = 0``. The op from zero depends on no collective. Outputs and gradients are those of
  ``pallas_kernels.selective_scan`` on the whole sequence.

  Communicated along ``axis_name``: as for ``linear_attention`` with channel decay, where a payload
  is U and log M, ``P = 2 B D S`` (and 4 B with documents) in float32, ``P_U = B D S``.

  Args:
    x, dt, z: ``[B,L,D]``. A: ``[D,S]``. B, C: ``[B,L,S]``. D: ``[D]``.
    initial_state: ``[B,D,S]``, before the first token of the whole sequence; A, D and it are equal
      on all ranks.
    segment_ids: int ``[B,L]``. axis_name, exchange, layout: see ``linear_attention``.
    chunk_size: see the op.

  Returns:
    out ``[B,L,D]`` in x's dtype; the state ``[B,D,S]`` after the last token of the whole sequence.

  Raises:
    UserError, ValueError: as ``linear_attention``.

  Sources: "Mamba" (arXiv 2312.00752, algorithm 2); LASP-2 (arXiv 2502.07563).
  """
  name = "selective_scan"
  plan = make_plan(name, axis_name, exchange, layout, 1, 1)
  check_runs(name, plan, x.shape[1])
  x, dt, A, B, C, D, z, segment_ids = enter(plan, (x, dt, A, B, C, D, z, segment_ids))
  options = dict(chunk_size=chunk_size)
  if plan.ranks == 1:
    options |= dict(z=z, initial_state=initial_state, segment_ids=segment_ids)
    out, final = selective_op(x, dt, A, B, C, D, **options)
    return out, leave(plan, final)

  wide, dtype = accumulator(x), x.dtype
  skip = x
  x, dt = x.astype(wide), dt.astype(wide)
  if plan.runs == 2:
    x, dt, B, C, segment_ids = (split_runs(y) for y in (x, dt, B, C, segment_ids))
  y, update = selective_op(x, dt, A, B, C, segment_ids=segment_ids, **options)

  log = jnp.sum(dt, axis=1)[..., None] * A.astype(wide)
  ids = (None, None)
  if segment_ids is not None:
    ids = segment_ids[:, 0], segment_ids[:, -1]
    ends = jnp.any(segment_ids[:, 1:] != segment_ids[:, :-1], axis=1)
    log = jnp.where(ends[:, None, None], FORGET, log)
  log = jnp.where(log < FORGET, FORGET, log)
  run = Summary(update[..., None], log, None, *ids)
  run = jax.tree.map(lambda a: a.reshape(plan.runs, -1, *a.shape[1:]), run)
  start = None if initial_state is None else initial_state[..., None]
  state, final = incoming(run, start, plan)

  options |= dict(initial_state=state.reshape(update.shape), segment_ids=segment_ids)
  seen, _ = selective_op(jnp.zeros_like(x), dt, A, B, C, **options)
  y = y + seen
  if plan.runs == 2:
    y = join_runs(y)
  if D is not None:
    y = y + D.astype(wide) * skip.astype(wide)
  if z is not None:
    y = y * jax.nn.silu(z.astype(wide))
  return y.astype(dtype), final[..., 0]
