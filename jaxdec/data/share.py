# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch a process reads."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
from jaxtyping import Integer

from jaxdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class Share:
  """Which of ``of`` equal parts of every batch a process reads, in ascending order."""

  parts: tuple[int, ...] = (0,)
  of: int = 1

  def __post_init__(self):
    if self.of < 1 or not self.parts or list(self.parts) != sorted({*self.parts}):
      raise UserError(f"parts of a share must ascend, one at least, got {self.parts} of {self.of}")
    if self.parts[0] < 0 or self.parts[-1] >= self.of:
      raise UserError(f"the parts of a share must be in 0..{self.of - 1}, got {self.parts}")

  @staticmethod
  def choose(share: Share | None, process_index: int | None, process_count: int | None) -> Share:
    """What was asked for; nothing: one part for each process that JAX runs on."""
    if share is not None:
      if (process_index, process_count) != (None, None):
        raise UserError("give share, or process_index and process_count, not both")
      return share
    if (process_index, process_count) == (None, None):
      jax = sys.modules.get("jax")  # not loaded: one process, and data stays light
      if jax is None or not jax.distributed.is_initialized():
        return Share()
      return Share((jax.process_index(),), jax.process_count())
    index, count = process_index or 0, 1 if process_count is None else process_count
    if not 0 <= index < count:
      raise UserError(f"process_index must be in 0..{count - 1}, got {index}")
    return Share((index,), count)

  def rows(self, batch_size: int) -> Integer[np.ndarray, "R"]:
    """The row numbers within a batch."""
    each = batch_size // self.of
    return (np.asarray(self.parts)[:, None] * each + np.arange(each)).reshape(-1)

  def total(self, rows: int) -> int:
    """The rows of the whole batch of which this share has ``rows``."""
    return rows * self.of // len(self.parts)
