# SPDX-License-Identifier: Apache-2.0
"""Types of arrays inside ``jax.shard_map``: over which mesh axes a value varies.

Under ``check_vma=True`` every value carries that set, and a loop's carry, or an input and its
gradient, must agree on it. Zeros made on the spot vary over nothing, so they are cast to what the
inputs vary over; the transpose of that cast sums a gradient over the axes. Outside ``shard_map``,
and under ``check_vma=False``, all sets are empty and nothing is cast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax


def varying(*trees: Any) -> frozenset[str]:
  """The mesh axes over which at least one array of the trees varies."""
  leaves = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def vary(tree: Any, axes: Iterable[str]) -> Any:
  """The arrays of ``tree`` as values that vary over ``axes`` too."""
  axes = frozenset(axes)

  def cast(x):
    missing = tuple(sorted(axes - varying(x))) if isinstance(x, jax.Array) else ()
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, tree) if axes else tree


def vary_alike(*trees: Any) -> tuple[Any, ...]:
  """All arrays as values that vary over the same axes; what isn't an array stays as it is."""
  return vary(trees, varying(trees))
