# SPDX-License-Identifier: Apache-2.0
"""Compile for a TPU that is not here, and read the schedule the compiler made.

A TPU core issues one VLIW bundle a cycle in an order fixed at compile time, so the bundles of a
loop body times its trips are a repeatable, noise-free cost. Waits are not in it: for memory, and
for matrix units that are at their peak (see ``static_cost``).

Needs libtpu (``pip install 'jaxdec[aot]'``), which reads its environment once, when first loaded:
call ``prepare`` before anything else of this module, in a process that uses no TPU.
"""

from __future__ import annotations

import atexit
import dataclasses
import glob
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels._dispatch import target
from pallas_kernels._tpu import Chip, chip

_ready = False
_dump: pathlib.Path | None = None
_COMPILE_ONLY = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

MISSING = (
  "compiling for a TPU needs libtpu, which is not installed here; run: pip install 'jaxdec[aot]'"
)


class NoCompiler(RuntimeError):
  """libtpu is not installed."""


def available() -> bool:
  return importlib.util.find_spec("libtpu") is not None


def prepare(*, dump: bool = True) -> pathlib.Path | None:
  """Sets libtpu up for compiling only. The first call in a process decides.

  Args:
    dump: have the schedules of kernels written to a temporary folder, for ``schedules``; compiling
      is several times slower with it.

  Returns:
    The folder, or None without ``dump``.

  Raises:
    NoCompiler: libtpu is not installed.
  """
  global _dump, _ready
  if not available():
    raise NoCompiler(MISSING)
  if _ready:
    return _dump
  _ready = True
  for name, value in _COMPILE_ONLY.items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")
  if dump:
    _dump = pathlib.Path(tempfile.mkdtemp(prefix="tpu_schedules_"))
    atexit.register(shutil.rmtree, _dump, ignore_errors=True)
    flags = f"--xla_jf_dump_to={_dump} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
  return _dump


def compile_for(on: Chip | str, f: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
  """Compiles ``f`` for one core's device of that generation; ``args`` are ``ShapeDtypeStruct``s."""
  prepare()
  on = chip(on) if isinstance(on, str) else on
  devices = topologies.get_topology_desc(platform="tpu", topology_name=on.topology).devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
  here = jax.sharding.NamedSharding(mesh, jax.P())
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args)
  with target("tpu", generation=on.name):
    traced = jax.jit(lambda *xs: f(*xs)).trace(*args)  # a fresh function: traced for this target
    return traced.lower(lowering_platforms=("tpu",)).compile()


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop of a kernel. ``bundles`` counts its body, inner loops once; ``own`` leaves them out."""

  depth: int
  start: int
  bundles: int
  own: int
  slots: dict[str, int]
  own_slots: dict[str, int]
  inner: tuple[Loop, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The final program of one kernel: bundles in all, by loop, and use of the units' slots.

  ``slots`` counts instructions by unit; ``VLOAD:FILL`` and ``VSTORE:SPILL`` are register spills.
  """

  name: str
  bundles: int
  capacity: dict[str, int]
  slots: dict[str, int]
  loops: tuple[Loop, ...]
  vmem_bytes: int
  smem_bytes: int

  def find(self, *path: int) -> Loop:
    """The loop at a path: ``find(0, 1)`` is the second loop inside the first."""
    loops: tuple[Loop, ...] = self.loops
    for index in path:
      loop = loops[index]
      loops = loop.inner
    return loop


def schedules(compiled: jax.stages.Compiled) -> list[Schedule]:
  """The schedules of the Pallas kernels of a program just compiled, in program order.

  Call it right after ``compile_for``: it reads what was written since the last call, and deletes it
  (hundreds of files a kernel).
  """
  folder = prepare()
  if folder is None:
    raise RuntimeError("schedules: this process was prepared with dump=False.")
  kernels = re.findall(
    r"%?([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", compiled.as_text()
  )
  found: list[Schedule] = []
  for kernel in dict.fromkeys(kernels):
    stem = f"*-{glob.escape(kernel)}-[0-9]*-"
    final = sorted(folder.glob(stem + "final_bundles.txt"))
    units = sorted(folder.glob(stem + "final_hlo-static-per-bundle-utilization.txt"))
    placed = sorted(folder.glob(stem + "post-delay-converter.txt"))
    if final and units and placed:
      texts = (x[-1].read_text() for x in (final, units, placed))
      found.append(_schedule(_own_name(kernel), *texts))
  for path in folder.glob("*"):
    path.unlink()
  return found


def _own_name(name: str) -> str:
  """A kernel's own name, without what it was transformed by: ``transpose_jvp_f__.1`` is ``f.1``."""
  stem, dot, number = name.partition(".")
  while wrapped := re.fullmatch(r"(?:jvp|transpose|vmap)_(.+)_", stem):
    stem = wrapped[1]
  return stem + dot + number


_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?:?\s*((?:>\s*)*)\{(\})?")


_PLACED = re.compile(r"space=(\w+), size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+)")


def _schedule(name: str, bundles: str, units: str, placed: str) -> Schedule:
  marks: list[tuple[str | None, int]] = []
  for m in map(_BUNDLE.match, bundles.splitlines()):
    if m and m[3] == "}":  # an empty bundle carries no mark: a wait inside the loop it follows
      marks.append((m[1], marks[-1][1] if marks else 0))
    elif m:
      marks.append((m[1], m[2].count(">")))
  header, rows = units.split("== UTILIZATION:\n")
  names, capacity = header.splitlines()[1:3]
  names = [n.strip() for n in names.split(",")]
  use = np.array([list(map(int, r.split())) for r in rows.splitlines() if re.match(r"[\d ]+$", r)])
  use = use[: len(marks)]

  def total(rows) -> dict[str, int]:
    return dict(
      zip(names, map(int, use[list(rows)].sum(axis=0)) if len(rows) else [0] * len(names))
    )

  def loops(first: int, last: int, depth: int) -> tuple[Loop, ...]:
    found, i = [], first
    while i < last:
      if marks[i][1] < depth:
        i += 1
        continue
      j = i + 1
      while (
        j < last and marks[j][1] >= depth and not (marks[j][0] == "LB" and marks[j][1] == depth)
      ):
        j += 1
      if marks[i][0] != "LB" and found:  # bundles in the shadow of a branch: the loop goes on
        i = found.pop().start
      inner = loops(i, j, depth + 1)
      own = [r for r in range(i, j) if marks[r][1] == depth]
      found.append(Loop(depth, i, j - i, len(own), total(range(i, j)), total(own), inner))
      i = j
    return tuple(found)

  memory: dict[str, int] = {}
  for space, size, offset in _PLACED.findall(placed):
    memory[space] = max(memory.get(space, 0), int(size, 0) + int(offset, 0))

  return Schedule(
    name=name,
    bundles=len(marks),
    capacity=dict(zip(names, map(int, capacity.split()))),
    slots=total(range(len(marks))),
    loops=loops(0, len(marks), 1),
    vmem_bytes=memory.get("vmem", 0),
    smem_bytes=memory.get("smem", 0),
  )
