# SPDX-License-Identifier: Apache-2.0
"""How an op describes its shapes, once, for tests, benchmarks and static costs.

Every op has a ``specs.py`` with

  SPECS: tuple[Spec, ...]                       shapes of real models; the first is the default
  inputs(spec, key) -> Inputs                   arrays of that shape; ``jax.eval_shape`` works on it
  cost(spec) -> Cost                            what the mathematics needs, forward
  inner_loops(spec, chip) -> tuple[Inner, ...]  what the loops of the ``mosaic_tpu`` kernels do
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spec:
  """Sizes by dimension letter (``B``, ``T``, ``N``, ...), input dtype, options of the op."""

  name: str
  sizes: Mapping[str, int]
  dtype: str = "bfloat16"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __getattr__(self, size: str) -> int:
    try:
      return self.__dict__["sizes"][size]
    except KeyError:
      raise AttributeError(f"spec {self.__dict__.get('name')!r} has no size {size!r}") from None

  def replace(self, sizes: Mapping[str, int] | None = None, **changes: Any) -> Spec:
    """A copy with some sizes changed; an unknown size is an error."""
    for size in sizes or {}:
      if size not in self.sizes:
        raise ValueError(f"no size {size!r} in {self.name!r}; it has {', '.join(self.sizes)}.")
    return dataclasses.replace(self, sizes={**self.sizes, **(sizes or {})}, **changes)


@dataclasses.dataclass(frozen=True)
class Inputs:
  """``op(**differentiable, **others, **static)``: gradients are taken of the first group."""

  differentiable: Mapping[str, Any]
  others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  static: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Floating-point operations (a multiply-add is two) and bytes to and from memory at least."""

  flops: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Inner:
  """One loop of a kernel: where it is in the schedule and what a trip of it does.

  Attributes:
    kernel: beginning of the kernel's name. backward: of the backward pass.
    loop: path in ``Schedule.find``.
    unit: what is counted ("query block x key block", "chunk"); units_per_trip: how many in a trip.
    macs_per_trip: multiply-adds of the matrix unit in a trip, as the kernel executes them.
    trips: over the whole call.
  """

  kernel: str
  loop: tuple[int, ...]
  unit: str
  units_per_trip: int
  macs_per_trip: int
  trips: int
  backward: bool = False
