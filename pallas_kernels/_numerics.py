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
