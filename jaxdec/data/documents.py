# SPDX-License-Identifier: Apache-2.0
"""A document, and which split it belongs to."""

from __future__ import annotations

import dataclasses
import hashlib

from jaxdec.errors import UserError, nearest

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Document:
  """One text and the name it is known by: a relative POSIX path, `#line` appended for JSONL."""

  path: str
  text: str


@dataclasses.dataclass(frozen=True)
class SplitShares:
  """Shares of the three splits; train takes what the other two leave."""

  validation: float = 0.03
  test: float = 0.03

  def __post_init__(self):
    if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
      raise UserError(
        f"split shares must be non-negative and leave room for train, got {self}; "
        "use for example validation=0.03, test=0.03"
      )


DEFAULT_SHARES = SplitShares()


def split_of(path: str, shares: SplitShares = DEFAULT_SHARES) -> str:
  """The split of a document, from its name alone.

  u = sha256(path) / 2^256, to 64 bits, falls into train [0, 1-v-t), validation [1-v-t, 1-t) or
  test [1-t, 1).
  The same file is in the same split on every machine and interpreter, whatever else is there.
  """
  u = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
  if u < 1 - shares.validation - shares.test:
    return "train"
  return "validation" if u < 1 - shares.test else "test"


def check_split(split: str) -> str:
  """`split` itself, or a UserError that names the three there are (`all` is their union)."""
  if split not in (*SPLITS, "all"):
    raise UserError(
      f"unknown split {split!r}{nearest(split, SPLITS)}; use one of {', '.join(SPLITS)} or all"
    )
  return split
