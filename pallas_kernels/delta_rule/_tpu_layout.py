# SPDX-License-Identifier: Apache-2.0
"""How sequences, states and heads reach the TPU kernels of the delta rule.

The grid is (batch, group of heads, step). A step is a few chunks of a few heads, unrolled: nothing
of one (head, chunk) but the walk over states depends on another, so the compiler fills the waits of
one with the work of the next. States stay on the core from step to step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._chunks import Products, channel_decay, prefixes, scalar_decay
from pallas_kernels._tpu import LANES, precision

ROWS = 3  # numbers a token in rows: beta, and the two parts of prefix sums of scalar log-decays


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sizes of a call.

  Attributes:
    heads: N. each: heads a step. chunk: C. group: chunks a step. steps: of the sequence.
    channel: whether decays are per channel.
  """

  batch: int
  heads: int
  each: int
  chunk: int
  group: int
  steps: int
  h: int
  width: int
  channel: bool
  dtype: Any
  scale: float
  interpret: Any = False
  vmem_limit_bytes: int | None = None

  @property
  def grid(self) -> tuple[int, int, int]:
    return self.batch, self.heads // self.each, self.steps

  @property
  def tokens(self) -> int:
    return self.chunk * self.group

  @property
  def dot(self) -> Products:
    return Products(operand=self.dtype, precision=precision(self.dtype))

  @property
  def exact(self) -> Products:
    """For the inverse: float32, or three bfloat16 products (16 bits)."""
    return self.dot if self.dtype.itemsize >= 4 else Products(passes=3)

  def local(self, heads: int) -> int:
    """Heads of an array with ``heads`` that a step needs."""
    return max(1, self.each * heads // self.heads)

  def spec(self, heads: int, width: int, reverse: bool = False) -> pl.BlockSpec:
    """A step of the heads it needs of a sequence laid out by ``to_kernel``."""
    local = self.local(heads)

    def index(b, n, step):
      step = self.steps - 1 - step if reverse else step
      n = jax.lax.div(n * (self.each * heads), self.heads * local)
      return (b, step, n) if width % LANES == 0 else (b, n, step, 0)

    if width % LANES == 0:
      return pl.BlockSpec((None, self.tokens, local * width), index)
    return pl.BlockSpec((None, local, self.tokens, width), index)

  def rows(self, count: int, reverse: bool = False) -> pl.BlockSpec:
    """A step of ``[B,N,steps,count*group,C]``."""

    def index(b, n, step):
      return b, n, self.steps - 1 - step if reverse else step, 0, 0

    return pl.BlockSpec((None, self.each, None, count * self.group, self.chunk), index)

  def state(self) -> pl.BlockSpec:
    """``[B,N,H,Hv]``: one block for all steps, copied once."""
    return pl.BlockSpec((None, self.each, self.h, self.width), lambda b, n, step: (b, n, 0, 0))

  def saved(self, reverse: bool = False) -> pl.BlockSpec:
    """The state before a step, of ``[B,N,steps,H,Hv]``."""

    def index(b, n, step):
      return b, n, self.steps - 1 - step if reverse else step, 0, 0

    return pl.BlockSpec((None, self.each, None, self.h, self.width), index)

  def inverses(self, reverse: bool = False) -> pl.BlockSpec:
    """A step of the inverses ``[B,N,T,C]``."""

    def index(b, n, step):
      return b, n, self.steps - 1 - step if reverse else step, 0

    return pl.BlockSpec((None, self.each, self.tokens, self.chunk), index)

  def place(self, heads: int, width: int, head: int, chunk: int) -> tuple:
    """Index into a block of ``spec``: the rows of a chunk for head ``head`` of the step."""
    return self.slot(width, head * self.local(heads) // self.each, chunk)

  def slot(self, width: int, head: int, chunk: int) -> tuple:
    """The same for head ``head`` of those in the block."""
    tokens = slice(chunk * self.chunk, (chunk + 1) * self.chunk)
    if width % LANES == 0:
      return tokens, slice(head * width, (head + 1) * width)
    return head, tokens, slice(None)

  def decays(self, rows, columns, g_ref, head: int, chunk: int):
    """The decays of one head's chunk: from its rows, or from log-decays per channel."""
    if self.channel:
      return channel_decay(g_ref[self.place(self.heads, self.h, head, chunk)])
    coarse, fine = self.group + chunk, 2 * self.group + chunk
    return scalar_decay(
      columns[:, coarse : coarse + 1],
      columns[:, fine : fine + 1],
      rows[coarse : coarse + 1],
      rows[fine : fine + 1],
    )


def token_rows(layout: Layout, beta: jax.Array, g: jax.Array) -> jax.Array:
  """beta and, for scalar decays, the prefix sums of log-decays: ``[B,N,steps,count*group,C]``."""

  def rows(x):  # [B,T,N]
    x = jnp.moveaxis(x.astype(jnp.float32), 2, 1)
    return x.reshape(layout.batch, layout.heads, layout.steps, layout.group, layout.chunk)

  if layout.channel:
    return rows(beta)
  return jnp.concatenate([rows(beta), *prefixes(rows(g))], axis=3)
