# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of the delta rule on TPUs: one pass, with the state on the core."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu
from pallas_kernels._tpu import from_kernel, kernel_shape, to_kernel
from pallas_kernels.delta_rule import _chunk, _inverse
from pallas_kernels.delta_rule._tpu_layout import (
  ROWS,
  Layout,
  token_rows,
)


def prepare(layout: Layout, counts, refs, rows_ref, g_ref, inverse_ref=None):
  """Tiles and state-independent parts of a step, each ``[head][chunk]``.

  With ``inverse_ref`` the inverses are read, not computed.
  """
  heads, chunks = range(layout.each), range(layout.group)
  widths = (layout.h, layout.h, layout.width)
  tiles = []
  for head in heads:
    rows = rows_ref[head]
    columns = rows.T
    for chunk in chunks:
      q, k, v = (
        ref[layout.place(count, width, head, chunk)]
        for ref, count, width in zip(refs, counts, widths)
      )
      beta = columns[:, chunk : chunk + 1]
      decay = layout.decays(rows, columns, g_ref, head, chunk)
      tiles.append(_chunk.Tiles(q, k, v, beta, decay))

  def saved(_):  # the systems aren't needed then, and the compiler drops them
    return [inverse_ref[index] for index in inverse_places(layout)]

  invert = functools.partial(_inverse.on_lanes, dot=layout.exact)
  parts = _chunk.prepare(tiles, layout.dot, invert if inverse_ref is None else saved)
  n = layout.group
  return tuple([x[head * n : (head + 1) * n] for head in heads] for x in (tiles, parts))


def inverse_places(layout: Layout):
  """Where the inverse of each (head, chunk) of a step is in its block."""
  for head in range(layout.each):
    for chunk in range(layout.group):
      yield head, slice(chunk * layout.chunk, (chunk + 1) * layout.chunk)


def _kernel(layout: Layout, counts, save: bool, *refs):
  rows_ref, q_ref, k_ref, v_ref, *refs = refs
  g_ref = refs.pop(0) if layout.channel else None
  initial_ref, out_ref, state_ref, *saved = refs

  @pl.when(pl.program_id(2) == 0)
  def _():
    state_ref[...] = initial_ref[...]

  tiles = (q_ref, k_ref, v_ref)
  _, parts = prepare(layout, counts, tiles, rows_ref, g_ref)
  if save:
    start_ref, inverse_ref = saved
    start_ref[...] = state_ref[...]
    for index, part in zip(inverse_places(layout), (x for head in parts for x in head)):
      inverse_ref[index] = part.inverse.astype(inverse_ref.dtype)
  states = [state_ref[head] for head in range(layout.each)]
  for chunk in range(layout.group):
    now = [part[chunk] for part in parts]
    before = states
    writes, states = zip(*[_chunk.advance(p, s, layout.dot) for p, s in zip(now, before)])
    for head in range(layout.each):
      out = layout.scale * _chunk.read(now[head], before[head], writes[head], layout.dot)
      place = layout.place(layout.heads, layout.width, head, chunk)
      out_ref[place] = out.astype(out_ref.dtype)
  for head in range(layout.each):
    state_ref[head] = states[head]


def forward(layout: Layout, q, k, v, beta, g, state, *, save: bool):
  """Outputs, the last state and, if ``save``, what the gradients need.

  That is the state before every step, and the inverses: reading them takes the memory and time of
  one more input, and computing them is a third of the work of the gradients.
  """
  b, t, n = q.shape[0], q.shape[1], layout.heads
  counts = (q.shape[2], k.shape[2], v.shape[2])
  arrays = [token_rows(layout, beta, g), *(to_kernel(x) for x in (q, k, v))]
  specs = [layout.rows(1 if layout.channel else ROWS)]
  specs += [layout.spec(x.shape[2], x.shape[3]) for x in (q, k, v)]
  if layout.channel:
    arrays.append(to_kernel(g))
    specs.append(layout.spec(n, layout.h))
  arrays.append(state)
  specs.append(layout.state())
  shapes = [
    jax.ShapeDtypeStruct(kernel_shape(b, t, n, layout.width), q.dtype),
    jax.ShapeDtypeStruct(state.shape, jnp.float32),
  ]
  out_specs = [layout.spec(n, layout.width), layout.state()]
  if save:
    starts = (b, n, layout.steps, layout.h, layout.width)
    shapes.append(jax.ShapeDtypeStruct(starts, jnp.float32))
    shapes.append(jax.ShapeDtypeStruct((b, n, t, layout.chunk), layout.dtype))
    out_specs += [layout.saved(), layout.inverses()]
  out, last, *saved = _tpu.call(
    functools.partial(_kernel, layout, counts, save),
    name="delta_rule_forward",
    out_shape=shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0, grid=layout.grid, in_specs=specs, out_specs=out_specs
    ),
    dimension_semantics=("parallel", "parallel", "arbitrary"),
    flops=2 * b * n * (t // layout.chunk) * forward_products(layout),
    transcendentals=b * n * t * (layout.h if layout.channel else layout.chunk),
    bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *shapes)),
    interpret=layout.interpret,
    vmem_limit_bytes=layout.vmem_limit_bytes,
  )(*arrays)
  return from_kernel(out, n), last, *saved


def forward_products(layout: Layout) -> int:
  """Multiply-adds of one head's chunk, as executed."""
  c, h, width = layout.chunk, layout.h, layout.width
  scores = 2 * c * c * h * (c.bit_length() - 1 if layout.channel else 1)
  solve = c * c * (h + width)
  walk = c * h * width * 3 + c * c * width
  return scores + _inverse.products(c, layout.exact) + solve + walk
