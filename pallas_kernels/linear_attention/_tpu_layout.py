# SPDX-License-Identifier: Apache-2.0
"""How sequences, states and heads reach the TPU kernels of linear attention.

The grid is (batch, group of heads, step, head of the group): a step is a few chunks of all the
heads that share an array, so what they share is copied to the core once a step, and the gradients
of it are summed there. States of the heads of a group live on the core from step to step.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._chunks import ChannelDecay, Products, ScalarDecay, channel_decay, grid
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

  def sums(self, reverse: bool = False, heads: int | None = None, rows: int = 2) -> pl.BlockSpec:
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


def to_kernel(x: jax.Array) -> jax.Array:
  """``[B,T,heads,H]`` as ``[B,T,heads*H]``, of which a kernel takes columns, where H fills lanes.

  Other widths can't be cut from the lanes and are moved to ``[B,heads,T,H]``.
  """
  b, t, heads, h = x.shape
  return x.reshape(b, t, heads * h) if h % LANES == 0 else jnp.moveaxis(x, 2, 1)


def kernel_shape(b: int, t: int, heads: int, h: int) -> tuple[int, ...]:
  return (b, t, heads * h) if h % LANES == 0 else (b, heads, t, h)


def from_kernel(x: jax.Array, heads: int) -> jax.Array:
  if x.ndim == 3:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)
  return jnp.moveaxis(x, 1, 2)


def decay_rows(layout: Layout, g: jax.Array) -> jax.Array:
  """Prefix sums of scalar log-decays inside chunks: ``[B,T,heads] -> [B,heads,steps,2*chunks,C]``.

  Coarse rows, then fine rows: XLA forms them, since a chunk's sums in a kernel need transposes.
  """
  b, _, heads = g.shape
  g = jnp.moveaxis(g, 2, 1).reshape(b, heads, layout.steps, layout.chunks, layout.chunk)
  return jnp.concatenate([jnp.cumsum(x, axis=-1) for x in coarse_fine(g)], axis=3)


def chunk_decays(layout: Layout, ref) -> list[ScalarDecay | ChannelDecay | None]:
  """The decays of each chunk of a step. ``ScalarDecay.between`` and ``enter`` carry the scale."""
  if layout.decay == "none":
    return [None] * layout.chunks
  if layout.decay == "channel":
    c = layout.chunk
    return [channel_decay(ref[i * c : (i + 1) * c, :]) for i in range(layout.chunks)]
  m = layout.chunks
  coarse, fine = ref[:m, :], ref[m:, :]  # [m,C]
  last = layout.chunk - 1
  enter = jnp.exp(coarse + fine)
  leave = jnp.exp((coarse[:, last:] - coarse) + (fine[:, last:] - fine))
  columns = jnp.concatenate([coarse, fine, enter * layout.scale, leave], axis=0).T  # [C,4m]
  i, j = grid(layout.chunk, layout.chunk)

  def one(c):
    column = [columns[:, part * m + c : part * m + c + 1] for part in range(4)]
    exponent = (column[0] - coarse[c : c + 1]) + (column[1] - fine[c : c + 1])
    between = jnp.exp(jnp.where(i >= j, exponent, MASKED)) * layout.scale
    return ScalarDecay(between, column[2], column[3], enter[c : c + 1, last:])

  return [one(c) for c in range(m)]
