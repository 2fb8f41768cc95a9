# SPDX-License-Identifier: Apache-2.0
"""Delta rule on TPUs: chunks in WY form on the matrix units, the state on the core, own gradients.

The forward kernel keeps the state before every step of a few chunks, and the inverses of all
triangular systems; the backward kernel walks the steps from the end, forms the states of a step's
chunks again, and carries the state's gradient.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import Unsupported, require_tpu
from pallas_kernels._tpu import chip
from pallas_kernels.delta_rule import TPUConfig
from pallas_kernels.delta_rule._tpu_backward import backward
from pallas_kernels.delta_rule._tpu_forward import forward
from pallas_kernels.delta_rule._tpu_layout import Layout

_MIB = 1024 * 1024
_SMALLEST_CHUNK = 16  # rows of a bfloat16 register


def delta_rule(q, k, v, beta, log_decay, state, *, scale, chunk_size=None, config=None):
  """See ``pallas_kernels.delta_rule.delta_rule``; log_decay ``[B,T,N]`` or ``[B,T,N,H]``."""
  interpret = require_tpu("delta_rule")
  if q.shape[1] == 1:
    raise Unsupported("delta_rule: one token is one pass over the state, not a chunk; use 'xla'.")
  if jnp.promote_types(state.dtype, q.dtype) == jnp.float64:
    raise Unsupported("delta_rule: TPUs have no float64; use 'xla' on a CPU.")
  dtype = jnp.result_type(q, k, v)
  sizes = (*beta.shape, q.shape[3], v.shape[3])
  counts = [x.shape[2] for x in (q, k, v)]
  plan = layout(
    sizes, counts, log_decay.ndim == 4, dtype, scale=scale, chunk_size=chunk_size, config=config
  )
  plan = dataclasses.replace(plan, interpret=interpret)
  more = plan.steps * plan.tokens - q.shape[1]
  tokens = [
    jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2)) if more else x
    for x in (q.astype(dtype), k.astype(dtype), v.astype(dtype), beta, log_decay)
  ]
  out, last = _delta(plan, *tokens, state)
  return out[:, : q.shape[1]].astype(q.dtype), last


def layout(sizes, counts, channel, dtype, *, scale=1.0, chunk_size=None, config=None) -> Layout:
  """The blocks of a call with these sizes (B, T, N, H, Hv) and head counts of q, k, v."""
  b, t, n, h, width = sizes
  config = config or TPUConfig()
  chunk = chunk_size or (64 if channel else 128)
  chunk = max(_SMALLEST_CHUNK, min(chunk, 1 << (t - 1).bit_length()))
  chunks = -(-t // chunk)
  steps = -(-chunks // (config.group or 2))
  group = -(-chunks // steps)  # so that at most steps - 1 chunks are padding
  return Layout(
    batch=b,
    heads=n,
    each=_heads(n, counts, config.heads or 2),
    chunk=chunk,
    group=group,
    steps=steps,
    h=h,
    width=width,
    channel=channel,
    dtype=jnp.dtype(dtype),
    scale=scale,
    vmem_limit_bytes=min(chip().vmem_bytes * 3 // 4, 96 * _MIB),
  )


def _heads(n: int, counts: list[int], wanted: int) -> int:
  """Heads a step: those that share an array's head are all in one step, or all of a step are."""

  def fits(each):
    return n % each == 0 and all(each % (n // c) == 0 or (n // c) % each == 0 for c in counts)

  return max(each for each in range(1, max(wanted, 1) + 1) if fits(each))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta(layout, q, k, v, beta, g, state):
  return forward(layout, q, k, v, beta, g, state, save=False)


def _delta_forward(layout, q, k, v, beta, g, state):
  out, last, *saved = forward(layout, q, k, v, beta, g, state, save=True)
  return (out, last), (q, k, v, beta, g, *saved)


def _delta_backward(layout, saved, cotangents):
  return backward(layout, *saved, *cotangents)


_delta.defvjp(_delta_forward, _delta_backward)
