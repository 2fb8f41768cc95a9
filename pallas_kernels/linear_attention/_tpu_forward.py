# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of linear attention on TPUs: one pass, with the state on the core."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu
from pallas_kernels._chunks import grid
from pallas_kernels._tpu import from_kernel, kernel_shape, to_kernel
from pallas_kernels.linear_attention._tpu_layout import (
  Layout,
  Scalar,
  chunk_decays,
)

FORWARD_WIDTH = {"none": 4, "scalar": 4, "channel": 1}  # chunks the compiler overlaps


def scores(layout: Layout, decay, q, k):
  """A ``[C,C]``, with the scale: ``scale * q_i k_j exp(G_i - G_j)`` for i >= j, else 0."""
  if decay is None:
    i, j = grid(layout.chunk, layout.chunk)
    return jnp.where(i >= j, layout.dot(q, k, "nt") * layout.scale, 0)
  if isinstance(decay, Scalar):
    return layout.dot(q, k, "nt") * decay.between
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  return layout.scale * decay.scores(q, k, layout.dot, diagonal=True)


def entering(layout: Layout, decay, q):
  """``scale * exp(G) * q``: what reads the state before the chunk."""
  if decay is None:
    return q.astype(jnp.float32) * layout.scale
  enter = decay.enter if isinstance(decay, Scalar) else decay.enter * layout.scale
  return q * enter


def next_state(layout: Layout, decay, state, k, v):
  """``exp(G_C) * S + (exp(G_C - G) * K)^T V``."""
  if decay is None:
    return state + layout.dot(k, v, "tn")
  if isinstance(decay, Scalar):  # a row spreads over rows of registers for free, a column doesn't
    return decay.state * state + layout.dot(k.T * decay.leave_row, v)
  return decay.state * state + layout.dot(k * decay.leave, v, "tn")


def _kernel(layout: Layout, save: bool, *refs):
  decay_ref, q_ref, k_ref, v_ref, initial_ref, out_ref, states_ref, state_ref = refs
  step, r = pl.program_id(2), pl.program_id(3)

  @pl.when(step == 0)
  def _():
    state_ref[r] = initial_ref[...]

  decays = chunk_decays(layout, decay_ref)

  def tokens(ref, c):
    return ref[layout.rows(c), :]

  # The compiler overlaps best what is next to each other in program order: so what needs no state
  # comes first for a few chunks, then their states, then what reads the states.
  def some(chunks, state):
    inside = [
      scores(layout, decays(c), tokens(q_ref, c), tokens(k_ref, c)).astype(layout.dtype)
      for c in chunks
    ]
    states = []
    for c in chunks:
      states.append(state.astype(layout.dtype))
      state = next_state(layout, decays(c), state, tokens(k_ref, c), tokens(v_ref, c))
    for c, a, before in zip(chunks, inside, states):
      reading = entering(layout, decays(c), tokens(q_ref, c)).astype(layout.dtype)
      out = layout.dot(a, tokens(v_ref, c)) + layout.dot(reading, before)
      out_ref[layout.rows(c), :] = out.astype(out_ref.dtype)
    return state

  state = layout.walk(FORWARD_WIDTH[layout.decay], some, state_ref[r])
  state_ref[r] = state
  if save:
    states_ref[...] = state
  else:

    @pl.when(step == layout.steps - 1)
    def _():
      states_ref[...] = state


def forward(layout: Layout, q, k, v, decays, state, *, save: bool):
  """Outputs and states.

  Args:
    q, k, v: ``[B,T,heads,H|Hv]``, T a multiple of a step. state: ``[B,N,H,Hv]``.
    decays: None, ``decay_rows`` or ``g [B,T,heads,H]``.
    save: whether to keep the state after every step.

  Returns:
    ``out [B,T,N,Hv]``, and states ``[B,N,steps,H,Hv]``, or the last ``[B,N,H,Hv]``.
  """
  b, t = q.shape[:2]
  n, h, width = layout.heads, layout.h, layout.width
  specs = [layout.sequence(x.shape[2], x.shape[3]) for x in (q, k, v)]
  arrays = [to_kernel(x) for x in (q, k, v)]
  if layout.decay == "scalar":
    decay_spec, decays = layout.sums(heads=decays.shape[1], rows=layout.parts), decays
  elif layout.decay == "channel":
    decay_spec, decays = layout.sequence(decays.shape[2], h), to_kernel(decays)
  else:
    decay_spec = None
  if save:
    states_shape = (b, n, layout.steps, h, width)
    states_spec = pl.BlockSpec(
      (None, None, None, h, width),
      lambda i, group, step, r: (i, group * layout.group + r, step, 0, 0),
    )
  else:
    states_shape, states_spec = (b, n, h, width), layout.edge_state(layout.steps - 1)
  decay_specs = [] if decay_spec is None else [decay_spec]
  decay_arrays = [] if decay_spec is None else [decays]

  def kernel(*refs):
    _kernel(layout, save, *(() if decay_spec is not None else (None,)), *refs)

  chunks = b * n * layout.steps * layout.chunks
  products = layout.chunk**2 * (h + width) + 2 * layout.chunk * h * width
  out, states = _tpu.call(
    kernel,
    name="linear_attention_forward",
    out_shape=(
      jax.ShapeDtypeStruct(kernel_shape(b, t, n, width), q.dtype),
      jax.ShapeDtypeStruct(states_shape, jnp.float32),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0,
      grid=layout.grid,
      in_specs=[*decay_specs, *specs, layout.edge_state(0)],
      out_specs=[layout.sequence(n, width), states_spec],
      scratch_shapes=[pltpu.VMEM((layout.group, h, width), jnp.float32)],
    ),
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    flops=2 * chunks * products,
    transcendentals=chunks * layout.chunk * (h if layout.decay == "channel" else layout.chunk),
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *decay_arrays, state))
    + b * t * n * width * q.dtype.itemsize
    + 4 * math.prod(states_shape),
    interpret=layout.interpret,
    vmem_limit_bytes=layout.vmem_limit_bytes,
  )(*decay_arrays, *arrays, state)
  return from_kernel(out, n), states
