# SPDX-License-Identifier: Apache-2.0
"""Block sizes, and what surrounds the recurrence."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels._numerics import accumulator


@dataclasses.dataclass(frozen=True)
class XLAConfig:
  """How a chunk is scanned.

  Attributes:
    associative: ``associative_scan`` inside a chunk, not a loop over its tokens; None: except on a
      CPU, where the loop was 3 to 10 times as fast.
  """

  associative: bool | None = None


@dataclasses.dataclass(frozen=True)
class TPUConfig:
  """Tile sizes of the TPU kernels.

  Attributes:
    block_t: tokens in a grid step, a multiple of 128 (a chunk of fewer tokens is one step).
    block_d: channels in a grid step, a multiple of 128.
  """

  block_t: int = 128
  block_d: int = 512

  def __post_init__(self):
    for name in ("block_t", "block_d"):
      if getattr(self, name) <= 0 or getattr(self, name) % 128:
        raise ValueError(f"TPUConfig: {name} is a multiple of 128, got {getattr(self, name)}.")


def finish(y: jax.Array, x: jax.Array, D: jax.Array | None, z: jax.Array | None) -> jax.Array:
  """``(y + D x) silu(z)`` in the accumulator's type."""
  wide = accumulator(x)
  y = y.astype(wide)
  if D is not None:
    y = y + D.astype(wide) * x.astype(wide)
  return y if z is None else y * jax.nn.silu(z.astype(wide))
