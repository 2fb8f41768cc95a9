# SPDX-License-Identifier: Apache-2.0
"""Linear attention and delta rules over a sequence that is split over devices.

A shard's outputs are those of a start from zero plus what its queries read of the state that
enters it (``exchange``). The first part, all of the work inside chunks, is the op of
``pallas_kernels`` and depends on no collective; the collective depends on the shard's summary
alone, which comes first in the program. So the two can run at the same time.
"""

from __future__ import annotations

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxdec.errors import UserError
from jaxdec.parallel.sequence.config import EXCHANGES, LAYOUTS, check_choice
from jaxdec.parallel.sequence.exchange import SAVED, incoming
from jaxdec.parallel.sequence.ranks import Plan
from jaxdec.parallel.sequence.shard import Shard, flip, join_runs
from pallas_kernels.manual import vary, varying
from pallas_kernels.numerics import repeat_heads


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  log_decay: jax.Array | None = None,
  beta: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  axis_name: str,
  exchange: str = "gather",
  causal: bool = True,
  layout: str = "contiguous",
  slices: int = 1,
  scale: float | None = None,
  chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """A recurrent layer inside ``jax.shard_map``: the arrays are this rank's tokens.

  With M_r and U_r the shard's map (1, a decay, or for delta rules a matrix), per head::

    S_r = M_{r-1} S_{r-1} + U_{r-1}        out = op(q, k, v from S = 0) + scale * Q_r S_r

  where Q_r are the queries, decayed since the shard's start (delta rules: also erased). Outputs and
  gradients are those of the op on the whole sequence, under ``check_vma=True`` and ``False``.

  Communicated along ``axis_name``, in float32 and independent of how long the shards are, with P
  elements for a map and P_U for its U alone (``payload_elements``): ``gather`` one all-gather of P
  each way; ``scan`` ceil(log2 W) permutes each way, of P and the last of P_U; ``chain``
  W + slices - 2 permutes of P_U / slices each way. ``exchange`` has the bytes received. Nothing for
  W = 1. ``causal=False`` without decay and documents: one all-reduce of P_U each way; otherwise two
  exchanges, one a direction.

  What a rematerialised layer has to keep, so that no collective runs again, carries the
  ``checkpoint_name`` "sequence_state".

  Args:
    q, k: ``[B,L,heads,H]``. v: ``[B,L,heads,Hv]``. N is the largest head count; each divides it.
    log_decay: ``[B,L,heads]`` or ``[B,L,heads,H]`` (B and L may be 1), at most 0.
    beta: ``[B,L,N]``: the delta rule.
    initial_state: ``[B,heads,H,Hv]``, before the first token of the whole sequence; equal on all
      ranks. With more heads than keys, values and decays have, P grows to its heads.
    segment_ids: int ``[B,L]``, documents, which may straddle shards; neighbours have other ids.
    axis_name: the mesh axis that splits the sequence, in order of its ranks.
    exchange: ``gather`` (LASP-2), ``scan`` or ``chain`` (LASP-1; with slices ZeCO).
    causal: False: every token reads all others (of its document), later ones through a second
      recurrence from the last token to the first. ``initial_state`` and ``final_state`` belong to
      the forward one. Not for delta rules.
    layout: ``contiguous``, or ``zigzag``: blocks r and 2W-1-r of 2W, one behind the other.
    slices: into how many parts of Hv ``chain`` cuts a state.
    scale: factor on q; None: ``H ** -0.5``. chunk_size: see the ops.

  Returns:
    ``out [B,L,N,Hv]`` in q's dtype, and ``final_state [B,N,H,Hv]`` float32 (float64 for float64
    inputs), after the last token of the whole sequence, the same on all ranks.

  Raises:
    UserError: an unknown choice, an axis that isn't bound, a zigzag shard of odd length, slices
      that don't divide Hv, a delta rule with ``causal=False``.
    ValueError: shapes that don't fit; see the ops.

  Sources: LASP-2 (2502.07563), LASP (2404.02882), ZeCO (2507.01004), Gated DeltaNet (2412.06464).
  """
  name = "linear_attention"
  plan = make_plan(name, axis_name, exchange, layout, slices, v.shape[-1])
  if beta is not None and not causal:
    raise UserError(
      f"{name}: causal=False was given for a delta rule (beta), which has no bidirectional form; "
      "use causal=True, or a causal layer for each direction"
    )
  arrays = (q, k, v, log_decay, beta, segment_ids)
  q, k, v, log_decay, beta, segment_ids = enter(plan, arrays)
  heads = _heads(name, q=q, k=k, v=v, log_decay=log_decay, beta=beta)
  if initial_state is not None:
    heads = max(heads, initial_state.shape[1])
  layer = Shard(q, k, v, log_decay, beta, segment_ids, heads, scale, chunk_size)
  if not causal and log_decay is None and segment_ids is None:
    return _read_all(layer, initial_state, plan)
  check_runs(name, plan, q.shape[1])
  if plan.runs == 2:
    layer = layer.split_runs()
  out, final = _causal(layer, initial_state, plan)
  if not causal:
    # A flipped zigzag shard is the same rank's zigzag shard of the flipped sequence.
    back = plan if plan.runs == 2 else plan.back
    behind, _ = _causal(layer.flip(plan.runs), None, back)
    out = out + flip(behind, plan.runs) - layer.diagonal()
  if plan.runs == 2:
    out = join_runs(out)
  return out.astype(q.dtype), repeat_heads(final, heads)


def _causal(layer: Shard, initial_state, plan: Plan):
  """Outputs ``[runs*B,L,N,Hv]`` and the final state."""
  if plan.ranks == 1:
    out, final = layer.op(initial_state)
    return out, leave(plan, final)
  run, link = layer.summary(0 if initial_state is None else initial_state.shape[1])
  run = jax.tree.map(lambda x: x.reshape(plan.runs, -1, *x.shape[1:]), run)
  if initial_state is not None:
    initial_state = repeat_heads(initial_state, run.update.shape[-3])
  state, final = incoming(run, initial_state, plan)
  return layer.outputs(state.reshape(-1, *state.shape[2:]), final, link)


def _read_all(layer: Shard, initial_state, plan: Plan):
  """Every token reads the sum of all updates: LASP-2 without mask (algorithm 1)."""
  run, _ = layer.summary(0 if initial_state is None else initial_state.shape[1])
  state = run.update
  if plan.ranks > 1 or plan.invariant:
    state = checkpoint_name(lax.psum(state, plan.axis), SAVED)
  if initial_state is not None:
    state = state + repeat_heads(initial_state, state.shape[1])
  out = layer.read(state).astype(layer.q.dtype)
  return out, repeat_heads(state, layer.heads)


def make_plan(name, axis_name, exchange, layout, slices, width) -> Plan:
  """The exchange that was asked for, after checks that need no array."""
  check_choice(f"{name}: exchange", exchange, EXCHANGES)
  check_choice(f"{name}: layout", layout, LAYOUTS)
  if slices < 1 or width % slices:
    allowed = [d for d in range(1, width + 1) if width % d == 0]
    raise UserError(f"{name}: slices={slices} does not divide {width} values; use one of {allowed}")
  try:
    rank = lax.axis_index(axis_name)
  except NameError:
    raise UserError(
      f"{name}: axis_name={axis_name!r} is not a mesh axis here; call it inside jax.shard_map over "
      "a mesh that has this axis"
    ) from None
  runs = 2 if layout == "zigzag" and lax.axis_size(axis_name) > 1 else 1
  return Plan(axis_name, exchange, runs=runs, slices=slices, invariant=bool(varying(rank)))


def check_runs(name: str, plan: Plan, length: int) -> None:
  """Raises ``UserError`` where a shard can't be cut in two."""
  if length % plan.runs:
    raise UserError(
      f"{name}: layout='zigzag' needs an even number of tokens on a rank, got {length}; pad the "
      f"sequence to a multiple of {2 * plan.ranks}"
    )


def enter(plan: Plan, arrays):
  """The arrays as values that vary alike (their gradients are summed where they did not)."""
  return vary(arrays, varying(arrays, lax.axis_index(plan.axis)))


def leave(plan: Plan, state: jax.Array) -> jax.Array:
  """On one rank: the state as a value that is the same on all ranks."""
  return lax.psum(state, plan.axis) if plan.invariant else state


def _heads(name: str, **arrays) -> int:
  counts = {key: x.shape[2] for key, x in arrays.items() if x is not None}
  heads = max(counts.values())
  for key, count in counts.items():
    if heads % count:
      raise UserError(f"{name}: {key} has {count} heads, which don't divide {heads}, the largest")
  return heads
