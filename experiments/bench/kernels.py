# SPDX-License-Identifier: Apache-2.0
"""Every op of ``pallas_kernels``, every implementation, beside what one would pick otherwise.

Command:   python experiments/bench/kernels.py                (shapes scaled down on a CPU: minutes)
           python experiments/bench/kernels.py --preset tiny  (shows that it runs)
           python experiments/bench/kernels.py --ops linear_attention delta_rule --preset full
Expected:  linear_attention in plain XLA, T = 8,192, 8 heads of 64, forward and backward: at least
           3 times as fast as a ``lax.scan`` over tokens.

Arms of a row take turns, in an order that rotates from pass to pass; medians, as ratios to our best
implementation on this machine (1: as fast, 2: takes twice as long). Milliseconds are given on
accelerators alone. Compilation and the first call are left out. Temporary memory is the compiler's
count; on accelerators the allocator's peak is given where an arm raised it. Whatever is not
installed, not possible here, or too large for the memory is listed with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_rivals import Arm, rivals, token_scan

from jaxdec.report import Column, Table, describe, versions
from jaxdec.report.machine import memory
from jaxdec.report.plots import COLORS
from pallas_kernels._dispatch import current_target
from pallas_kernels._specs import Inputs, Spec
from pallas_kernels.static_cost import OPS
from pallas_kernels.testing import relative_rms

RESULTS = Path(__file__).parent / "results"
PASSES = ("forward", "forward + backward")
OURS = {"tpu": ("mosaic_tpu", "xla"), "gpu": ("mosaic_gpu", "xla"), "cpu": ("xla",)}
# Lengths, in which shapes are scaled down, each to no less than this.
SHRINK = {
  "block_sparse_attention": {"T": 1024},
  "linear_attention": {"T": 256},
  "delta_rule": {"T": 256},
  "tree_attention": {"S": 1024},
  "selective_scan": {"T": 256},
  "linear_cross_entropy": {"V": 4096, "T": 256},
}
SCAN_CHECK = "against a lax.scan over tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Scaling and repetition.

  Attributes:
    flops: lengths are halved until the forward pass needs no more; None: shapes as they are.
    specs: how many of an op's shapes; None: all.
    seconds: a timed sample repeats its call for about this long.
    scan_tokens: length of the comparison with a scan over tokens.
  """

  flops: float | None = None
  specs: int | None = None
  repeats: int = 7
  seconds: float = 0.1
  scan_tokens: int = 8192


PRESETS = {
  "full": Config(),
  "small": Config(flops=1e9, specs=2, repeats=5, seconds=0.0),
  "tiny": Config(flops=1e7, specs=1, repeats=1, seconds=0.0, scan_tokens=64),
}


def scaled(op: str, spec: Spec, config: Config, platform: str) -> Spec:
  """The spec with halved lengths, and float32 on a CPU, which computes little else."""
  module = importlib.import_module(f"pallas_kernels.{op}.specs")
  if platform == "cpu":
    spec = spec.replace(dtype="float32")
  floors = {n: f for n, f in SHRINK[op].items() if n in spec.sizes}
  if config.flops is not None and config.flops < 1e8:
    floors = {n: f // 4 for n, f in floors.items()}
  if "block" in spec.sizes:  # a pattern of one tile is none
    floors["T"] = max(floors["T"], 4 * spec.block)
  while config.flops is not None and module.cost(spec).flops > config.flops:
    name = max(floors, key=lambda n: spec.sizes[n] / floors[n], default=None)
    if name is None or spec.sizes[name] // 2 < floors[name]:
      break
    spec = spec.replace({name: spec.sizes[name] // 2})
  return spec


def ours(op: str, inputs: Inputs, names: Sequence[str]) -> Iterator[Arm]:
  function = getattr(importlib.import_module(f"pallas_kernels.{op}"), op)
  for name in names:
    call = functools.partial(function, implementation=name, **inputs.static)
    yield Arm(
      name,
      lambda d, others, call=call: call(**d, **others),
      inputs.differentiable,
      inputs.others,
    )


def _ones(x: jax.Array) -> Any:
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.ones_like(x)
  return np.zeros(x.shape, jax.dtypes.float0)


def _with_gradients(f: Callable[..., Any]) -> Callable[..., Any]:
  def both(differentiable, others):
    out, pullback = jax.vjp(lambda d: f(d, others), dict(differentiable))
    return out, pullback(jax.tree.map(_ones, out))

  return both


@dataclasses.dataclass
class Prepared:
  """An arm ready to be called, and what its first call told."""

  name: str
  call: Callable[[], Any]
  temp_mib: float | None = None
  peak_mib: float | None = None
  out: Any = None
  calls: int = 1
  times: list[float] = dataclasses.field(default_factory=list)


def _memory_limit(device: jax.Device) -> float:
  stats = device.memory_stats() or {}
  return 0.95 * stats.get("bytes_limit", 0) or 0.8 * (memory()["available"] or math.inf)


def _peak(device: jax.Device) -> int | None:
  return (device.memory_stats() or {}).get("peak_bytes_in_use")


class TooLarge(RuntimeError):
  """The program would not fit the machine's memory."""


def prepare(arm: Arm, backward: bool) -> Prepared:
  """Compiles, checks that it fits, and calls once."""
  if arm.torch:
    return _prepare_torch(arm, backward)
  device = jax.devices()[0]
  f = jax.jit(_with_gradients(arm.f) if backward else arm.f)
  compiled = f.lower(arm.differentiable, arm.others).compile()
  size = compiled.memory_analysis()
  needed = size.temp_size_in_bytes + size.output_size_in_bytes
  if needed > _memory_limit(device):
    raise TooLarge(f"needs {needed / 2**30:.1f} GiB beside its inputs")
  before = _peak(device)
  call = functools.partial(compiled, arm.differentiable, arm.others)
  out = jax.block_until_ready(call())
  after = _peak(device)
  raised = before is not None and after > before
  first = jax.tree.leaves(out[0] if backward else out)[0] if arm.same else None
  return Prepared(
    arm.name, call, size.temp_size_in_bytes / 2**20, after / 2**20 if raised else None, first
  )


def _prepare_torch(arm: Arm, backward: bool) -> Prepared:
  import torch

  tensors = {n: x.requires_grad_(backward) for n, x in arm.differentiable.items()}

  def call():
    out = arm.f(tensors, arm.others)
    out = out[0] if isinstance(out, tuple) else out
    if backward:
      torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out), allow_unused=True)
    torch.cuda.synchronize()
    return out

  torch.cuda.reset_peak_memory_stats()
  out = call()
  first = jnp.asarray(out.detach().float().cpu().numpy()) if arm.same else None
  return Prepared(arm.name, call, None, torch.cuda.max_memory_allocated() / 2**20, first)


def _sample(arm: Prepared) -> float:
  start = time.perf_counter()
  for _ in range(arm.calls):
    out = arm.call()
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / arm.calls


def measure(
  op: str, spec: Spec, arms: Sequence[Arm], config: Config, backward: bool, left_out: list[str]
) -> list[dict[str, Any]]:
  """One row an arm. The first that runs is the base of the ratios."""
  ready: list[Prepared] = []
  where = f"{op} {spec.name}, {PASSES[backward]}"
  for arm in arms:
    try:
      ready.append(prepare(arm, backward))
    except Exception as error:  # a rival may fail in any way; the others still count
      reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
      left_out.append(f"{where}: {arm.name}: {reason}")
  if not ready:
    return []
  for arm in ready:
    once = _sample(arm)
    arm.calls = max(1, math.ceil(config.seconds / max(once, 1e-6)))
  for turn in range(config.repeats):
    at = turn % len(ready)
    for arm in ready[at:] + ready[:at]:
      arm.times.append(_sample(arm))
  base = ready[0]
  accelerator = jax.default_backend() != "cpu"
  rows = []
  for arm in ready:
    ratios = [mine / theirs for mine, theirs in zip(arm.times, base.times)]
    comparable = arm.out is not None and base.out is not None and arm is not base
    rows.append({
      "op": op, "spec": spec.name, "sizes": dict(spec.sizes), "dtype": spec.dtype,
      "pass": PASSES[backward], "arm": arm.name, "base": base.name,
      "ratio": statistics.median(arm.times) / statistics.median(base.times),
      "ratio_range": [min(ratios), max(ratios)],
      "ms": 1e3 * statistics.median(arm.times) if accelerator else None,
      "temp_mib": arm.temp_mib, "peak_mib": arm.peak_mib,
      "difference": relative_rms(arm.out, base.out) if comparable else None,
    })  # fmt: skip
  return rows


def run(ops: Sequence[str], config: Config, tick: Callable[[str], None]) -> tuple[list, list]:
  """Rows, and what was left out."""
  platform, rows, left_out = current_target().platform, [], []
  for op in ops:
    try:
      module = importlib.import_module(f"pallas_kernels.{op}.specs")
    except ModuleNotFoundError as error:
      left_out.append(f"{op}: {error}")
      continue
    specs = [scaled(op, s, config, platform) for s in module.SPECS[: config.specs]]
    jobs = [(spec, (*OURS[platform], "reference")) for spec in specs]
    if op == "linear_attention":
      jobs.append((scan_spec(config), ("xla", "reference")))
    for spec, names in jobs:
      sizes = " ".join(f"{n}={size}" for n, size in spec.sizes.items())
      tick(f"{op} {spec.name} ({sizes}, {spec.dtype})")
      inputs = module.inputs(spec, jax.random.key(0))
      arms = list(ours(op, inputs, names))
      check = spec.name == SCAN_CHECK
      for rival in [token_scan(inputs)] if check else rivals(op, spec, inputs, platform):
        if isinstance(rival, Arm):
          arms.append(rival)
        elif f"{op}: {rival}" not in left_out:
          left_out.append(f"{op}: {rival}")
      for backward in (False, True):
        rows += measure(op, spec, arms, config, backward, left_out)
  return rows, left_out


def scan_spec(config: Config) -> Spec:
  """The shape of the expected row: plain XLA beside two scans over tokens and their autodiff."""
  sizes = dict(B=1, T=config.scan_tokens, Q=8, K=8, V=8, H=64, W=64)
  return Spec(SCAN_CHECK, sizes, dtype="float32", options={"decay": "scalar"})


def checks(rows: Sequence[dict[str, Any]], config: Config) -> dict[str, Any]:
  """The expected row, over the faster of both scans."""
  mine = [row for row in rows if row["spec"] == SCAN_CHECK and row["pass"] == PASSES[1]]
  scans = [row["ratio"] for row in mine if row["arm"] != "xla"]
  found = min(scans, default=None)
  return {SCAN_CHECK: {"tokens": config.scan_tokens, "asked": 3.0, "times_as_fast": found}}


COLUMNS = (
  Column("op", align="left"),
  Column("shape", align="left"),
  Column("pass", align="left"),
  Column("arm", align="left"),
  Column("ratio", "time / ours", ".2f"),
  Column("ratio_range", "from to", ".2f"),
  Column("ms", "ms", ".3f"),
  Column("temp_mib", "temporary MiB", ",.1f"),
  Column("peak_mib", "peak MiB", ",.0f"),
  Column("difference", "difference", ".1e"),
)


def table(rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> Table:
  def cells(row):
    sizes = " ".join(f"{n}={size}" for n, size in row["sizes"].items())
    return {**row, "shape": f"{row['spec']}: {sizes}, {row['dtype']}"}

  columns = [c for c in COLUMNS if c.key == "shape" or any(r.get(c.key) is not None for r in rows)]
  return Table(columns, [cells(row) for row in rows], "Kernels side by side", notes)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
  """Time of every arm, ours 1, forward + backward; a group of bars a shape."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = [row for row in rows if row["pass"] == PASSES[1]]
  groups = list(dict.fromkeys((row["op"], row["spec"]) for row in rows))
  names = list(dict.fromkeys(row["arm"] for row in rows))
  color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
  figure = Figure(figsize=(8, 1.5 + 0.2 * (len(rows) + len(groups))), layout="constrained", dpi=150)
  FigureCanvasAgg(figure)
  axis, place, ticks = figure.subplots(), 0.0, []
  for group in groups:
    mine = [row for row in rows if (row["op"], row["spec"]) == group]
    ticks.append((place + (len(mine) - 1) / 2, "\n".join(group)))
    for row in mine:
      label = row["arm"] if row["arm"] in color else None
      bar = axis.barh(place, row["ratio"], 0.85, color=COLORS[names.index(row["arm"]) % 8],
                      label=label if color.pop(row["arm"], None) else None)  # fmt: skip
      axis.bar_label(bar, fmt="%.2f", padding=2, fontsize=7)
      place += 1
    place += 1
  axis.set_yticks(*zip(*ticks), fontsize=7)
  axis.axvline(1.0, color="0.6", linewidth=0.8)
  axis.set_xscale("log")
  axis.margins(x=0.1, y=0.01)
  axis.invert_yaxis()
  axis.spines[["top", "right"]].set_visible(False)
  axis.set_xlabel("time of forward + backward, ours = 1 (log scale)")
  axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3)
  figure.savefig(path, format="png")


def machine_name(facts: dict[str, Any]) -> str:
  """``cpu-2-cores``, ``nvidia-h100-80gb-hbm3``, ``tpu-v5-lite``: a part of file names."""
  if facts["platform"] == "cpu":
    return f"cpu-{facts['cores']}-cores"
  return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--preset", choices=PRESETS, help="default: small on a CPU, else full")
  parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
  parser.add_argument("--flops", type=float, help="scale shapes down to this many, forward")
  parser.add_argument("--specs", type=int, help="shapes an op at most")
  parser.add_argument("--repeats", type=int, help="timed samples an arm")
  parser.add_argument("--output", type=Path, default=RESULTS)
  options = parser.parse_args()
  platform = current_target().platform
  config = PRESETS[options.preset or ("small" if platform == "cpu" else "full")]
  given = {n: getattr(options, n) for n in ("flops", "specs", "repeats")}
  config = dataclasses.replace(config, **{n: x for n, x in given.items() if x is not None})

  rows, left_out = run(options.ops, config, lambda text: print(text, flush=True))
  if not rows:
    print("nothing ran:", *left_out, sep="\n  ")
    return 1
  facts = {**describe(), "rivals": versions(("tokamax", "torch", "flash-linear-attention"))}
  name = f"kernels_{machine_name(facts)}"
  command = shlex.join(["python", "experiments/bench/kernels.py", *sys.argv[1:]])
  notes = [
    f"`{command}` on {facts['devices']} ({facts['cpu']}, {facts['cores']} cores), "
    f"jax {facts['versions']['jax']}.",
    "time / ours: medians of alternating samples, over the first arm of each group; from to: the "
    "least and the largest ratio of samples taken in one turn.",
    "difference: relative RMS of the output to that of the first arm. `reference` is a scan over "
    "tokens (recurrences), dense attention, or all logits, in float32.",
    *(f"left out: {reason}" for reason in left_out),
  ]
  result = table(rows, notes)
  options.output.mkdir(parents=True, exist_ok=True)
  (options.output / f"{name}.md").write_text(result.markdown(), encoding="utf-8")
  (options.output / f"{name}.json").write_text(
    Table((), rows, "Kernels side by side", notes).json(
      command=command,
      machine=facts,
      config=dataclasses.asdict(config),
      checks=checks(rows, config),
      left_out=left_out,
    ),
    encoding="utf-8",
  )
  plot(rows, options.output / f"{name}.png")
  print(result.markdown())
  for what, found in checks(rows, config).items():
    if found["times_as_fast"] is not None:
      print(f"linear_attention {what}: {found}")
  print(f"wrote {name}.md, .json and .png into {options.output}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
