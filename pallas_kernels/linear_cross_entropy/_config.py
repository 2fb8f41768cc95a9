# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the implementations."""

from __future__ import annotations

import dataclasses


def _positive(config: object) -> None:
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
      raise ValueError(
        f"{type(config).__name__}: {field.name} is {value!r}, expected a positive integer or None "
        "(None: chosen for the shapes)."
      )


@dataclasses.dataclass(frozen=True)
class XLAConfig:
  """``vocab_block`` x ``token_block`` logits exist at a time; None: chosen for the shapes.

  None takes up to 8,192 tokens (1,024 on a CPU, whose caches are small) and as much vocabulary as
  makes a block of at most 2**25 (CPU: 2**21) logits.
  """

  vocab_block: int | None = None
  token_block: int | None = None

  def __post_init__(self):
    _positive(self)


@dataclasses.dataclass(frozen=True)
class TPUConfig:
  """Block sizes of the TPU kernels; None: the largest that fit the chip's VMEM.

  Attributes:
    token_block: tokens whose hidden states stay in VMEM; a multiple of 128.
    vocab_block: rows of the head fetched at a time; a multiple of 128.
    backward_token_block, backward_vocab_block: the same in the backward kernel, which also holds
      two float32 gradients of that size.
    sub_block: rows of a block whose logits are formed at once; divides both vocab blocks.
  """

  token_block: int | None = None
  vocab_block: int | None = None
  backward_token_block: int | None = None
  backward_vocab_block: int | None = None
  sub_block: int | None = None

  def __post_init__(self):
    _positive(self)
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is not None and value % 128:
        raise ValueError(
          f"TPUConfig: {field.name} is {value}, expected a multiple of 128, the width of a vector "
          f"register; use {max(128, value // 128 * 128)}."
        )
    for name in ("vocab_block", "backward_vocab_block"):
      value = getattr(self, name)
      if self.sub_block and value and value % self.sub_block:
        raise ValueError(
          f"TPUConfig: sub_block {self.sub_block} doesn't divide {name} {value}; use a divisor."
        )
