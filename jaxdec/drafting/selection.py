# SPDX-License-Identifier: Apache-2.0
"""Argmax and top-k over a vocabulary: what ``jax.lax`` gives, several times faster on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

GROUP = 64


def argmax(x: Num[Array, "... V"]) -> Int[Array, "..."]:
  """Index of the maximum, the lowest where several are equal; of a row of NaN the last index.

  Two plain reductions vectorise on every backend; XLA:CPU runs the (value, index) one of
  ``jnp.argmax`` element by element, ten times slower.
  """
  top = jnp.max(x, axis=-1, keepdims=True)
  index = jnp.arange(x.shape[-1], dtype=jnp.int32)
  index = index.reshape((1,) * (x.ndim - 1) + (-1,))
  return jnp.min(jnp.where(x == top, index, x.shape[-1] - 1), axis=-1)


def top_k(x: Float[Array, "*B V"], k: int) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
  """``jax.lax.top_k`` in two stages; same values, order and ties (lowest index first).

  The k largest entries lie in the k groups of largest maximum; keeping those groups in index order
  keeps the ties. The maxima are one vectorised pass, so only ``V/64 + 64k`` entries are searched.
  """
  size = x.shape[-1]
  groups = -(-size // GROUP)
  if k * GROUP * 2 > size:
    return jax.lax.top_k(x, k)
  y = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * GROUP - size)], constant_values=-jnp.inf)
  y = y.reshape(*x.shape[:-1], groups, GROUP)
  _, best = jax.lax.top_k(jnp.max(y, axis=-1), k)
  best = jnp.sort(best, axis=-1)
  members = jnp.take_along_axis(y, best[..., None], axis=-2)
  values, at = jax.lax.top_k(members.reshape(*x.shape[:-1], k * GROUP), k)
  return values, jnp.take_along_axis(best, at // GROUP, axis=-1) * GROUP + at % GROUP
