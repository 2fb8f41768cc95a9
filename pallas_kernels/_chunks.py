# SPDX-License-Identifier: Apache-2.0
"""Arithmetic inside a chunk of C tokens, shared by the recurrent ops.

Scalar decay: ``g [..., C]``; ``between``, ``prefix`` and ``suffix`` are sums of it that keep small
decays beside large ones (see ``_numerics``), ``crossing`` is the transpose of ``between``.

Channel decay: ``g [..., C, H]``. A matrix ``sum_h a_ih b_jh exp(g summed over j < l <= i)`` is no
single product, and ``exp(G_i) exp(-G_j)`` overflows. Binary splitting covers its strict lower
triangle by blocks: for m = C/2, .., 1 the rows of the right half of each 2m tokens against the
columns of the left half, through the border between them, so that both exponents are sums of
log-decays of one half: never positive, and no differences of large numbers anywhere.

    scores(a, b)_ij = sum_h a_ih b_jh exp(E_ijh)      i > j
    rows(x, b)_ih = sum_j x_ij b_jh exp(E_ijh)        columns(x, a)_jh = sum_i x_ij a_ih exp(E_ijh)
"""

from __future__ import annotations

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Level:
  """One level of binary splitting: halves of ``size`` tokens.

  ``factor [..., C, H]``: exp of the log-decay from the border between the halves to the token:
  up to and including it in the right half, after it in the left half.
  """

  size: int
  factor: jax.Array

  def halves(self) -> tuple[jax.Array, jax.Array]:
    """bool ``[C,1]``: token is in a right half; bool ``[C,C]``: tokens share a block."""
    index = jnp.arange(self.factor.shape[-2])
    block = index // (2 * self.size)
    return (index // self.size % 2 == 1)[:, None], block[:, None] == block[None, :]


@dataclasses.dataclass(frozen=True)
class Splitting:
  """Binary splitting of a chunk with channel decay ``g [..., C, H]``; C a power of two.

  Attributes:
    levels: from halves of one token up.
    prefix, suffix: ``[..., C, H]`` inclusive sums and exclusive sums from the end over the chunk.
    dtype: of the operands of the products; sums are accumulated in the dtype of ``g``.
  """

  levels: tuple[Level, ...]
  prefix: jax.Array
  suffix: jax.Array
  dtype: jnp.dtype
  precision: jax.lax.Precision

  @classmethod
  def of(cls, g: jax.Array, dtype, precision=jax.lax.Precision.HIGHEST) -> Splitting:
    *lead, c, h = g.shape
    before, after = g, jnp.zeros_like(g)  # sums inside aligned blocks of `size` tokens
    levels, size = [], 1
    while size < c:
      blocks = (*lead, c // (2 * size), 2, size, h)
      p, s = before.reshape(blocks), after.reshape(blocks)
      left, right = slice(0, 1), slice(1, 2)
      exponent = jnp.concatenate([s[..., left, :, :], p[..., right, :, :]], axis=-3)
      levels.append(Level(size, jnp.exp(exponent).reshape(g.shape)))
      total = p[..., -1:, :]
      p = jnp.concatenate([p[..., left, :, :], p[..., right, :, :] + total[..., left, :, :]], -3)
      s = jnp.concatenate([s[..., left, :, :] + total[..., right, :, :], s[..., right, :, :]], -3)
      before, after = p.reshape(g.shape), s.reshape(g.shape)
      size *= 2
    return cls(tuple(levels), before, after, jnp.dtype(dtype), precision)

  def _product(self, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
      subscripts,
      a.astype(self.dtype),
      b.astype(self.dtype),
      precision=self.precision,
      preferred_element_type=self.prefix.dtype,
    )

  def scores(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """``[..., C, C]``: pairs i > j of ``a_i . b_j`` with the decay between them, else 0."""
    total = 0.0
    for level in self.levels:
      right, same = level.halves()
      x = self._product(
        "...ih,...jh->...ij",
        jnp.where(right, a * level.factor, 0),
        jnp.where(right, 0, b * level.factor),
      )
      total = total + jnp.where(same, x, 0)
    if not self.levels:  # one token: no pairs
      return jnp.zeros((*self.prefix.shape[:-1], 1), self.prefix.dtype)
    return total

  def rows(self, x: jax.Array, b: jax.Array) -> jax.Array:
    """``[..., C, H]``: ``sum_j x_ij b_j`` with the decays, over pairs i > j."""
    total = jnp.zeros_like(self.prefix)
    for level in self.levels:
      right, same = level.halves()
      b_left = jnp.where(right, 0, b * level.factor)
      y = self._product("...ij,...jh->...ih", jnp.where(same, x, 0), b_left)
      total = total + jnp.where(right, level.factor * y, 0)
    return total

  def columns(self, x: jax.Array, a: jax.Array) -> jax.Array:
    """``[..., C, H]``: ``sum_i x_ij a_i`` with the decays, over pairs i > j."""
    total = jnp.zeros_like(self.prefix)
    for level in self.levels:
      right, same = level.halves()
      a_right = jnp.where(right, a * level.factor, 0)
      y = self._product("...ij,...ih->...jh", jnp.where(same, x, 0), a_right)
      total = total + jnp.where(right, 0, level.factor * y)
    return total
