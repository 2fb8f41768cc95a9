# SPDX-License-Identifier: Apache-2.0
"""What a TPU kernel costs, read from the compiler on a machine that has no TPU.

  python -m pallas_kernels.static_cost block_sparse_attention --topology v5e --against splash
  python -m pallas_kernels.static_cost linear_attention --topology v6e --shape T=8192,N=16 --json

Compiles the op's ``mosaic_tpu`` implementation for the named TPU and prints, for every kernel, its
VMEM, spills, bundles (cycles) of the inner loops for each unit of work, and the share of the matrix
units' peak that these loops reach; for the whole call, temporary memory, the cycles of all loops,
and the roofline time of the chip. Bundles are what the program issues. Two waits are not in them:
for memory, and for the matrix units, which may take longer for a product than its issue; where they
do, their time is what counts as cycles.

Needs libtpu: ``pip install 'jaxdec[aot]'``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _aot
from pallas_kernels._specs import Cost, Inner, Spec
from pallas_kernels._tpu import GENERATIONS, Chip, chip

OPS = (
  "block_sparse_attention", "linear_attention", "delta_rule", "tree_attention", "selective_scan",
  "linear_cross_entropy",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoopReport:
  """One inner loop: bundles and cycles of a trip, and multiply-adds / (cycles x peak).

  ``cycles`` is the larger of the bundles and of what the matrix units need at their peak.
  """

  unit: str
  bundles: int
  cycles: int
  bundles_per_unit: float
  matrix_unit: float
  trips: int


@dataclasses.dataclass(frozen=True)
class KernelReport:
  """One compiled kernel. ``spills`` counts spilled and refilled registers in the program text."""

  name: str
  backward: bool
  bundles: int
  vmem_bytes: int
  smem_bytes: int
  spills: int
  loops: tuple[LoopReport, ...]

  @property
  def cycles(self) -> int:
    """Cycles times trips of all described loops."""
    return sum(loop.cycles * loop.trips for loop in self.loops)


@dataclasses.dataclass(frozen=True)
class Report:
  """One op at one shape on one core of one generation; times in seconds."""

  op: str
  spec: str
  sizes: Mapping[str, int]
  dtype: str
  topology: str
  kernels: tuple[KernelReport, ...]
  flops: int
  bytes: int
  temp_bytes: int
  roofline_seconds: float
  cycle_seconds: float
  against: tuple[KernelReport, ...] = ()


def analyse(
  op: str, topology: str, spec: Spec | str | None = None, *, backward: bool = True
) -> Report:
  """Compiles ``op`` at ``spec`` for ``topology`` and reads its cost.

  Args:
    op: name of an op. topology: ``v4``, ``v5e``, ``v5p``, ``v6e`` or ``tpu7x``.
    spec: a ``Spec``, the name of one of the op's ``SPECS``, or None for the first.
    backward: compile the gradients too (their program also contains the forward kernels).

  Raises:
    NoCompiler: libtpu is missing. ValueError: unknown op, topology or spec.
    Unsupported: the kernel can't run at this shape on this generation; says why.
  """
  _aot.prepare()  # before anything starts a backend: libtpu reads its environment once
  on, module = chip(topology), specs_of(op)
  spec = spec if isinstance(spec, Spec) else spec_of(op, spec)
  inner = module.inner_loops(spec, on)
  f, arguments = program(op, spec)
  compiled = _aot.compile_for(on, f, arguments)
  kernels = [kernel_report(s, inner, on, backward=False) for s in _aot.schedules(compiled)]
  if backward:
    both = _aot.compile_for(on, with_gradients(f), arguments)
    forward_names = {_stem(k.name) for k in kernels}
    kernels += [
      kernel_report(s, inner, on, backward=True)
      for s in _aot.schedules(both)
      if _stem(s.name) not in forward_names
    ]
    compiled = both
  cost: Cost = module.cost(spec)
  forward = [k for k in kernels if not k.backward]
  return Report(
    op=op,
    spec=spec.name,
    sizes=dict(spec.sizes),
    dtype=spec.dtype,
    topology=on.name,
    kernels=tuple(kernels),
    flops=cost.flops,
    bytes=cost.bytes,
    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
    roofline_seconds=max(
      cost.flops / (2 * on.macs_per_cycle * on.clock_hz), cost.bytes / on.hbm_bytes_per_second
    ),
    cycle_seconds=sum(k.cycles for k in forward) / on.clock_hz,
  )


def missing() -> str | None:
  """None where kernels can be compiled for TPUs on this machine, else what to install."""
  return None if _aot.available() else _aot.MISSING


def splash(spec: Spec, on: Chip, *, backward: bool = True) -> tuple[KernelReport, ...]:
  """jax's splash attention at the same shape and block size, causal: its grid loop is its unit.

  All predicated regions of a grid step are counted, and a step is one (query block x key block).
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  block = spec.block
  mask = masks.MultiHeadMask([masks.CausalMask((spec.T, spec.T)) for _ in range(spec.N)])
  sizes = kernel.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
    block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
  )  # fmt: skip
  f = jax.vmap(kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1))
  x = jax.ShapeDtypeStruct((spec.B, spec.N, spec.T, spec.H), jnp.dtype(spec.dtype))
  tiles = (spec.T // block) * (spec.T // block + 1) // 2 * spec.B * spec.N
  macs = 2 * block * block * spec.H

  def read(program, backward, products):
    found = _aot.schedules(_aot.compile_for(on, program, x, x, x))
    inner = [Inner("splash", (0,), "query block x key block", 1, macs * products // 2, tiles)]
    return [kernel_report(s, inner, on, backward=backward) for s in found]

  reports = read(f, False, 2)
  if backward:
    both = read(lambda q, k, v: jax.vjp(f, q, k, v)[1](q), True, 5)
    reports += [k for k in both if "dkv" in k.name]
  return tuple(reports)


_AGAINST: dict[str, dict[str, Callable[..., tuple[KernelReport, ...]]]] = {
  "block_sparse_attention": {"splash": splash},
}


def specs_of(op: str) -> Any:
  """The ``specs`` module of an op."""
  if op not in OPS:
    raise ValueError(f"unknown op {op!r}; use one of {', '.join(OPS)}.")
  return importlib.import_module(f"pallas_kernels.{op}.specs")


def spec_of(op: str, name: str | None = None) -> Spec:
  """A shape of an op by its name; None: the first."""
  known = {spec.name: spec for spec in specs_of(op).SPECS}
  if name is None:
    return next(iter(known.values()))
  if name not in known:
    raise ValueError(f"{op} has no spec {name!r}; it has {', '.join(known)}.")
  return known[name]


def program(
  op: str, spec: Spec, implementation: str = "mosaic_tpu"
) -> tuple[Callable[..., Any], Any]:
  """``f((differentiable, others))`` and its abstract arguments."""
  function = getattr(importlib.import_module(f"pallas_kernels.{op}"), op)
  make, static = specs_of(op).inputs, {}

  def arrays(key):
    inputs = make(spec, key)
    static.update(inputs.static)
    return dict(inputs.differentiable), dict(inputs.others)

  arguments = jax.eval_shape(arrays, jax.random.key(0))

  def f(arguments):
    differentiable, others = arguments
    return function(**differentiable, **others, **static, implementation=implementation)

  return f, arguments


def with_gradients(f: Callable[..., Any]) -> Callable[..., Any]:
  """``program``'s function together with the gradients of its differentiable inputs."""

  def both(arguments):
    differentiable, others = arguments
    out, pullback = jax.vjp(lambda d: f((d, others)), differentiable)
    return out, pullback(jax.tree.map(jnp.ones_like, out))

  return both


def _stem(name: str) -> str:
  return name.split(".")[0]


def kernel_report(
  schedule: _aot.Schedule, inner: Sequence[Inner], on: Chip, *, backward: bool
) -> KernelReport:
  """What a schedule says of the loops that an op describes, those of one trip left out."""
  loops = []
  described = [x for x in inner if schedule.name.startswith(x.kernel)]
  for x in described:
    try:
      loop = schedule.find(*x.loop)
    except IndexError:  # of one trip only: the compiler took it apart
      continue
    has_inner = any(
      len(y.loop) > len(x.loop) and y.loop[: len(x.loop)] == x.loop for y in described
    )
    bundles = loop.own if has_inner else loop.bundles
    cycles = max(bundles, -(-x.macs_per_trip // on.macs_per_cycle))
    loops.append(
      LoopReport(
        unit=x.unit,
        bundles=bundles,
        cycles=cycles,
        bundles_per_unit=bundles / x.units_per_trip,
        matrix_unit=x.macs_per_trip / (cycles * on.macs_per_cycle),
        trips=x.trips,
      )
    )
  return KernelReport(
    name=schedule.name,
    backward=backward,
    bundles=schedule.bundles,
    vmem_bytes=schedule.vmem_bytes,
    smem_bytes=schedule.smem_bytes,
    spills=schedule.slots.get("VSTORE:SPILL", 0) + schedule.slots.get("VLOAD:FILL", 0),
    loops=tuple(loops),
  )


def render(report: Report) -> str:
  """The report as text."""
  sizes = " ".join(f"{k}={v}" for k, v in report.sizes.items())
  lines = [f"{report.op} {report.spec} ({sizes}, {report.dtype}) on {report.topology}, one core"]
  for kernel in report.kernels + report.against:
    way = "backward" if kernel.backward else "forward"
    lines.append(
      f"  {kernel.name} ({way}): {kernel.bundles} bundles, spills {kernel.spills},"
      f" VMEM {kernel.vmem_bytes / 2**20:.2f} MiB, SMEM {kernel.smem_bytes / 2**10:.1f} KiB"
    )
    for loop in kernel.loops:
      lines.append(
        f"    {loop.bundles_per_unit:9.1f} bundles per {loop.unit}"
        f" ({loop.bundles} a trip, {loop.trips} trips, matrix unit {loop.matrix_unit:.0%})"
      )
  for backward in (False, True):
    ours, theirs = (
      _main_loop([k for k in ks if k.backward == backward])
      for ks in (report.kernels, report.against)
    )
    if ours and theirs:
      way = "backward" if backward else "forward"
      ratio = ours.bundles_per_unit / theirs.bundles_per_unit
      lines.append(f"  {way}: {ratio:.2f} of the bundles per {ours.unit}")
  lines.append(
    f"  program: {report.temp_bytes / 2**20:.1f} MiB temporary; forward {report.flops:.3g} FLOP,"
    f" {report.bytes / 2**20:.1f} MiB to move: roofline {report.roofline_seconds * 1e6:.1f} us;"
    f" loops' cycles {report.cycle_seconds * 1e6:.1f} us"
  )
  return "\n".join(lines)


def _main_loop(kernels: Sequence[KernelReport]) -> LoopReport | None:
  """The loop that takes most of the cycles."""
  loops = [loop for kernel in kernels for loop in kernel.loops]
  return max(loops, key=lambda x: x.cycles * x.trips, default=None)


def _sizes(text: str) -> dict[str, int]:
  try:
    return {k.strip(): int(v) for k, v in (pair.split("=") for pair in text.split(","))}
  except ValueError:
    raise ValueError(f"--shape is a list like B=1,T=4096, got {text!r}.") from None


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.static_cost",
    description="What an op's TPU kernels cost, read from the compiler on a machine without a TPU.",
  )
  parser.add_argument("op", choices=OPS)
  parser.add_argument(
    "--topology", nargs="+", choices=GENERATIONS, default=["v5e"], help="TPU generations"
  )
  parser.add_argument("--spec", help="name of a shape in the op's specs.py; default: the first")
  parser.add_argument("--shape", help="sizes to change, like B=1,T=4096,N=8")
  parser.add_argument("--dtype", help="dtype of the inputs")
  parser.add_argument("--forward-only", action="store_true", help="leave the gradients out")
  parser.add_argument("--against", help="another kernel to compare with, e.g. splash")
  parser.add_argument("--json", action="store_true", help="print JSON")
  options = parser.parse_args(arguments)
  try:
    spec = spec_of(options.op, options.spec)
    if options.shape:
      spec = spec.replace(_sizes(options.shape), name="custom")
    if options.dtype:
      spec = spec.replace(dtype=str(jnp.dtype(options.dtype)))
    known = _AGAINST.get(options.op, {})
    if options.against and options.against not in known:
      raise ValueError(
        f"nothing called {options.against!r} to compare {options.op} with; "
        f"known: {', '.join(known) or 'none'}."
      )
    reports = []
    for topology in options.topology:
      report = analyse(options.op, topology, spec, backward=not options.forward_only)
      if options.against:
        theirs = known[options.against](spec, chip(topology), backward=not options.forward_only)
        report = dataclasses.replace(report, against=theirs)
      reports.append(report)
      if not options.json:
        print(render(report))
    if options.json:
      print(json.dumps([dataclasses.asdict(r) for r in reports], indent=2))
  except (_aot.NoCompiler, ValueError, NotImplementedError, TypeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
