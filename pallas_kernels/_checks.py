# SPDX-License-Identifier: Apache-2.0
"""Checks of a call's arguments, before anything is traced: received, expected, fix."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp


def shapes(op: str, **arrays: tuple[Any, str] | None) -> dict[str, int]:
  """Binds dimension letters to sizes over several arrays: ``shapes(op, q=(q, "B T N H"), ...)``.

  A letter has one size throughout; a number in a pattern is that size; ``#T`` also accepts 1.
  ``None`` in place of an array is skipped.

  Returns:
    Letter -> size.

  Raises:
    ValueError: an array's shape doesn't fit; says which array, its shape, what was expected.
  """
  sizes: dict[str, int] = {}
  origin: dict[str, str] = {}
  for name, entry in arrays.items():
    if entry is None or entry[0] is None:
      continue
    array, pattern = entry
    letters = pattern.split()
    shape = jnp.shape(array)
    layout = "[" + ",".join(letter.lstrip("#") for letter in letters) + "]"
    if len(shape) != len(letters):
      raise ValueError(f"{op}: {name} has shape {shape}, expected {len(letters)} axes {layout}.")
    for axis, (letter, size) in enumerate(zip(letters, shape)):
      if letter.startswith("#"):
        letter = letter[1:]
        if size == 1:
          continue
      wanted = int(letter) if letter.isdigit() else sizes.get(letter)
      if wanted is None:
        sizes[letter], origin[letter] = size, name
      elif size != wanted:
        source = f"; {origin[letter]} has {letter}={wanted}" if letter in origin else ""
        raise ValueError(
          f"{op}: {name} has shape {shape}, expected {layout} with {wanted} in axis {axis}{source}."
        )
  return sizes


def divides(op: str, heads: dict[str, int]) -> int:
  """The largest of several head counts, which each of them must divide.

  Raises:
    ValueError: one doesn't; names it, and what would do.
  """
  total = max(heads.values())
  for name, count in heads.items():
    if count == 0 or total % count:
      allowed = [d for d in range(1, total + 1) if total % d == 0]
      raise ValueError(
        f"{op}: {name} has {count} heads, which don't divide {total}; use one of {allowed}."
      )
  return total


def scale_of(scale: float | None, width: int) -> float:
  """``scale``, or ``width ** -0.5`` for None."""
  return 1.0 / math.sqrt(width) if scale is None else float(scale)
