# SPDX-License-Identifier: Apache-2.0
"""Inverse of ``I + A``, A strictly lower triangular, by block doubling: matrix products alone.

With the inverses of the diagonal blocks of b rows, those of 2b rows follow by

  [[L, 0], [M, R]]^-1 = [[L^-1, 0], [-R^-1 M L^-1, R^-1]].

As accurate as forward substitution. The Neumann product ``(I - A)(I + A^2)(I + A^4)..`` costs the
same and is useless: its powers cancel as soon as keys resemble one another.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Products, grid, halves


def small(a: jax.Array, dot: Products) -> jax.Array:
  """Of one small tile ``[C,C]``: doubling with masks, on whole products."""
  i, j = grid(*a.shape)
  inverse = (i == j).astype(a.dtype)
  level = 0
  while (1 << level) < a.shape[0]:
    here = (i >> (level + 1) == j >> (level + 1)) & (i >> level > j >> level)
    inverse = inverse - dot(inverse, dot(jnp.where(here, a, 0), inverse))
    level += 1
  return inverse


def doubling(a: jax.Array, dot: Products, first: int = 16) -> jax.Array:
  """Of ``[C,C]``: blocks of ``first`` rows by ``small``, then only the products that are not zero.

  About C^3 / 3 multiply-adds; ``small`` has 2 C^3 log2 C.
  """
  rows = a.shape[0]
  b = min(first, rows)

  def blocks(size):  # [rows/size, size, size], those on the diagonal
    n = rows // size
    return jnp.moveaxis(jnp.diagonal(a.reshape(n, size, n, size), axis1=0, axis2=2), -1, 0)

  def dots(x, y):
    return jax.vmap(lambda x, y: dot(x, y))(x, y)

  inverse = jax.vmap(lambda block: small(block, dot))(blocks(b))
  while b < rows:
    left, right = inverse[0::2], inverse[1::2]
    below = -dots(right, dots(blocks(2 * b)[:, b:, :b], left))
    upper = jnp.concatenate([left, jnp.zeros_like(left)], axis=2)
    inverse = jnp.concatenate([upper, jnp.concatenate([below, right], axis=2)], axis=1)
    b *= 2
  return inverse[0]


def on_lanes(systems: list[jax.Array], dot: Products, first: int = 16) -> list[jax.Array]:
  """Of several ``[C,C]`` for TPUs: substitution in blocks of ``first`` rows, then doubling.

  Blocks on the diagonal share no column, so all of them fit side by side in ``[first, C]``, and a
  step of the substitution is one for all: column j of every block, spread over the block's lanes,
  times row j. The products then take only the rows that change. Several systems advance in step:
  each operation waits for the one before it, and the others fill the wait.
  """
  rows = systems[0].shape[0]
  b = min(first, rows)
  i, j = grid(rows, rows)
  own = (i ^ j) < b  # in one block of b, a power of two
  packed = [jnp.sum(jnp.where(own, a, 0).reshape(rows // b, b, rows), axis=0) for a in systems]
  i, j = grid(b, rows)
  inverses = [(i == j & (b - 1)).astype(a.dtype) for a in systems]
  for column in range(b - 1):
    spread = [jnp.take_along_axis(p, (j & -b) + column, axis=1) for p in packed]
    inverses = [x - s * x[column : column + 1] for x, s in zip(inverses, spread)]
  inverses = [jnp.where(own, jnp.concatenate([x] * (rows // b)), 0) for x in inverses]
  while b < rows:
    i, j = grid(rows, rows)
    mask = ((i ^ j) < 2 * b) & ((i & b) > (j & b))
    below = [_second(jnp.where(mask, a, 0), b) for a in systems]
    new = _dots(below, inverses, dot)
    new = _dots([_second(x, b) for x in inverses], [_spread_second(y, b) for y in new], dot)
    inverses = [x - _spread_second(y, b) for x, y in zip(inverses, new)]
    b *= 2
  return inverses


def _dots(lefts, rights, dot: Products):
  """Products side by side; split operands share what is loaded for the high half of the right."""
  if dot.passes == 1:
    return [dot(x, y) for x, y in zip(lefts, rights)]
  once = dataclasses.replace(dot, operand=jnp.bfloat16, passes=1)
  split = [(halves(x), halves(y)) for x, y in zip(lefts, rights)]
  high = [once(jnp.concatenate(x), y[0]) for x, y in split]
  low = [once(x[0], y[1]) for x, y in split]
  n = lefts[0].shape[0]
  return [x[:n] + (x[n:] + y) for x, y in zip(high, low)]


def _second(x: jax.Array, b: int) -> jax.Array:
  """Every second block of b rows."""
  return jnp.concatenate([x[first : first + b] for first in range(b, x.shape[0], 2 * b)])


def _spread_second(x: jax.Array, b: int) -> jax.Array:
  """The transpose of ``_second``: zeros in every first block."""
  parts = [x[first : first + b] for first in range(0, x.shape[0], b)]
  return jnp.concatenate([y for part in parts for y in (jnp.zeros_like(part), part)])


def products(rows: int, dot: Products, first: int = 16) -> int:
  """Multiply-adds of the matrix unit in ``on_lanes``, each pass over split operands counted."""
  doublings = (rows // min(first, rows)).bit_length() - 1
  return doublings * 2 * (rows // 2) * rows * rows * dot.passes
