# SPDX-License-Identifier: Apache-2.0
"""The backward kernel of linear attention on TPUs: the steps of a sequence from the last one.

With ``S`` the state before a chunk, ``dS'`` the gradient of the state after it, ``D`` the decays
between its tokens (and the scale), ``A = QK^T * D`` and ``dA`` the lower triangle of ``dO V^T``::

    dQ = (dA * D) K + exp(G) * (dO S^T)        dK = (dA * D)^T Q + exp(G_C - G) * (V dS'^T)
    dV = A^T dO + (exp(G_C - G) * K) dS'       dS = exp(G_C) dS' + (exp(G) * Q)^T dO
    dg_t = sum of (dA * A)_ij over i >= t > j
           + sum over i >= t of what q_i gets from S, times q_i
           + sum over j < t of what k_j gets from dS', times k_j  +  exp(G_C) <S, dS'>

Each pair of a write before t and a read from t on is counted once, inside its chunk. The shorter
``dg = reverse cumulative sum of q dq - k dk`` over the sequence is the difference of large sums,
whose rounding buries the gradients of strong decays.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu
from pallas_kernels._chunks import grid, sum_before, sum_from
from pallas_kernels._tpu import from_kernel, kernel_shape, to_kernel
from pallas_kernels.linear_attention._sequences import (
  exclusive_cumsum,
  reverse_cumsum,
  sum_heads,
)
from pallas_kernels.linear_attention._tpu_forward import entering, next_state, scores
from pallas_kernels.linear_attention._tpu_layout import (
  Layout,
  Scalar,
  chunk_decays,
)

BACKWARD_WIDTH = {"none": 2, "scalar": 2, "channel": 1}  # chunks the compiler overlaps
_SUMS = 3  # numbers a token for the gradient of a scalar log-decay


def _column_sums(x):
  return jnp.sum(x, axis=1, keepdims=True)


def _row_of_sums(layout: Layout, x):
  """Sums over the lanes of ``[C,H]``, as a row ``[1,C]``, by the matrix unit."""
  return layout.dot(jnp.ones((8, x.shape[1]), jnp.float32), x, "nt")[:1]


class _Inside(NamedTuple):
  """What the tokens of a chunk owe each other, before states are known.

  ``d_read``: gradient of the state before the chunk through its outputs. ``dg``: of the log-decays:
  a row of sums (scalar), or the sum of it by channel that is still to be accumulated.
  """

  dq: jax.Array
  dk: jax.Array
  dv: jax.Array
  d_read: jax.Array
  dg: jax.Array | None


def _inside(layout: Layout, decay, q, k, v, d_out) -> _Inside:
  dot = layout.dot
  i, j = grid(layout.chunk, layout.chunk)
  d_scores = dot(d_out, v, "nt")
  a = scores(layout, decay, q, k)
  dv = dot(a, d_out, "tn")
  d_read = dot(entering(layout, decay, q), d_out, "tn")
  if isinstance(decay, Scalar):
    d_products = d_scores * decay.between
    crossing = jnp.where(i > j, d_scores * a, 0)  # the diagonal crosses no decay
    reads = _row_of_sums(layout, crossing) - jnp.sum(crossing, axis=0, keepdims=True)
    return _Inside(dot(d_products, k), dot(d_products, q, "tn"), dv, d_read, reads)
  d_scores = jnp.where(i >= j, d_scores * layout.scale, 0)
  if decay is None:
    return _Inside(dot(d_scores, k), dot(d_scores, q, "tn"), dv, d_read, None)
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  strict = jnp.where(i > j, d_scores, 0)
  diagonal = _column_sums(jnp.where(i == j, d_scores, 0))
  dq, dk = decay.read(strict, k, dot), decay.write(strict, q, dot)
  return _Inside(dq + diagonal * k, dk + diagonal * q, dv, d_read, q * dq - k * dk)


def _across(layout: Layout, decay, inside: _Inside, state, d_state, q, k, v, d_out):
  """Adds what passes through the states: ``dq, dk, dv``, and rows or channels of ``dg``."""
  dot = layout.dot
  dq_state, dk_state = dot(d_out, state, "nt"), dot(v, d_state, "nt")
  if decay is None:
    dq = inside.dq + dq_state * layout.scale
    return dq, inside.dk + dk_state, inside.dv + dot(k, d_state), None
  scale = 1.0 if isinstance(decay, Scalar) else layout.scale
  dq_state, dk_state = dq_state * (decay.enter * scale), dk_state * decay.leave
  dv = inside.dv + dot(k * decay.leave, d_state)
  if isinstance(decay, Scalar):
    reads = inside.dg + _row_of_sums(layout, q * dq_state)
    leaving = _row_of_sums(layout, k * dk_state)
    through = jnp.sum(state * d_state, keepdims=True) * decay.state
    dg = (reads, leaving, jnp.broadcast_to(through, reads.shape))
  else:
    through = jnp.broadcast_to(_column_sums(state * d_state), state.shape).T[:1] * decay.total
    dg = sum_from(inside.dg + q * dq_state) + sum_before(k * dk_state) + through
  return inside.dq + dq_state, inside.dk + dk_state, dv, dg


def _kernel(layout: Layout, shared: tuple[int, int, int], *refs):
  refs = list(refs)
  decay_ref = refs.pop(0) if layout.decay != "none" else None
  q_ref, k_ref, v_ref, initial_ref, saved_ref, d_out_ref, d_final_ref = refs[:7]
  dq_ref, dk_ref, dv_ref, d_initial_ref, *refs = refs[7:]
  dg_ref = refs.pop(0) if layout.decay != "none" else None
  d_state_ref, states_ref, *sum_refs = refs
  step, r = pl.program_id(2), pl.program_id(3)
  m = layout.chunks

  @pl.when(step == 0)
  def _():
    d_state_ref[r] = d_final_ref[...]

  decays = chunk_decays(layout, decay_ref)

  def tokens(ref, c):
    return ref[layout.rows(c), :]

  def recompute(chunks, state):
    for c in chunks:
      states_ref[c] = state
      state = next_state(layout, decays(c), state, tokens(k_ref, c), tokens(v_ref, c))
    return state

  first = jnp.where(step == layout.steps - 1, initial_ref[...], saved_ref[...])
  layout.walk(1, recompute, first)

  # Heads that share an array add up, in float32, in `sum_refs`; the last of them writes the sum.
  inputs, outputs = (q_ref, k_ref, v_ref, d_out_ref), []
  sum_refs = iter(sum_refs)
  for ref, heads in zip((dq_ref, dk_ref, dv_ref), shared):
    outputs.append((ref, next(sum_refs) if heads > 1 else None, heads))

  sums = {}

  def some(chunks, d_state):  # see the forward kernel for this order
    inside = [_inside(layout, decays(c), *(tokens(ref, c) for ref in inputs)) for c in chunks]
    d_states = []
    for c, x in zip(chunks, inside):
      d_states.append(d_state)
      factor = 1.0 if layout.decay == "none" else decays(c).state
      d_state = factor * d_state + x.d_read
    for c, x, after in zip(chunks, inside, d_states):
      arrays = (tokens(ref, c) for ref in inputs)
      *gradients, dg = _across(layout, decays(c), x, states_ref[c], after, *arrays)
      for (ref, sum_ref, heads), d in zip(outputs, gradients):
        if sum_ref is not None:
          d = jnp.where(jax.lax.rem(r, heads) == 0, d, d + tokens(sum_ref, c))
          sum_ref[layout.rows(c), :] = d
        ref[layout.rows(c), :] = d.astype(ref.dtype)
      if layout.decay == "channel":
        dg_ref[layout.rows(c), :] = dg
      elif layout.decay == "scalar":
        sums[c] = dg
    return d_state

  d_state = layout.walk(BACKWARD_WIDTH[layout.decay], some, d_state_ref[r], reverse=True)
  d_state_ref[r] = d_state
  if layout.decay == "scalar":
    dg_ref[...] = jnp.concatenate(
      [sums[c][part] for part in range(_SUMS) for c in range(m)], axis=0
    )

  @pl.when(step == layout.steps - 1)
  def _():
    d_initial_ref[...] = d_state


def backward(layout: Layout, q, k, v, g, decays, state, states, d_out, d_final):
  """Gradients ``dq, dk, dv, dg, d_state``; see ``forward`` for the arguments."""
  b, t = q.shape[:2]
  n, h, width, m = layout.heads, layout.h, layout.width, layout.chunks
  inputs = (q, k, v)
  in_specs = [layout.sequence(x.shape[2], x.shape[3], reverse=True) for x in inputs]
  arrays = [to_kernel(x) for x in inputs]
  saved = pl.BlockSpec(
    (None, None, None, h, width),
    lambda i, group, step, r: (
      i,
      group * layout.group + r,
      jnp.maximum(layout.steps - 2 - step, 0),
      0,
      0,
    ),
  )
  in_specs += [
    layout.edge_state(layout.steps - 1),
    saved,
    layout.sequence(n, width, reverse=True),
    layout.edge_state(0),
  ]
  arrays += [state, states, to_kernel(d_out), d_final]

  shared = tuple(layout.shared(x.shape[2]) for x in inputs)
  out_specs, out_shapes, scratch = [], [], []
  for x, each in zip(inputs, shared):
    heads = n // each
    partial = heads != x.shape[2]
    out_specs.append(layout.sequence(heads, x.shape[3], reverse=True))
    dtype = jnp.float32 if partial else x.dtype
    out_shapes.append(jax.ShapeDtypeStruct(kernel_shape(b, t, heads, x.shape[3]), dtype))
    if each > 1:
      scratch.append(pltpu.VMEM((layout.tokens, x.shape[3]), jnp.float32))
  out_specs.append(layout.edge_state(layout.steps - 1))
  out_shapes.append(jax.ShapeDtypeStruct(state.shape, jnp.float32))
  if layout.decay == "scalar":
    in_specs.insert(0, layout.sums(reverse=True, heads=decays.shape[1], rows=layout.parts))
    arrays.insert(0, decays)
    out_specs.append(layout.sums(reverse=True, rows=_SUMS))
    shape = (b, n, layout.steps, _SUMS * m, layout.chunk)
    out_shapes.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  elif layout.decay == "channel":
    in_specs.insert(0, layout.sequence(decays.shape[2], h, reverse=True))
    arrays.insert(0, to_kernel(decays))
    out_specs.append(layout.sequence(n, h, reverse=True))
    out_shapes.append(jax.ShapeDtypeStruct(kernel_shape(b, t, n, h), jnp.float32))

  chunks = b * n * layout.steps * m
  products = layout.chunk**2 * (3 * h + 2 * width) + 5 * layout.chunk * h * width
  dq, dk, dv, d_state, *dg = _tpu.call(
    lambda *refs: _kernel(layout, shared, *refs),
    name="linear_attention_backward",
    out_shape=out_shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0,
      grid=layout.grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=[
        pltpu.VMEM((layout.group, h, width), jnp.float32),
        pltpu.VMEM((m, h, width), jnp.float32),
        *scratch,
      ],
    ),
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    flops=2 * chunks * products,
    transcendentals=chunks * layout.chunk * (h if layout.decay == "channel" else layout.chunk),
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *out_shapes)),
    interpret=layout.interpret,
    vmem_limit_bytes=layout.vmem_limit_bytes,
  )(*arrays)

  gradients = []
  for x, each, d in zip(inputs, shared, (dq, dk, dv)):
    d = from_kernel(d, n // each)
    gradients.append(sum_heads(d, x.shape[2], axis=2).astype(x.dtype))
  if layout.decay == "none":
    return *gradients, None, d_state
  if layout.decay == "channel":
    dg = from_kernel(dg[0], n)
  else:
    reads, leaving, through = jnp.split(dg[0], _SUMS, axis=3)  # [B,N,steps,m,C]
    dg = reverse_cumsum(reads) + exclusive_cumsum(leaving) + through
    dg = jnp.moveaxis(dg.reshape(b, n, t), 1, 2)
  return *gradients, sum_heads(dg, g.shape[2], axis=2), d_state
