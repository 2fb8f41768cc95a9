# SPDX-License-Identifier: Apache-2.0
"""Arithmetic inside one chunk of a decaying recurrence, on tiles ``[C,H]`` (C a power of two).

What token ``i`` reads of token ``j <= i`` is weighted by ``exp(g_{j+1} + .. + g_i)``, per token
(scalar decay) or per token and channel. A decay object answers, without ever forming ``exp(-G)``:

  scores(q, k)[i,j] = sum_d q[i,d] k[j,d] exp(sum of g[., d] over (j, i])     for i > j (or >= j)
  read(x, k)[i,d]   = sum_{j<i} x[i,j] k[j,d] exp(sum of g[., d] over (j, i])
  write(x, q)[j,d]  = sum_{i>j} x[i,j] q[i,d] exp(sum of g[., d] over (j, i])
  enter[i] = exp(g_1 + .. + g_i),  leave[j] = exp(g_{j+1} + .. + g_C),  total = exp(g_1 + .. + g_C)

The functions are written for two-dimensional tiles with shapes a TPU kernel accepts, so the same
code runs in kernels and, under ``jax.vmap``, in plain XLA.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._numerics import MASKED, coarse_fine

_CONTRACT = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}


@dataclasses.dataclass(frozen=True)
class Products:
  """Products of tiles: ``dot(a, b, "nn" | "nt" | "tn")``, t marks a transposed operand.

  Attributes:
    operand: dtype the operands are rounded to first; None keeps them.
    precision: of the product. accumulate: dtype of the result.
    passes: 1, or 3 for operands split into two bfloat16 halves each (about 16 bits a factor).
  """

  operand: Any = None
  precision: jax.lax.Precision | None = None
  accumulate: Any = jnp.float32
  passes: int = 1

  def __call__(self, a: jax.Array, b: jax.Array, form: str = "nn") -> jax.Array:
    if self.passes == 3:
      once = dataclasses.replace(self, operand=jnp.dtype(jnp.bfloat16), passes=1)
      a_high, a_low = halves(a)
      b_high, b_low = halves(b)
      return once(a_high, b_high, form) + (once(a_low, b_high, form) + once(a_high, b_low, form))
    if self.operand is not None:
      a, b = a.astype(self.operand), b.astype(self.operand)
    return jax.lax.dot_general(
      a,
      b,
      (_CONTRACT[form], ((), ())),
      precision=self.precision,
      preferred_element_type=self.accumulate,
    )


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float32 as a bfloat16 plus a bfloat16 remainder (the sum has 16 bits)."""
  high = x.astype(jnp.bfloat16)
  return high, (x - high.astype(x.dtype)).astype(jnp.bfloat16)


def grid(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
  """Row and column index of every element of a tile."""
  shape = (rows, columns)
  return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


class ScalarDecay(NamedTuple):
  """One decay a token: every product is one matrix product with a mask of decays."""

  between: jax.Array  # [C,C] exp(G_i - G_j) for i >= j, else 0
  enter: jax.Array  # [C,1]
  leave: jax.Array  # [C,1]
  total: jax.Array  # [1,1]

  def scores(self, q, k, dot, diagonal: bool = False):
    i, j = grid(*self.between.shape)
    mask = self.between if diagonal else jnp.where(i > j, self.between, 0)
    return dot(q, k, "nt") * mask

  def read(self, x, k, dot):
    i, j = grid(*x.shape)
    return dot(jnp.where(i > j, x * self.between, 0), k)

  def write(self, x, q, dot):
    i, j = grid(*x.shape)
    return dot(jnp.where(i > j, x * self.between, 0), q, "tn")

  @property
  def state(self):
    """Factor of the state ``[H,Hv]`` over the chunk."""
    return self.total

  def per_decay(self, x):
    """``[C,H]`` summed over what shares one log-decay."""
    return jnp.sum(x, axis=1, keepdims=True)


class ChannelDecay(NamedTuple):
  """One decay a token and channel, by binary splitting.

  Tokens ``i > j`` part ways in exactly one aligned block of ``2m`` rows (m = 1, 2, .., C/2): j in
  its first half, i in its second. There the exponent is a sum from the middle down to i plus one
  from j up to the middle, both of one sign: nothing overflows, and nothing is lost to differences
  of prefix sums. One factor a level serves both sides, since the halves are disjoint.
  """

  factors: tuple[jax.Array, ...]  # of [C,H], m = 1, 2, 4, .., C/2
  enter: jax.Array  # [C,H]
  leave: jax.Array  # [C,H]
  total: jax.Array  # [1,H]

  def _levels(self, rows):
    i, j = grid(rows, rows)
    for level, factor in enumerate(self.factors):
      # i and j agree above this bit, where i has 1 and j has 0
      yield factor, (i >> (level + 1) == j >> (level + 1)) & (i >> level > j >> level)

  def scores(self, q, k, dot, diagonal: bool = False):
    terms = [
      jnp.where(here, dot(q * factor, k * factor, "nt"), 0)
      for factor, here in self._levels(q.shape[0])
    ]
    if diagonal:
      i, j = grid(q.shape[0], q.shape[0])
      products = q.astype(dot.accumulate) * k.astype(dot.accumulate)
      terms.append(jnp.where(i == j, jnp.sum(products, axis=1, keepdims=True), 0))
    return sum(terms)

  def read(self, x, k, dot):
    return sum(
      factor * dot(jnp.where(here, x, 0), k * factor) for factor, here in self._levels(x.shape[0])
    )

  def write(self, x, q, dot):
    return sum(
      factor * dot(jnp.where(here, x, 0), q * factor, "tn")
      for factor, here in self._levels(x.shape[0])
    )

  @property
  def state(self):
    """Factor of the state ``[H,Hv]`` over the chunk."""
    return jnp.broadcast_to(self.total, (8, self.total.shape[1])).T[:, :1]

  def per_decay(self, x):
    """``[C,H]`` summed over what shares one log-decay."""
    return x


def prefixes(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Inclusive prefix sums over the last axis, as an exact coarse part and a fine one."""
  coarse, fine = coarse_fine(g)
  return jnp.cumsum(coarse, axis=-1), jnp.cumsum(fine, axis=-1)


def scalar_decay(
  coarse: jax.Array, fine: jax.Array, coarse_row: jax.Array, fine_row: jax.Array
) -> ScalarDecay:
  """From ``prefixes`` of a chunk as columns ``[C,1]`` and again as rows ``[1,C]``."""
  chunk = coarse.shape[0]
  i, j = grid(chunk, chunk)
  exponent = (coarse - coarse_row) + (fine - fine_row)
  last_coarse, last_fine = coarse[chunk - 1 :], fine[chunk - 1 :]
  return ScalarDecay(
    between=jnp.exp(jnp.where(i >= j, exponent, MASKED)),
    enter=jnp.exp(coarse + fine),
    leave=jnp.exp((last_coarse - coarse) + (last_fine - fine)),
    total=jnp.exp(last_coarse + last_fine),
  )


def channel_decay(g: jax.Array) -> ChannelDecay:
  """From the log-decays ``[C,H]`` of a chunk."""
  chunk = g.shape[0]
  row = grid(*g.shape)[0]
  until, after = g, jnp.zeros_like(g)  # sums up to and from a token inside blocks of m rows
  factors = []
  m = 1
  while m < chunk:
    second = (row & m) != 0
    factors.append(jnp.exp(jnp.where(second, until, after)))
    after = after + _spread(until, 2 * m, 2 * m - 1, second=False)
    until = until + _spread(until, 2 * m, m - 1, second=True)
    m *= 2
  return ChannelDecay(tuple(factors), jnp.exp(until), jnp.exp(after), jnp.exp(until[chunk - 1 :]))


def sum_from(x: jax.Array) -> jax.Array:
  """Row t becomes the sum of rows t, t+1, .. of a tile."""
  m = 1
  while m < x.shape[0]:
    x = x + _spread(x, 2 * m, m, second=False)
    m *= 2
  return x


def sum_before(x: jax.Array) -> jax.Array:
  """Row t becomes the sum of the rows before t."""
  before, m = jnp.zeros_like(x), 1
  while m < x.shape[0]:
    carry = _spread(x, 2 * m, m - 1, second=True)
    before, x = before + carry, x + carry
    m *= 2
  return before


def _spread(x: jax.Array, block: int, source: int, second: bool) -> jax.Array:
  """In every block of rows: row ``source``, copied to one half, zero in the other."""
  rows, width = x.shape
  group = min(rows, max(block, 8))  # eight rows are a register: whole ones are cheap to reshape
  tiles = x.reshape(rows // group, group, width)
  row = jax.lax.broadcasted_iota(jnp.int32, (1, group, width), 1)
  half = ((row & (block // 2)) != 0) == second
  copied = jnp.zeros_like(tiles)
  for start in range(0, group, block):
    here = half & (row >= start) & (row < start + block)
    copied = jnp.where(here, tiles[:, start + source : start + source + 1], copied)
  return copied.reshape(rows, width)
