# SPDX-License-Identifier: Apache-2.0
"""The selective scan on a TPU: grid (batch, channel tiles, chunks of tokens), state in VMEM.

There is nothing for the matrix units to do: about ten vector operations a state and token. So the
work is laid out for the vector units (see ``_tpu_kernels``): channels along lanes, states along
sublanes, the exponential in base 2. The forward pass writes the states at chunk starts if gradients
will be asked for; the backward pass recomputes a chunk's states into VMEM, and its sums over all
channels (of B and C) come as one partial result a channel tile.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu
from pallas_kernels._dispatch import require_tpu
from pallas_kernels.manual import vary, varying
from pallas_kernels.selective_scan import _tpu_kernels
from pallas_kernels.selective_scan._common import TPUConfig

_LOG2E = math.log2(math.e)


class Static(NamedTuple):
  """What is fixed at trace time."""

  block_t: int
  block_d: int
  backward_block_d: int
  interpret: Any


def selective_scan(
  x, dt, A, B, C, D, z, initial_state, starts, *, chunk_size=None, config=None
):  # fmt: skip
  """See the public function; ``starts`` bool ``[B,T]``: forgets the state before the token."""
  interpret = require_tpu("selective_scan")
  config = config or TPUConfig()
  block_t = config.block_t if chunk_size is None else -(-chunk_size // 128) * 128
  if initial_state is None:
    initial_state = vary(jnp.zeros((x.shape[0], *A.shape), jnp.float32), varying(x))
  static = Static(block_t, *tiles(config, x.shape[2], A.shape[1], block_t), interpret)
  return scan(static, x, dt, A, B, C, D, z, initial_state.astype(jnp.float32), starts)


def tiles(config: TPUConfig, channels: int, states: int, block_t: int) -> tuple[int, int]:
  """Channels in a tile, forward and backward: the largest that divides them (128 always does).

  The backward pass holds ``block_t`` states of its tile in VMEM: at most 4 MiB of them.
  """
  padded = -(-channels // 128) * 128
  fits = [d for d in range(128, config.block_d + 1, 128) if padded % d == 0]
  state = 4 * block_t * -(-states // 8) * 8
  return fits[-1], max([d for d in fits if state * d <= 4 * 2**20], default=128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(static, x, dt, A, B, C, D, z, h0, starts):
  """``(out, final state)``; ``D``, ``z`` and ``starts`` may be None."""
  return _forward(static, x, dt, A, B, C, D, z, h0, starts, keeps=False)[:2]


def _scan_fwd(static, *args):
  out, state, begins = _forward(static, *args, keeps=True)
  return (out, state), (*args, begins)


def _pad(x, **axes: int):
  """Zeros up to these sizes: ``_pad(x, a1=128)`` for axis 1."""
  sizes = {int(name[1:]): size for name, size in axes.items()}
  return jnp.pad(x, [(0, sizes.get(i, n) - n) for i, n in enumerate(x.shape)])


class Layout:
  """The kernels' operands and blocks: T padded to chunks, D to 128 lanes, S to 8 sublanes.

  A padded token has ``dt = x = 0`` and changes nothing; a padded state or channel stays 0.
  """

  def __init__(self, static: Static, block_d: int, x, A):
    self.B, self.T, self.D = x.shape
    self.S = A.shape[1]
    self.t = min(static.block_t, -(-self.T // 8) * 8)
    self.count = -(-self.T // self.t)
    self.tokens = self.count * self.t
    self.lanes = -(-self.t // 128) * 128  # of a chunk in an array with tokens along lanes
    self.channels = -(-self.D // 128) * 128
    self.states = -(-self.S // 8) * 8
    self.d = block_d
    self.grid = (self.B, self.channels // block_d, self.count)

  def tokenwise(self, x):
    return _pad(x, a1=self.tokens, a2=self.channels)

  def rows(self, B, C, starts):
    """B^T, C^T and, with segments, what a token keeps: ``[B,2S|3S,lanes]``."""
    parts = [_pad(y.astype(jnp.float32), a1=self.tokens, a2=self.states) for y in (B, C)]
    if starts is not None:
      keep = 1.0 - _pad(starts.astype(jnp.float32), a1=self.tokens)
      parts.append(jnp.broadcast_to(keep[:, :, None], parts[0].shape))
    rows = jnp.concatenate(parts, axis=2).swapaxes(1, 2)
    return _pad(rows, a2=self.count * self.lanes)

  def statewise(self, h):  # [..,D,S] -> [..,S,D]
    h = jnp.swapaxes(h, -1, -2).astype(jnp.float32)
    return _pad(h, **{f"a{h.ndim - 2}": self.states, f"a{h.ndim - 1}": self.channels})

  def unstate(self, h):
    return jnp.swapaxes(h, -1, -2)[..., : self.D, : self.S]

  def specs(self, reverse: bool):
    at = (lambda t: self.count - 1 - t) if reverse else (lambda t: t)
    return dict(
      tokens=pl.BlockSpec((1, self.t, self.d), lambda b, d, t: (b, at(t), d)),
      rows=lambda n: pl.BlockSpec((1, n, self.lanes), lambda b, d, t: (b, 0, at(t))),
      d_rows=pl.BlockSpec((1, 1, 2 * self.states, self.lanes), lambda b, d, t: (b, d, 0, at(t))),
      A=pl.BlockSpec((self.states, self.d), lambda b, d, t: (0, d)),
      D=pl.BlockSpec((1, self.d), lambda b, d, t: (0, d)),
      d_D=pl.BlockSpec((1, 1, self.d), lambda b, d, t: (b, 0, d)),
      state=pl.BlockSpec((1, self.states, self.d), lambda b, d, t: (b, 0, d)),
      begins=pl.BlockSpec((1, 1, self.states, self.d), lambda b, d, t: (b, at(t), 0, d)),
    )

  def scratch(self, *shape):
    return pltpu.VMEM(shape, jnp.float32)

  def call(self, static, kernel, name, operands, in_specs, outputs, scratch, work):
    elements = self.B * self.tokens * self.channels * self.states
    arrays = [*operands, *(shape for shape, _ in outputs)]
    return _tpu.call(
      kernel,
      name=name,
      out_shape=[shape for shape, _ in outputs],
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=0,
        grid=self.grid,
        in_specs=in_specs,
        out_specs=[spec for _, spec in outputs],
        scratch_shapes=scratch,
      ),
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      flops=work * elements,
      bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays),
      transcendentals=elements,
      interpret=static.interpret,
    )(*operands)


def _forward(static, x, dt, A, B, C, D, z, h0, starts, keeps):
  y = Layout(static, static.block_d, x, A)
  specs = y.specs(reverse=False)
  rows = y.rows(B, C, starts)
  operands = [y.tokenwise(x), y.tokenwise(dt), rows, y.statewise(A * _LOG2E), y.statewise(h0)]
  in_specs = [specs["tokens"]] * 2 + [specs["rows"](rows.shape[1]), specs["A"], specs["state"]]
  if D is not None:
    operands.append(_pad(D.astype(jnp.float32)[None], a1=y.channels))
    in_specs.append(specs["D"])
  if z is not None:
    operands.append(y.tokenwise(z))
    in_specs.append(specs["tokens"])
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  outputs = [
    (jax.ShapeDtypeStruct((y.B, y.tokens, y.channels), x.dtype), specs["tokens"]),
    (f32((y.B, y.states, y.channels)), specs["state"]),
  ]
  if keeps:
    outputs.append((f32((y.B, y.count, y.states, y.channels)), specs["begins"]))
  kernel = functools.partial(
    _tpu_kernels.forward, gated=z is not None, skipped=D is not None, keeps=keeps
  )
  scratch = [y.scratch(y.states, y.d)] + [y.scratch(y.t, y.d)] * 3
  out, state, *begins = y.call(
    static, kernel, "selective_scan_fwd", operands, in_specs, outputs, scratch, work=9
  )
  return out[:, : y.T, : y.D], y.unstate(state), *(begins or [None])


def _scan_bwd(static, saved, cotangents):
  x, dt, A, B, C, D, z, _, starts, begins = saved
  d_out, d_state = cotangents
  y = Layout(static, static.backward_block_d, x, A)
  specs = y.specs(reverse=True)
  rows = y.rows(B, C, starts)
  operands = [
    y.tokenwise(x), y.tokenwise(dt), rows, y.statewise(A * _LOG2E), begins, y.statewise(d_state),
    y.tokenwise(d_out),
  ]  # fmt: skip
  in_specs = [
    specs["tokens"], specs["tokens"], specs["rows"](rows.shape[1]), specs["A"], specs["begins"],
    specs["state"], specs["tokens"],
  ]  # fmt: skip
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  like = lambda a: jax.ShapeDtypeStruct((y.B, y.tokens, y.channels), a.dtype)  # noqa: E731
  outputs = [
    (like(x), specs["tokens"]),
    (like(dt), specs["tokens"]),
    (f32((y.B, y.grid[1], 2 * y.states, y.count * y.lanes)), specs["d_rows"]),
    (f32((y.B, y.states, y.channels)), specs["state"]),
    (f32((y.B, y.states, y.channels)), specs["state"]),
  ]
  if D is not None:
    operands.append(_pad(D.astype(jnp.float32)[None], a1=y.channels))
    in_specs.append(specs["D"])
    outputs.append((f32((y.B, 1, y.channels)), specs["d_D"]))
  if z is not None:
    operands.append(y.tokenwise(z))
    in_specs.append(specs["tokens"])
    outputs.append((like(z), specs["tokens"]))
  kernel = functools.partial(_tpu_kernels.backward, gated=z is not None, skipped=D is not None)
  scratch = [y.scratch(y.states, y.d)] + [y.scratch(y.t, y.d)] * 5
  scratch.append(y.scratch(y.t, y.states, y.d))
  d_x, d_dt, d_rows, d_A, d_h0, *rest = y.call(
    static, kernel, "selective_scan_bwd", operands, in_specs, outputs, scratch, work=30
  )
  own = lambda a: a[:, : y.T, : y.D]  # noqa: E731
  d_D = jnp.sum(rest.pop(0)[:, 0, : y.D], 0).astype(D.dtype) if D is not None else None
  d_z = own(rest.pop(0)) if z is not None else None
  d_rows = jnp.sum(d_rows, 1).swapaxes(1, 2)[:, : y.T]
  d_B, d_C = (d_rows[..., i : i + y.S].astype(B.dtype) for i in (0, y.states))
  d_A = y.unstate(jnp.sum(d_A, 0)).astype(A.dtype)
  return own(d_x), own(d_dt), d_A, d_B, d_C.astype(C.dtype), d_D, d_z, y.unstate(d_h0), None


scan.defvjp(_scan_fwd, _scan_bwd)
