# SPDX-License-Identifier: Apache-2.0
"""TPU slices by name: their chips' facts, and compile-only devices to lower programs for.

A name is ``GENERATION:SHAPE``, such as ``v5p:4x4x8`` or ``v5e:16x16``; ``*N`` adds N slices joined
by the data-centre network (``v5e:16x16*2``). Standard library only until ``devices`` is called.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

from jaxdec.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Generation:
  """What one chip of a TPU generation is.

  Peak, HBM bandwidth and links are from the "System architecture" tables of
  docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. A link's one-way rate is the chip's
  bidirectional ICI rate / ports / 2 (v4: 6 links of 50 GB/s, arXiv 2304.01433). DCN rates are a
  host's network interfaces / its chips; none is published for v4, for which v5p's is taken.
  ``hbm`` is what XLA lets a program use, the limit in its out-of-memory error (libtpu 0.0.42): less
  than the data sheet's, by what the runtime reserves.

  Attributes:
    cores: devices a chip appears as in JAX. One where two cores work as one ("megacore"); all
      rates below are those of the *device*.
    peak: bfloat16 FLOP/s. hbm: bytes. bandwidth: HBM bytes/s.
    link: bytes/s of one ICI link, one way; a chip has two links in every dimension of the torus.
    dcn: bytes/s of a device out of its slice, one way.
    dimensions: of the torus. chips: largest slice. shapes: slices that are not made of full cubes.
    wrap: a dimension of this size closes to a ring; 0: all do, where every size is a multiple of 4.
  """

  name: str
  cores: int
  peak: float
  hbm: int
  bandwidth: float
  link: float
  dcn: float
  dimensions: int
  chips: int
  wrap: int
  shapes: tuple[str, ...]
  options: tuple[tuple[str, Any], ...] = ()


_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")

GENERATIONS = {
  g.name: g
  for g in (
    Generation(
      "v4", 1, 275e12, int(30.75 * _GIB), 1.2e12, 50e9, 6.25e9, 3, 4096, 0, _SMALL,
      # Otherwise libtpu describes the two cores of a v4 as two devices; Cloud TPU VMs show one.
      (("chip_config_name", "megacore"),),
    ),
    Generation("v5e", 1, 197e12, int(15.75 * _GIB), 819e9, 50e9, 3.125e9, 2, 256, 16, _FLAT),
    Generation("v5p", 1, 459e12, int(95.74 * _GIB), 2.765e12, 100e9, 6.25e9, 3, 6144, 0, _SMALL),
    Generation("v6e", 1, 918e12, int(31.25 * _GIB), 1.638e12, 100e9, 12.5e9, 2, 256, 16, _FLAT),
    Generation(
      "tpu7x", 2, 2307e12 / 2, int(94.75 * _GIB), 7.38e12 / 2, 100e9, 6.25e9, 3, 9216, 0, _SMALL
    ),
  )
}  # fmt: skip

_ALIASES = {
  "v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "ironwood": "tpu7x", "v7x": "tpu7x",
  "7x": "tpu7x",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice, or several: ``shape`` chips each."""

  generation: Generation
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    times = f"*{self.slices}" if self.slices > 1 else ""
    return f"{self.generation.name}:{'x'.join(map(str, self.shape))}{times}"

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def num_devices(self) -> int:
    """JAX devices: chips, or cores where a chip's cores are separate devices."""
    return self.chips * self.generation.cores

  def wraps(self, dimension: int) -> bool:
    """Whether the links of a torus dimension close to a ring."""
    if dimension >= len(self.shape):
      return False
    if self.generation.wrap:
      return self.shape[dimension] == self.generation.wrap
    return all(size % 4 == 0 for size in self.shape)

  def devices(self) -> list[Any]:
    """Compile-only devices, in JAX's order. ``pallas_kernels._aot.prepare`` comes first.

    Raises:
      UserError: libtpu is missing, or knows no such slice.
    """
    from pallas_kernels import _aot

    try:
      _aot.prepare(dump=False)
    except _aot.NoCompiler as error:
      raise UserError(str(error)) from None
    from jax.experimental import topologies

    options = dict(self.generation.options)
    if self.slices > 1:
      options["num_slices"] = self.slices
    if math.prod(self.shape) == 1:  # less than libtpu's default host of 2x2 chips
      options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{self.generation.name}:{'x'.join(map(str, self.shape))}"
    try:
      found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except RuntimeError as error:
      raise UserError(f"the installed libtpu cannot describe {self.name!r}: {error}") from error
    return list(found)


def parse(name: str) -> Topology:
  """The slice that a name means.

  Raises:
    UserError: not written like a name, unknown generation, a shape that generation does not come
      in; with the nearest one that exists.
  """
  match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)+)(?:\*(\d+))?", name.strip().lower())
  if match is None:
    raise UserError(
      f"--topology is written GENERATION:SHAPE in chips, such as v5p:4x4x8 or v5e:16x16 "
      f"(several slices: v5e:16x16*2), got {name!r}"
    )
  kind, text, times = match[1], match[2], int(match[3] or 1)
  if kind not in GENERATIONS:
    near = nearest(kind, GENERATIONS)
    if kind in _ALIASES:
      near = f" (did you mean {_ALIASES[kind]!r}?)"
    raise UserError(f"unknown TPU generation {kind!r}{near}; known: {', '.join(GENERATIONS)}")
  generation = GENERATIONS[kind]
  shape = tuple(map(int, text.split("x")))
  if times < 1 or not _exists(generation, shape):
    near = _nearest_shapes(generation, shape)
    raise UserError(
      f"{kind} has no slice of shape {text!r}; its slices have {generation.dimensions} dimensions "
      f"and at most {generation.chips} chips; near shapes are {', '.join(near)}"
    )
  return Topology(generation, shape, times)


def _exists(generation: Generation, shape: tuple[int, ...]) -> bool:
  """Listed, or made of full 4x4x4 cubes."""
  if len(shape) != generation.dimensions or math.prod(shape) > generation.chips:
    return False
  if "x".join(map(str, shape)) in generation.shapes:
    return True
  return generation.dimensions == 3 and all(size % 4 == 0 and size > 0 for size in shape)


def _nearest_shapes(generation: Generation, shape: tuple[int, ...], count: int = 3) -> list[str]:
  """Existing shapes whose number of chips is nearest, cubes of up to 24 a side."""
  known = [tuple(map(int, s.split("x"))) for s in generation.shapes]
  if generation.dimensions == 3:
    cubes = itertools.combinations_with_replacement(range(4, 25, 4), 3)
    known += [c for c in cubes if math.prod(c) <= generation.chips]
  wanted = math.log(max(1, math.prod(shape)))
  known.sort(key=lambda s: (abs(math.log(math.prod(s)) - wanted), s))
  return ["x".join(map(str, s)) for s in known[:count]]
