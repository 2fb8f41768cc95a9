# SPDX-License-Identifier: Apache-2.0
"""Arithmetic shared by the recurrent ops: log-decays that neither overflow nor lose digits.

A float32 cumulative sum of log-decays loses the small ones beside a large one (one -20 among -0.01
costs two digits of the output). So they are clamped at ``RESET`` (``exp(-100)`` is 0 in float32)
and split into a multiple of 1/256, whose partial sums are exact while below 2**16 in magnitude, and
a small remainder; sums are formed of the two parts separately and differences before adding. A
segment boundary is then a token whose log-decay is ``RESET``: no masks in the kernels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

RESET = -100.0  # log-decay that forgets everything; also the floor of log-decays
MASKED = -1e30  # exponent of a masked pair: finite, since inf - inf in a gradient is NaN


def accumulator(x: jax.Array) -> jnp.dtype:
  """float32, or float64 for float64 inputs."""
  return jnp.promote_types(x.dtype, jnp.float32)


def coarse_fine(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  """``g`` as a multiple of 1/256, sums of which are exact, plus a remainder."""
  coarse = jax.lax.stop_gradient(jnp.round(g * 256.0) * (1.0 / 256.0))
  return coarse, g - coarse


def segment_starts(segment_ids: jax.Array) -> jax.Array:
  """bool ``[B,T]``: the id differs from the previous token's; never at the first token."""
  change = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(change, ((0, 0), (1, 0)))


def log_decays(
  log_decay: jax.Array | None, segment_ids: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:
  """Log-decays as every recurrent op computes with them.

  Args:
    log_decay: broadcasts to ``shape`` in its first two axes; None: no decay.
    segment_ids: int32 ``[B,T]`` or None; where the id changes, ``RESET`` replaces the log-decay.
    shape: ``[B,T,N]`` or ``[B,T,N,H]``.

  Returns:
    At least float32, of that shape, in ``[RESET, 0]`` for log-decays that are not positive.
  """
  if log_decay is None:
    log_decay = jnp.zeros(shape, jnp.float32)
  log_decay = log_decay.astype(accumulator(log_decay))
  # strictly below: the gradient of a maximum would be halved at the bound itself
  log_decay = jnp.where(log_decay < RESET, RESET, log_decay)
  log_decay = jnp.broadcast_to(log_decay, shape)
  if segment_ids is not None:
    starts = segment_starts(segment_ids)
    log_decay = jnp.where(starts.reshape(starts.shape + (1,) * (len(shape) - 2)), RESET, log_decay)
  return log_decay
