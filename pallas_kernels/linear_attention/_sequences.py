# SPDX-License-Identifier: Apache-2.0
"""Arithmetic over whole arrays of chunks ``g [..., C]``, for plain XLA.

``between``, ``prefix`` and ``suffix`` are sums of log-decays that keep small ones beside large ones
(see ``_numerics``); ``crossing`` is the transpose of ``between``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._numerics import MASKED, coarse_fine


def power_of_two(n: int) -> int:
  """The smallest power of two that is at least ``n``."""
  return 1 << max(n - 1, 0).bit_length()


def pad_to(x: jax.Array, length: int, axis: int = 1) -> jax.Array:
  """Zeros after the end of an axis. Tokens with k = v = g = beta = 0 leave a state unchanged."""
  if x.shape[axis] == length:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths)


def repeat_heads(x: jax.Array, heads: int, axis: int = 1) -> jax.Array:
  """Head n of ``heads`` is head ``n // (heads / K)`` of the K there are."""
  return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)


def sum_heads(x: jax.Array, heads: int, axis: int = 1) -> jax.Array:
  """The transpose of ``repeat_heads``."""
  if x.shape[axis] == heads:
    return x
  shape = (*x.shape[:axis], heads, x.shape[axis] // heads, *x.shape[axis + 1 :])
  return x.reshape(shape).sum(axis + 1)


def prefix(g: jax.Array, axis: int = -1) -> jax.Array:
  """Inclusive sums: over ``l <= i``."""
  return sum(jnp.cumsum(x, axis=axis) for x in coarse_fine(g))


def suffix(g: jax.Array, axis: int = -1) -> jax.Array:
  """Exclusive sums from the end: over ``l > i``. Summed by itself, not as total minus prefix."""
  axis %= g.ndim
  later = pad_to(jax.lax.slice_in_dim(g, 1, None, axis=axis), g.shape[axis], axis)
  return sum(jax.lax.cumsum(x, axis=axis, reverse=True) for x in coarse_fine(later))


def reverse_cumsum(x: jax.Array, axis: int = -1) -> jax.Array:
  """Inclusive sums from the end: over ``l >= i``; the transpose of ``prefix``."""
  return jax.lax.cumsum(x, axis=axis % x.ndim, reverse=True)


def exclusive_cumsum(x: jax.Array, axis: int = -1) -> jax.Array:
  """Sums over ``l < i``; the transpose of ``suffix``."""
  axis %= x.ndim
  widths = [(0, 0)] * x.ndim
  widths[axis] = (1, 0)
  shifted = jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)
  return jax.lax.cumsum(jnp.pad(shifted, widths), axis=axis)


def between(g: jax.Array) -> jax.Array:
  """``[..., C] -> [..., C, C]``: ``g`` summed over ``j < l <= i`` for ``i >= j``, else MASKED."""
  parts = [jnp.cumsum(x, axis=-1) for x in coarse_fine(g)]
  difference = sum(x[..., :, None] - x[..., None, :] for x in parts)
  lower = jnp.tril(jnp.ones(difference.shape[-2:], bool))
  return jnp.where(lower, difference, MASKED)


def crossing(x: jax.Array) -> jax.Array:
  """``[..., C, C] -> [..., C]``: ``sum of x_ij over j < t <= i``, the gradient of ``g_t``.

  A product with a triangle of ones and a masked sum. Row sums minus column sums would be cheaper
  and bury the gradients of strongly decayed tokens under the rounding of their neighbours'.
  """
  c = x.shape[-1]
  upper = jnp.triu(jnp.ones((c, c), x.dtype))
  highest = jax.lax.Precision.HIGHEST
  later = jnp.einsum("ti,...ij->...tj", upper, x, precision=highest)  # sum over i >= t
  return jnp.sum(jnp.tril(later, -1), axis=-1)
