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

from pallas_kernels._dispatch import Unsupported, require_tpu
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


def chunks_of(
  t: int, h: int, width: int, decay: str, dtype, chunk_size: int | None = None,
  config: TPUConfig | None = None,
) -> tuple[int, int, int]:  # fmt: skip
  """Tokens a chunk, chunks a step, and steps, for T tokens.

  A chunk is 128 tokens, the width of registers, and a step 8 chunks, or as many as fit on the core;
  64 tokens where one chunk of 128 doesn't.
  """

  def bounded(c: int) -> int:
    return min(max(c, _SMALLEST_CHUNK), max(power_of_two(t), _SMALLEST_CHUNK))

  choices = [bounded(c) for c in ((chunk_size,) if chunk_size else (LANES, LANES // 2))]
  if config is not None:
    chunk, most = choices[0], config.chunks_per_step
  else:
    room = _limit() * 4 // 5  # for the estimate is one
    sizes = [(c, m) for c in choices for m in (8, 4, 2, 1)]
    fits = [x for x in sizes if _vmem(*x, h, width, decay, dtype) <= room]
    if not fits:
      raise Unsupported(
        f"linear_attention: chunks of {choices[-1]} with H={h} and Hv={width} don't fit in the "
        f"{_limit() // _MIB} MiB of a {chip().name} core; use a smaller chunk_size or "
        "implementation='xla'."
      )
    chunk, most = fits[0]
  chunks = -(-t // chunk)
  steps = -(-chunks // most)
  return chunk, -(-chunks // steps), steps  # at most steps - 1 chunks of padding


def _limit() -> int:
  return min(chip().vmem_bytes * 7 // 8, 96 * _MIB)


def _vmem(chunk: int, chunks: int, h: int, width: int, decay: str, dtype) -> int:
  """About what the backward kernel needs: blocks (in two copies), states, and values of a chunk."""
  h, width = (-(-x // LANES) * LANES for x in (h, width))
  tokens = chunk * chunks
  blocks = 2 * tokens * jnp.dtype(dtype).itemsize * (4 * h + 3 * width)
  if decay == "channel":
    blocks += 2 * tokens * 4 * 2 * h
  states = 4 * h * width * (2 * 4 + 1 + chunks)
  values = 4 * chunk * (h + width) * (12 if decay == "channel" else 6)
  return blocks + states + values


def _layout(q, k, v, g, state, scale, chunk_size, config, interpret) -> Layout:
  b, t, _, h = q.shape
  heads, width = state.shape[1], v.shape[3]
  decay = "none" if g is None else "scalar" if g.ndim == 3 else "channel"
  dtype = jnp.dtype(jnp.result_type(q, k, v))
  chunk, per_step, steps = chunks_of(t, h, width, decay, dtype, chunk_size, config)
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
    decay=decay,
    dtype=dtype,
    scale=scale,
    interpret=interpret,
    vmem_limit_bytes=_limit(),
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
