# SPDX-License-Identifier: Apache-2.0
"""Costs of the TPU kernels, from the compiler, on a machine without a TPU.

Command:  python experiments/static_cost/run.py            (10 to 20 minutes on two CPU cores)
Needs:    pip install 'jaxdec[aot]'
Expected: results/tables.md and results/results.json beside this file; see README.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax

from jaxdec.report import machine
from jaxdec.report.tables import Column, Table
from pallas_kernels import _aot, static_cost
from pallas_kernels._tpu import chip
from pallas_kernels.block_sparse_attention import _tpu_cost

HERE = pathlib.Path(__file__).parent
CHIPS = ("v5e", "v5p", "v6e")
RECURRENCES = ("linear_attention", "delta_rule")
PASSES = ("forward", "backward")
LAYOUTS = {"linear_attention": ("[B,T,N,H]", "[B,T,N*H]"), "delta_rule": ("[B,T,N,H]",)}


def _schedules(op: str, spec: Any, on: Any, backward: bool) -> list[_aot.Schedule]:
  f, arguments = static_cost.program(op, spec)
  program = static_cost.with_gradients(f) if backward else f
  return _aot.schedules(_aot.compile_for(on, program, arguments))


def against_splash(chips: tuple[str, ...]) -> list[dict]:
  """Bundles for each tile of a dense causal call, T = 4,096, beside splash attention's grid loop.

  ``inner loop``: of the loop over full tiles. ``whole call``: all loops times their trips, and what
  rows and grid steps cost, over the tiles.
  """
  rows = []
  for name in chips:
    on = chip(name)
    for block in (128, 512):
      spec = _dense(block)
      splash = static_cost.splash(spec, on)
      for way, schedule in enumerate(_both(spec, on)):
        theirs = next(k for k in splash if k.backward == bool(way)).loops[0].bundles
        trips = _tpu_cost.call_trips(spec, on)[way]
        whole = _tpu_cost.cycles(schedule, trips) / trips.tiles
        inner = _inner_bundles(spec, on, schedule)
        rows.append({
          "chip": name, "block": block, "pass": PASSES[way], "splash": theirs,
          "inner loop": round(inner, 1), "whole call": round(whole, 1),
          "inner / splash": round(inner / theirs, 2), "call / splash": round(whole / theirs, 2),
        })  # fmt: skip
        print(rows[-1], flush=True)
  return rows


def sparsity(chips: tuple[str, ...]) -> list[dict]:
  """Cost of a call that lists a tenth of the causal tiles, over that of the dense call.

  The diagonal is always listed, so short sequences can't be this sparse. Loops are those of the
  program compiled at T = 32,768; only how often they run depends on the length.
  """
  rows = []
  for name in chips:
    on = chip(name)
    for block in (128, 512):
      for way, schedule in enumerate(_both(_dense(block, 32768), on)):
        row = {"chip": name, "block": block, "pass": PASSES[way]}
        for length in (8192, 16384, 32768, 65536):
          spec = _dense(block, length)
          cost = [
            _tpu_cost.cycles(schedule, _tpu_cost.call_trips(spec, on, density)[way])
            for density in (0.1, 1.0)
          ]
          row[f"T = {length:,}"] = round(cost[0] / cost[1], 3)
        rows.append(row)
        print(row, flush=True)
  return rows


def _dense(block: int, length: int = 4096) -> Any:
  spec = static_cost.spec_of("block_sparse_attention", "dense")
  return spec.replace({"block": block, "T": length})


def _both(spec: Any, on: Any) -> list[_aot.Schedule]:
  """The forward and the backward kernel."""
  found = _schedules("block_sparse_attention", spec, on, True)
  names = (_tpu_cost.FORWARD, _tpu_cost.BACKWARD)
  return [next(s for s in found if s.name.startswith(name)) for name in names]


def _inner_bundles(spec: Any, on: Any, schedule: _aot.Schedule) -> float:
  loops = _tpu_cost.inner_loops(spec, on)
  report = static_cost.kernel_report(schedule, loops, on, backward=False)
  return max(report.loops, key=lambda x: x.bundles * x.trips).bundles_per_unit


def utilisation(chips: tuple[str, ...]) -> list[dict]:
  """Multiply-adds / (bundles x peak) of the loops of the recurrent ops."""
  rows = []
  for op in RECURRENCES:
    for spec in importlib.import_module(f"pallas_kernels.{op}.specs").SPECS:
      if spec.dtype != "bfloat16" or spec.T > 8192:
        continue
      for name in chips:
        report = static_cost.analyse(op, name, spec)
        for kernel in report.kernels:
          for loop in kernel.loops:
            rows.append({
              "op": op, "shape": spec.name, "chip": name, "kernel": kernel.name.split(".")[0],
              "bundles per chunk": round(loop.bundles_per_unit, 1),
              "matrix unit": f"{loop.matrix_unit:.0%}", "spills": kernel.spills,
              "VMEM MiB": round(kernel.vmem_bytes / 2**20, 2),
            })  # fmt: skip
            print(rows[-1], flush=True)
  return rows


def memory(name: str = "v5p") -> list[dict]:
  """Temporary bytes of forward + backward at T = 65,536, B N = 16, H = 128.

  Beside plain autodiff through the chunked form in XLA, which recomputes nothing.
  ``[B,T,N*H]``: q, k, v and their gradients as a model's projections have them; from ``[B,T,N,H]``
  in memory a TPU must first move the heads out of the way, and linear attention's kernels pay it.
  """
  rows = []
  for op in RECURRENCES:
    spec = next(s for s in static_cost.specs_of(op).SPECS if s.T == 65536 and s.H == 128)
    for layout in LAYOUTS[op]:
      sizes = {}
      for arm in ("autodiff", "xla", "mosaic_tpu"):
        f, arguments = _arm(op, spec, arm)
        if layout == "[B,T,N*H]":
          f, arguments = _flat(f, arguments)
        compiled = _aot.compile_for(name, static_cost.with_gradients(f), arguments)
        sizes[arm] = compiled.memory_analysis().temp_size_in_bytes
      for arm in ("xla", "mosaic_tpu"):
        rows.append({
          "op": op, "arguments": layout, "implementation": arm,
          "temporary MiB": round(sizes[arm] / 2**20),
          "autodiff MiB": round(sizes["autodiff"] / 2**20),
          "share": round(sizes[arm] / sizes["autodiff"], 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
  return rows


def _flat(f: Callable, arguments: Any) -> tuple[Callable, Any]:
  """The same program of q, k, v ``[B,T,N*H]``."""
  differentiable, others = arguments
  heads = {name: x.shape[2:] for name, x in differentiable.items() if name in ("q", "k", "v")}

  def reshaped(x, shape):
    return jax.ShapeDtypeStruct((*x.shape[:2], *shape), x.dtype)

  flat = {n: reshaped(differentiable[n], (h[0] * h[1],)) for n, h in heads.items()}

  def run(arguments):
    whole = dict(arguments[0])
    for n, h in heads.items():
      whole[n] = whole[n].reshape(*whole[n].shape[:2], *h)
    out, state = f((whole, arguments[1]))
    return out.reshape(*out.shape[:2], -1), state

  return run, ({**differentiable, **flat}, others)


def _arm(op: str, spec: Any, arm: str) -> tuple[Callable, Any]:
  """``mosaic_tpu``, ``xla``, or ``autodiff``: XLA's forward pass without its own gradients."""
  f, arguments = static_cost.program(
    op, spec, implementation="mosaic_tpu" if arm == "mosaic_tpu" else "xla"
  )
  if arm != "autodiff":
    return f, arguments
  backend = importlib.import_module(f"pallas_kernels.{op}.xla")

  def plain(arguments):
    ours = getattr(backend, op)
    try:
      setattr(backend, op, _PLAIN[op])
      return f(arguments)
    finally:
      setattr(backend, op, ours)

  return plain, arguments


def _plain_linear_attention(*arrays, chunk_size=None, config=None, **static):
  from pallas_kernels.linear_attention import xla

  return xla._chunked(*arrays, **static)


def _plain_delta_rule(*arrays, config=None, **static):
  from pallas_kernels.delta_rule import xla

  return xla._autodiff(*arrays, **static)


_PLAIN = {"linear_attention": _plain_linear_attention, "delta_rule": _plain_delta_rule}


TABLES: dict[str, tuple[str, Callable[[tuple[str, ...]], list[dict]]]] = {
  "splash": ("Block-sparse attention against splash attention, dense causal", against_splash),
  "sparsity": ("Block-sparse attention, 90 % of the causal tiles skipped, over dense", sparsity),
  "memory": (
    "Temporary memory of forward + backward, T = 65,536, B N = 16, H = 128, on v5p",
    lambda chips: memory(),
  ),
  "utilisation": ("Matrix units in the recurrences", utilisation),
}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chips", nargs="+", default=list(CHIPS))
  parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
  parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
  options = parser.parse_args()
  try:
    _aot.prepare()
  except _aot.NoCompiler as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  chips = tuple(options.chips)
  options.out.mkdir(parents=True, exist_ok=True)
  results = options.out / "results.json"
  tables = json.loads(results.read_text())["tables"] if results.exists() else {}
  for name in options.tables:
    tables[TABLES[name][0]] = TABLES[name][1](chips)
  about = {"machine": machine.describe(), "libtpu": version("libtpu"), "chips": chips}
  results.write_text(json.dumps({**about, "tables": tables}, indent=1) + "\n")
  text = [f"`python experiments/static_cost/run.py`, libtpu {about['libtpu']}\n"]
  for title in (title for title, _ in TABLES.values() if title in tables):
    rows = tables[title]
    columns = [
      Column(k, align="left" if isinstance(v, str) else "right") for k, v in rows[0].items()
    ]
    text.append(Table(columns, rows, title).markdown())
  (options.out / "tables.md").write_text("\n".join(text))
  return 0


if __name__ == "__main__":
  sys.exit(main())
