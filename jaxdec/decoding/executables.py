# SPDX-License-Identifier: Apache-2.0
"""Compiled functions kept by their static arguments, with compilation counted and timed."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

import jax

_COUNTS: collections.Counter[str] = collections.Counter()
_SECONDS = [0.0]
_ALL: list[Executable] = []


class Executable:
  """``jax.jit`` whose compilations are counted by name and timed apart from the runs.

  Keyword arguments are static (hashable); positional ones are arrays. One executable is kept per
  (static arguments, shapes, dtypes, shardings), so a second ``generate`` call compiles nothing.
  """

  def __init__(self, name: str, function: Callable, donate: tuple[int, ...] = ()):
    self.name, self.function, self.donate = name, function, donate
    self.cache: dict[Any, Any] = {}
    _ALL.append(self)

  def __call__(self, *args, **static):
    leaves, tree = jax.tree.flatten(args)
    key = (tuple(sorted(static.items())), tree, tuple(map(_signature, leaves)))
    compiled = self.cache.get(key)
    if compiled is None:
      started = time.perf_counter()
      jitted = jax.jit(lambda *a: self.function(*a, **static), donate_argnums=self.donate)
      compiled = self.cache[key] = jitted.lower(*args).compile()
      _COUNTS[self.name] += 1
      _SECONDS[0] += time.perf_counter() - started
    return compiled(*args)


def clear() -> None:
  """Forgets every executable (they hold memory)."""
  for executable in _ALL:
    executable.cache.clear()


def _signature(x) -> tuple:
  if isinstance(x, jax.Array):
    return x.shape, x.dtype, x.aval.weak_type, x.sharding, x.committed
  return jax.typeof(x), None


def compilations() -> dict[str, int]:
  """Executables compiled by this process, by kind: ``prefill``, ``begin``, ``decode``, ..."""
  return dict(_COUNTS)


def compile_seconds() -> float:
  """Seconds this process has spent compiling them."""
  return _SECONDS[0]
