# SPDX-License-Identifier: Apache-2.0
"""Linear attention on TPUs: chunks on the matrix units, the state on the core, own gradients.

The forward kernel keeps the state after every step of several chunks; the backward kernel walks the
steps from the end, forms the states of a step's chunks again, and carries the state's gradient.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import require_tpu
from pallas_kernels._tpu import LANES, chip
from pallas_kernels.linear_attention import xla
from pallas_kernels.linear_attention._configs import TPUConfig
from pallas_kernels.linear_attention._sequences import pad_to, power_of_two
from pallas_kernels.linear_attention._tpu_backward import backward
from pallas_kernels.linear_attention._tpu_forward import forward
from pallas_kernels.linear_attention._tpu_layout import Layout, decay_rows

_MIB = 1024 * 1024
_SMALLEST_CHUNK = 16  # rows of a bfloat16 register


def linear_attention(q, k, v, g, state, *, scale, chunk_size=None, config=None):
  """See ``reference`` for the arguments and the package for the formula."""
  interpret = require_tpu("linear_attention")
  t = q.shape[1]
  if t == 1:  # decoding is one pass over the state, which XLA fuses: there is no chunk to form
    return xla.linear_attention(q, k, v, g, state, scale=scale)
  dtype = jnp.result_type(q, k, v)
  if scale <= 0:  # the kernels add its logarithm to exponents
    q, scale = q * scale, 1.0
  layout = _layout(q, k, v, g, state, scale, chunk_size, config, interpret)
  length = layout.steps * layout.tokens
  padded = [pad_to(x.astype(dtype), length) for x in (q, k, v)]
  g = None if g is None else pad_to(g, length)
  out, final = _attention(layout, *padded, g, state)
  return out[:, :t].astype(q.dtype), final


def chunks_of(t: int, chunk_size: int | None, config: TPUConfig | None) -> tuple[int, int, int]:
  """Tokens a chunk (128, the width of registers), chunks a step, and steps, for T tokens."""
  chunk = min(max(chunk_size or LANES, _SMALLEST_CHUNK), max(power_of_two(t), _SMALLEST_CHUNK))
  chunks = -(-t // chunk)
  steps = -(-chunks // (config or TPUConfig()).chunks_per_step)
  return chunk, -(-chunks // steps), steps  # at most steps - 1 chunks of padding


def _layout(q, k, v, g, state, scale, chunk_size, config, interpret) -> Layout:
  b, t, _, h = q.shape
  heads, width = state.shape[1], v.shape[3]
  chunk, per_step, steps = chunks_of(t, chunk_size, config)
  on = chip()
  counts = [x.shape[2] for x in (q, k, v)]
  together = heads // functools.reduce(math.gcd, counts)
  lanes = -(-width // LANES) * LANES
  room = min(on.vmem_bytes // 4, 8 * _MIB) // (4 * h * lanes)
  group = max(d for d in range(1, together + 1) if together % d == 0 and d <= max(room, 1))
  return Layout(
    batch=b,
    heads=heads,
    group=group,
    chunk=chunk,
    chunks=per_step,
    steps=steps,
    h=h,
    width=width,
    decay="none" if g is None else "scalar" if g.ndim == 3 else "channel",
    dtype=jnp.dtype(jnp.result_type(q, k, v)),
    scale=scale,
    interpret=interpret,
    vmem_limit_bytes=min(on.vmem_bytes * 3 // 4, 96 * _MIB),
  )


def _decays(layout: Layout, g):
  return decay_rows(layout, g) if layout.decay == "scalar" else g


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(layout: Layout, q, k, v, g, state):
  return forward(layout, q, k, v, _decays(layout, g), state, save=False)


def _attention_forward(layout: Layout, q, k, v, g, state):
  out, states = forward(layout, q, k, v, _decays(layout, g), state, save=True)
  return (out, states[:, :, -1]), (q, k, v, g, state, states)


def _attention_backward(layout: Layout, saved, cotangents):
  q, k, v, g, state, states = saved
  d_out, d_final = cotangents
  return backward(layout, q, k, v, g, _decays(layout, g), state, states, d_out, d_final)


_attention.defvjp(_attention_forward, _attention_backward)
