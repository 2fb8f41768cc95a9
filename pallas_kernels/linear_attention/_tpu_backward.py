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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu
from pallas_kernels._chunks import ScalarDecay, grid, sum_before, sum_from
from pallas_kernels.linear_attention._sequences import (
  exclusive_cumsum,
  reverse_cumsum,
  sum_heads,
)
from pallas_kernels.linear_attention._tpu_forward import entering, next_state, scores
from pallas_kernels.linear_attention._tpu_layout import (
  Layout,
  chunk_decays,
  from_kernel,
  kernel_shape,
  to_kernel,
)

_SUMS = 3  # numbers a token for the gradient of a scalar log-decay


def _column_sums(x):
  return jnp.sum(x, axis=1, keepdims=True)


def _chunk(layout: Layout, decay, state, d_state, q, k, v, d_out):
  """Gradients of one chunk: ``dq, dk, dv``, of the state before it, and parts of ``dg``."""
  dot, c = layout.dot, layout.chunk
  i, j = grid(c, c)
  d_scores = jnp.where(i >= j, dot(d_out, v, "nt"), 0)
  a = scores(layout, decay, q, k)
  dq_state, dk_state = dot(d_out, state, "nt"), dot(v, d_state, "nt")
  dv = dot(a, d_out, "tn")
  d_read = dot(entering(layout, decay, q), d_out, "tn")
  if decay is None:
    d_scores = d_scores * layout.scale
    dq = dot(d_scores, k) + dq_state * layout.scale
    dk = dot(d_scores, q, "tn") + dk_state
    return dq, dk, dv + dot(k, d_state), d_state + d_read, None

  dk_state = dk_state * decay.leave
  dv = dv + dot(k * decay.leave, d_state)
  d_before = decay.state * d_state + d_read
  if isinstance(decay, ScalarDecay):
    dq_state = dq_state * decay.enter
    d_products = d_scores * decay.between
    x = jnp.where(i > j, d_scores * a, 0)
    reads = _column_sums(x) + _column_sums(q * dq_state)
    through = jnp.sum(state * d_state, keepdims=True) * decay.total
    sums = (reads, jnp.sum(x, axis=0, keepdims=True), _column_sums(k * dk_state), through)
    dq, dk = dot(d_products, k) + dq_state, dot(d_products, q, "tn") + dk_state
    return dq, dk, dv, d_before, sums

  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  dq_state = dq_state * (decay.enter * layout.scale)
  d_scores = d_scores * layout.scale
  strict = jnp.where(i > j, d_scores, 0)
  diagonal = _column_sums(jnp.where(i == j, d_scores, 0))
  dq, dk = decay.read(strict, k, dot), decay.write(strict, q, dot)
  through = jnp.broadcast_to(_column_sums(state * d_state), state.shape).T[:1] * decay.total
  dg = sum_from(q * (dq + dq_state) - k * dk) + sum_before(k * dk_state) + through
  return dq + diagonal * k + dq_state, dk + diagonal * q + dk_state, dv, d_before, dg


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

  here = [pl.ds(c * layout.chunk, layout.chunk) for c in range(m)]
  decays = chunk_decays(layout, decay_ref)
  state = jnp.where(step == layout.steps - 1, initial_ref[...], saved_ref[...])
  for c in range(m):
    states_ref[c] = state
    if c < m - 1:
      state = next_state(layout, decays[c], state, k_ref[here[c], :], v_ref[here[c], :])

  # Heads that share an array add up, in float32, in `sum_refs`; the last of them writes the sum.
  outputs = []
  sum_refs = iter(sum_refs)
  for ref, heads in zip((dq_ref, dk_ref, dv_ref), shared):
    outputs.append((ref, next(sum_refs) if heads > 1 else None, heads))

  d_state = d_state_ref[r]
  sums = [None] * m
  for c in reversed(range(m)):
    inputs = (ref[here[c], :] for ref in (q_ref, k_ref, v_ref, d_out_ref))
    *gradients, d_state, sums[c] = _chunk(layout, decays[c], states_ref[c], d_state, *inputs)
    for (ref, sum_ref, heads), x in zip(outputs, gradients):
      if sum_ref is not None:
        first = jax.lax.rem(r, heads) == 0
        x = jnp.where(first, x, x + sum_ref[here[c], :])
        sum_ref[here[c], :] = x
      ref[here[c], :] = x.astype(ref.dtype)
    if layout.decay == "channel":
      dg_ref[here[c], :] = sums[c]
  d_state_ref[r] = d_state
  if layout.decay == "scalar":
    # One transpose for all columns of a step: reads - writes, and what leaves the chunk.
    columns = jnp.concatenate([x[0] for x in sums] + [x[2] for x in sums], axis=1).T  # [2m,C]
    writes = jnp.concatenate([x[1] for x in sums], axis=0)
    through = jnp.concatenate([jnp.broadcast_to(x[3], writes[:1].shape) for x in sums], axis=0)
    dg_ref[...] = jnp.concatenate([columns[:m] - writes, columns[m:], through], axis=0)

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
    in_specs.insert(0, layout.sums(reverse=True, heads=decays.shape[1]))
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
