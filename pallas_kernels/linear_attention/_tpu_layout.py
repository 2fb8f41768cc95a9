# SPDX-License-Identifier: Apache-2.0
"""How sequences, states and heads reach the TPU kernels of linear attention.

The grid is (batch, group of heads, step, head of the group): a step is a few chunks of all the
heads that share an array, so what they share is copied to the core once a step, and the gradients
of it are summed there. States of the heads of a group live on the core from step to step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._chunks import ChannelDecay, Products, channel_decay, grid
from pallas_kernels._numerics import MASKED, coarse_fine
from pallas_kernels._tpu import LANES, precision


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sizes of a call.

  Attributes:
    heads: N. group: heads a group. chunk: C. chunks: a step. steps: of the sequence.
    decay: "none", "scalar" or "channel".
  """

  batch: int
  heads: int
  group: int
  chunk: int
  chunks: int
  steps: int
  h: int
  width: int
  decay: str
  dtype: jnp.dtype
  scale: float
  interpret: object = False
  vmem_limit_bytes: int | None = None

  @property
  def grid(self) -> tuple[int, int, int, int]:
    return self.batch, self.heads // self.group, self.steps, self.group

  @property
  def tokens(self) -> int:
    return self.chunk * self.chunks

  @property
  def dot(self) -> Products:
    return Products(operand=self.dtype, precision=precision(self.dtype))

  @property
  def parts(self) -> int:
    """Of prefix sums of scalar log-decays; see ``decay_rows``."""
    return 2 if self.dtype.itemsize >= 4 else 1

  def walk(self, width: int, body: Callable, carry, reverse: bool = False):
    """``carry = body(chunks, carry)`` over the chunks of a step, ``width`` at a time.

    The compiler overlaps what it sees at once, so all of it is unrolled; with channel decay, whose
    chunks are long programs, it is a loop.
    """
    if self.decay == "channel":
      width = math.gcd(width, self.chunks)
    starts = range(0, self.chunks, width)

    def some(first, carry):
      chunks = [first + i for i in range(min(width, self.chunks))]
      if self.decay != "channel":
        chunks = [c for c in chunks if c < self.chunks]
      return body(chunks[::-1] if reverse else chunks, carry)

    if self.decay != "channel":
      for first in reversed(starts) if reverse else starts:
        carry = some(first, carry)
      return carry
    trips = len(starts)
    return jax.lax.fori_loop(
      0, trips, lambda i, x: some((trips - 1 - i if reverse else i) * width, x), carry
    )

  def rows(self, c) -> pl.Slice:
    """The tokens of chunk ``c`` of a step."""
    return pl.ds(c * self.chunk, self.chunk)

  def shared(self, heads: int) -> int:
    """How many heads in a row of a group use one head of an array that has ``heads``."""
    return math.gcd(self.group, self.heads // heads)

  def sequence(self, heads: int, width: int, reverse: bool = False) -> pl.BlockSpec:
    """A step of one head of a sequence laid out by ``to_kernel``, as ``[tokens, width]``."""
    each = self.heads // heads

    def index(b, group, step, r):
      n = jax.lax.div(group * self.group + r, each)
      step = self.steps - 1 - step if reverse else step
      return (b, step, n) if width % LANES == 0 else (b, n, step, 0)

    lead = (None,) if width % LANES == 0 else (None, None)
    return pl.BlockSpec((*lead, self.tokens, width), index)

  def sums(self, reverse: bool = False, heads: int | None = None, rows: int = 1) -> pl.BlockSpec:
    """A step of numbers a token, ``[B,heads,steps,rows*chunks,C]``, as ``[rows*chunks,C]``."""
    each = self.heads // (heads or self.heads)

    def index(b, group, step, r):
      step = self.steps - 1 - step if reverse else step
      return b, jax.lax.div(group * self.group + r, each), step, 0, 0

    return pl.BlockSpec((None, None, None, rows * self.chunks, self.chunk), index)

  def edge_state(self, step: int) -> pl.BlockSpec:
    """A state ``[B,N,H,Hv]`` that is read or written at one step: no copies at the others."""
    wait = self.group - 1 if step == 0 else 0

    def index(b, group, now, r):
      return b, group * self.group + jnp.where(now == step, r, wait), 0, 0

    return pl.BlockSpec((None, None, self.h, self.width), index)


class Scalar(NamedTuple):
  """One decay a token. ``between`` and ``enter`` carry the scale of q.

  ``between [C,C]``: exp(G_i - G_j) for i >= j, else 0. ``enter``, ``leave [C,H]``: exp(G) and
  exp(G_C - G), the same in all columns; ``leave_row [1,C]``; ``state [1,1]``: exp(G_C).
  """

  between: jax.Array
  enter: jax.Array
  leave: jax.Array
  leave_row: jax.Array
  state: jax.Array


def decay_rows(layout: Layout, g: jax.Array) -> jax.Array:
  """Prefix sums inside chunks of scalar log-decays in base 2, ``[B,heads,steps,parts*chunks,C]``.

  Two parts, coarse and fine. One, their sum, where products are of 16-bit floats: its rounding, at
  most 2**-11 for sums down to -2**14, is below that of the operands. XLA forms the sums, which in a
  kernel would need transposes.
  """
  b, _, heads = g.shape
  g = jnp.moveaxis(g, 2, 1).reshape(b, heads, layout.steps, layout.chunks, layout.chunk)
  parts = [jnp.cumsum(x, axis=-1) for x in coarse_fine(g * math.log2(math.e))]
  return jnp.concatenate(parts, axis=3) if layout.parts == 2 else sum(parts)


def chunk_decays(layout: Layout, ref) -> Callable[[int], Scalar | ChannelDecay | None]:
  """What gives the decays of each chunk of a step, from the block of log-decays."""
  c, m = layout.chunk, layout.chunks
  if layout.decay == "none":
    return lambda index: None
  if layout.decay == "channel":
    return lambda index: channel_decay(ref[layout.rows(index), :])
  rows = ref[...]  # [parts*m,C]
  columns = rows.T

  def one(index):
    parts = [(columns[:, p : p + 1], rows[p : p + 1]) for p in range(index, layout.parts * m, m)]
    i, j = grid(c, c)
    bias = math.log2(layout.scale)
    exponent = sum(column - row for column, row in parts)

    def wide(column):  # spread first, exp after: the spread is the dear part, and `between` has it
      return jnp.broadcast_to(column, (c, layout.h))

    return Scalar(
      between=jnp.exp2(jnp.where(i >= j, exponent + bias, MASKED)),
      enter=jnp.exp2(sum(wide(column) for column, _ in parts) + bias),
      leave=jnp.exp2(sum(row[:, c - 1 :] - wide(column) for column, row in parts)),
      leave_row=jnp.exp2(sum(row[:, c - 1 :] - row for _, row in parts)),
      state=jnp.exp2(sum(row[:, c - 1 :] for _, row in parts)),
    )

  return one
