# SPDX-License-Identifier: Apache-2.0
"""The backward kernel of the delta rule on TPUs: the steps of a sequence from the last one."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu
from pallas_kernels._chunks import sum_before, sum_from
from pallas_kernels._tpu import from_kernel, kernel_shape, to_kernel
from pallas_kernels.delta_rule import _chunk
from pallas_kernels.delta_rule._tpu_forward import prepare
from pallas_kernels.delta_rule._tpu_layout import (
  ROWS,
  Layout,
  token_rows,
)


def _kernel(layout: Layout, counts, *refs):
  rows_ref, q_ref, k_ref, v_ref, *refs = refs
  g_ref = refs.pop(0) if layout.channel else None
  saved_ref, inverse_ref, d_out_ref, d_last_ref, dq_ref, dk_ref, dv_ref, d_rows_ref, *refs = refs
  dg_ref = refs.pop(0) if layout.channel else None
  (d_state_ref,) = refs

  @pl.when(pl.program_id(2) == 0)
  def _():
    d_state_ref[...] = d_last_ref[...]

  heads, chunks = range(layout.each), range(layout.group)
  tiles = (q_ref, k_ref, v_ref)
  inputs, parts = prepare(layout, counts, tiles, rows_ref, g_ref, inverse_ref)

  walked = [None] * layout.group  # (states before, writes) of every chunk, per head
  states = [saved_ref[head] for head in heads]
  for chunk in chunks:
    before = states
    steps = [_chunk.advance(parts[head][chunk], before[head], layout.dot) for head in heads]
    writes, states = zip(*steps)
    walked[chunk] = before, writes

  d_states = [d_state_ref[head] for head in heads]
  d_walked = [None] * layout.group  # (d_out, d_right, d_state after) of every chunk, per head
  for chunk in reversed(chunks):
    after = d_states
    places = [layout.place(layout.heads, layout.width, head, chunk) for head in heads]
    d_outs = [layout.scale * d_out_ref[place].astype(jnp.float32) for place in places]
    steps = [
      _chunk.retreat(parts[head][chunk], d_outs[head], after[head], layout.dot) for head in heads
    ]
    d_rights, d_states = zip(*steps)
    d_walked[chunk] = d_outs, d_rights, after

  outputs = ((dq_ref, layout.h), (dk_ref, layout.h), (dv_ref, layout.width))
  columns = [[None] * layout.group for _ in heads]
  for chunk in chunks:
    totals = {}  # gradients of what heads share
    for head in heads:
      states = (x[head] for x in walked[chunk] + d_walked[chunk])
      grads = _chunk.gradients(inputs[head][chunk], *states, layout.dot)
      for array, x in enumerate(grads[:3]):
        shared = array, head * layout.local(counts[array]) // layout.each
        totals[shared] = x + totals[shared] if shared in totals else x
      columns[head][chunk] = (grads.beta, grads.later, grads.earlier)
      if layout.channel:
        columns[head][chunk] = (grads.beta,)
        index = layout.place(layout.heads, layout.h, head, chunk)
        dg_ref[index] = sum_from(grads.later) + sum_before(grads.earlier)
    for (array, head), x in totals.items():
      ref, width = outputs[array]
      ref[layout.slot(width, head, chunk)] = x.astype(ref.dtype)

  for head in heads:  # one transpose for all columns of a head
    kinds = zip(*columns[head])
    d_rows_ref[head] = jnp.concatenate([x for kind in kinds for x in kind], axis=1).T
    d_state_ref[head] = d_states[head]


def backward(layout: Layout, q, k, v, beta, g, saved, inverses, d_out, d_last):
  """Gradients of q, k, v, beta, the log-decays and the initial state."""
  b, t, n = q.shape[0], q.shape[1], layout.heads
  inputs = (q, k, v)
  counts = tuple(x.shape[2] for x in inputs)
  count = 1 if layout.channel else ROWS
  arrays = [token_rows(layout, beta, g), *(to_kernel(x) for x in inputs)]
  specs = [layout.rows(count, reverse=True)]
  specs += [layout.spec(x.shape[2], x.shape[3], reverse=True) for x in inputs]
  if layout.channel:
    arrays.append(to_kernel(g))
    specs.append(layout.spec(n, layout.h, reverse=True))
  arrays += [saved, inverses, to_kernel(d_out), d_last]
  specs += [
    layout.saved(reverse=True),
    layout.inverses(reverse=True),
    layout.spec(n, layout.width, reverse=True),
    layout.state(),
  ]

  shapes, out_specs, partial = [], [], []
  for x in inputs:  # a head that several steps share is written once by each, and summed after
    heads = n // layout.each * layout.local(x.shape[2])
    partial.append(heads)
    dtype = x.dtype if heads == x.shape[2] else jnp.float32
    shapes.append(jax.ShapeDtypeStruct(kernel_shape(b, t, heads, x.shape[3]), dtype))
    out_specs.append(layout.spec(heads, x.shape[3], reverse=True))
  rows = (b, n, layout.steps, count * layout.group, layout.chunk)
  shapes.append(jax.ShapeDtypeStruct(rows, jnp.float32))
  out_specs.append(layout.rows(count, reverse=True))
  if layout.channel:
    shapes.append(jax.ShapeDtypeStruct(kernel_shape(b, t, n, layout.h), jnp.float32))
    out_specs.append(layout.spec(n, layout.h, reverse=True))
  shapes.append(jax.ShapeDtypeStruct(d_last.shape, jnp.float32))
  out_specs.append(layout.state())

  dq, dk, dv, d_rows, *dg, d_state = _tpu.call(
    functools.partial(_kernel, layout, counts),
    name="delta_rule_backward",
    out_shape=shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0, grid=layout.grid, in_specs=specs, out_specs=out_specs
    ),
    dimension_semantics=("parallel", "parallel", "arbitrary"),
    flops=2 * b * n * (t // layout.chunk) * backward_products(layout),
    transcendentals=b * n * t * (layout.h if layout.channel else layout.chunk),
    bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *shapes)),
    interpret=layout.interpret,
    vmem_limit_bytes=layout.vmem_limit_bytes,
  )(*arrays)

  grads = []
  for x, heads, d in zip(inputs, partial, (dq, dk, dv)):
    d = from_kernel(d, heads)
    if heads != x.shape[2]:
      d = d.reshape(b, t, x.shape[2], heads // x.shape[2], x.shape[3]).sum(3).astype(x.dtype)
    grads.append(d)

  def tokens(x):  # [B,N,steps,group,C] -> [B,T,N]
    return jnp.moveaxis(x.reshape(b, n, t), 1, 2)

  d_beta, *sums = jnp.split(d_rows, count, axis=3)
  if layout.channel:
    d_g = from_kernel(dg[0], n)
  else:
    later, earlier = sums
    from_here = jax.lax.cumsum(later, axis=4, reverse=True)
    before = jnp.cumsum(jnp.pad(earlier[..., :-1], ((0, 0),) * 4 + ((1, 0),)), axis=4)
    d_g = tokens(from_here + before)
  return *grads, tokens(d_beta).astype(beta.dtype), d_g, d_state


def backward_products(layout: Layout) -> int:
  """Multiply-adds of one head's chunk, as executed: prepared and walked again, then back."""
  c, h, width = layout.chunk, layout.h, layout.width
  levels = c.bit_length() - 1 if layout.channel else 1
  again = c * c * (h * levels + h + width) + 2 * c * h * width
  back = 2 * c * c * width + 3 * c * h * width
  rest = 2 * c * c * width + 3 * c * h * width + 4 * c * c * h * levels
  return again + back + rest
