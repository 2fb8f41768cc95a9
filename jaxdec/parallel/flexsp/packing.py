# SPDX-License-Identifier: Apache-2.0
"""The row of tokens that a group computes, and the few sizes such rows have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def token_bounds(cap: int, multiple: int = 1) -> tuple[int, ...]:
  """Sizes that tokens of a device are padded to: eight an octave, so at most an eighth is padding.

  Args:
    cap: the last size. multiple: every size is rounded up to it (a kernel's chunk).
  """
  sizes, step = set(range(1, 8)), 1
  while 8 * step <= cap:
    sizes.update(range(8 * step, 16 * step, step))
    step *= 2
  sizes = {size for size in sizes if size < cap} | {cap}
  return tuple(sorted({-(-size // multiple) * multiple for size in sizes}))


def pack(sequences: Sequence[Mapping[str, np.ndarray]], tokens: int) -> dict[str, np.ndarray]:
  """Sequences one behind the other in a row ``[1, tokens]``, padded with 0.

  ``segment_ids`` (1, 2, ...; 0 for padding) and ``positions`` are made here; every other array of
  the sequences, ``tokens`` first, is concatenated.
  """
  names = list(sequences[0])
  columns = {name: np.concatenate([np.asarray(s[name]) for s in sequences]) for name in names}
  sizes = [len(s["tokens"]) for s in sequences]
  columns["segment_ids"] = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
  columns["positions"] = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
  free = tokens - sum(sizes)
  return {
    name: np.pad(column, [(0, free)] + [(0, 0)] * (column.ndim - 1))[None]
    for name, column in columns.items()
  }
