# SPDX-License-Identifier: Apache-2.0
"""Block sizes of linear attention, per implementation."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class XLAConfig:
  """Block sizes in plain XLA.

  Attributes:
    chunks_per_step: chunks handled at once in a step of the scan over the sequence. More is more
      parallel work and more memory; one state is kept per step for the backward pass.
  """

  chunks_per_step: int = 8

  def __post_init__(self):
    _positive("XLAConfig", chunks_per_step=self.chunks_per_step)


@dataclasses.dataclass(frozen=True)
class TPUConfig:
  """Block sizes of the TPU kernels.

  Attributes:
    chunks_per_step: chunks of a grid step: so many tokens are copied to the core at once, and one
      state is kept per step for the backward pass.
  """

  chunks_per_step: int = 8

  def __post_init__(self):
    _positive("TPUConfig", chunks_per_step=self.chunks_per_step)


def _positive(name: str, **sizes: int) -> None:
  for field, size in sizes.items():
    if not isinstance(size, int) or size < 1:
      raise ValueError(f"{name}: {field} is {size!r}, expected a positive integer.")
