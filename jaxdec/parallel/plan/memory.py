# SPDX-License-Identifier: Apache-2.0
"""What lies in the HBM of one device while a program runs, and whether it fits."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    parts: arguments by what they are (``parameters``, ``optimizer``, ``batch``, ...), from their
      shardings, without padding.
    arguments: of all of them, as the compiler lays them out. outputs, temporaries: likewise.
      Activations that wait for the backward pass are temporaries.
    aliased: outputs written into donated arguments; they take no room of their own.
    code: the program. limit: what a device has for programs.
    peak: needed at once; where the compiler refused, what its message says it needed.
    refusal: the compiler's message; None where the program compiled.
  """

  parts: dict[str, int]
  arguments: int | None
  outputs: int | None
  temporaries: int | None
  aliased: int | None
  code: int | None
  limit: int
  peak: int
  refusal: str | None = None

  @property
  def fits(self) -> bool:
    return self.refusal is None and self.peak <= self.limit

  @property
  def spare(self) -> int:
    """Bytes left over; negative: missing."""
    return self.limit - self.peak

  @property
  def verdict(self) -> str:
    """One sentence."""
    used = f"{self.peak / _GIB:.2f} of {self.limit / _GIB:.2f} GiB"
    if self.fits:
      return f"fits: {used} a device, {self.spare / _GIB:.2f} GiB to spare"
    return f"does not fit: {used} a device, {-self.spare / _GIB:.2f} GiB too much"


def device_bytes(tree: Any) -> int:
  """Bytes of a tree of abstract arrays on one device, by their shardings."""

  def one(x) -> int:
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype) if x.dtype != jax.dtypes.float0 else None
    return math.prod(shape) * (dtype.itemsize if dtype is not None else 0)

  return sum(map(one, jax.tree.leaves(tree)))


def measured(compiled: jax.stages.Compiled, parts: dict[str, Any], limit: int) -> Memory:
  """Memory of a compiled program. ``parts``: its abstract arguments by what they are."""
  stats = compiled.memory_analysis()
  arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
  temporaries, aliased = stats.temp_size_in_bytes, stats.alias_size_in_bytes
  code = stats.generated_code_size_in_bytes
  return Memory(
    parts={name: device_bytes(tree) for name, tree in parts.items()},
    arguments=arguments,
    outputs=outputs,
    temporaries=temporaries,
    aliased=aliased,
    code=code,
    limit=limit,
    peak=arguments + outputs - aliased + temporaries + code,
  )


def refused(error: Exception, parts: dict[str, Any], limit: int) -> Memory | None:
  """Memory of a program that the compiler refused for want of it; None for any other error."""
  message = str(error)
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  sizes = {name: device_bytes(tree) for name, tree in parts.items()}
  peak = _needed(message, sum(sizes.values()))
  if peak is None:
    return None
  first = " ".join(message.split())
  return Memory(sizes, None, None, None, None, None, limit, peak, first[:600])


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


def _needed(message: str, arguments: int) -> int | None:
  def size(pattern: str) -> int | None:
    found = re.search(pattern, message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None

  if (used := size(rf"Used {_SIZE} of")) is not None:
    return used
  temporaries = size(rf"required for HLO temporaries \({_SIZE}\)")
  return None if temporaries is None else temporaries + arguments
