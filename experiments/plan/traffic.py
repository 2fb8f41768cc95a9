# SPDX-License-Identifier: Apache-2.0
"""What one layer of a 1B model sends over the links, by method, length and number of devices.

  python experiments/plan/traffic.py        (needs libtpu: pip install 'jaxdec[aot]'; no TPU)

Every row is a layer's forward and backward pass in ``jax.shard_map``, compiled for W v5p chips;
collectives are read from the optimised program, those in loops once a trip. The layer's own
arithmetic is compiled as plain XLA rather than as Pallas kernels, and with the least effort: that
is many times as fast, and no collective depends on it. Rows are kept in results/traffic.json as
they come; those that are there are not measured again (--redo does).
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdec.errors import UserError
from jaxdec.parallel import make_mesh
from jaxdec.parallel import sequence as sp
from jaxdec.parallel.plan import hlo, parse
from jaxdec.parallel.plan.collectives import collectives
from jaxdec.report import Column, Table
from jaxdec.report.machine import versions as installed
from pallas_kernels import target

RESULTS = pathlib.Path(__file__).parent / "results"
EFFORT = {"exec_time_optimization_effort": -1.0}
SLICES = {8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4", 64: "v5p:4x4x4"}
LENGTHS = (2**13, 2**15, 2**17, 2**19, 2**21)
HEADS, KV_HEADS, WIDTH = 16, 4, 128
METHODS = {
  "LASP-2 gather": ("linear", "gather"),
  "LASP-2 scan": ("linear", "scan"),
  "LASP-1 chain": ("linear", "chain"),
  "K/V all-gather": ("softmax", "allgather"),
  "ring attention": ("softmax", "ring"),
  "Ulysses": ("softmax", "ulysses"),
}


def program(kind: str, method: str, length: int, mesh):
  """Forward and backward pass of one layer, lowered: one batch row, bfloat16."""

  def layer(q, k, v, decay):
    if kind == "linear":
      return sp.linear_attention(q, k, v, log_decay=decay, axis_name="seq", exchange=method)[0]
    return sp.attention(q, k, v, axis_name="seq", method=method)

  spec = P(None, "seq")
  whole = jax.shard_map(
    layer, mesh=mesh, in_specs=(*(spec,) * 3, P()), out_specs=spec, check_vma=False
  )  # fmt: skip

  def both(q, k, v, decay, cotangent):
    out, pullback = jax.vjp(lambda *x: whole(*x, decay), q, k, v)
    return out, pullback(cotangent)

  kv = HEADS if kind == "linear" else KV_HEADS
  q, k = (
    jax.ShapeDtypeStruct(
      (1, length, heads, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )
    for heads in (HEADS, kv)
  )
  # An argument: decays that are constants would be summed up by the compiler, slowly.
  decay = jax.ShapeDtypeStruct((1, 1, HEADS), jnp.float32, sharding=NamedSharding(mesh, P()))
  with target("cpu"):  # plain XLA
    return jax.jit(both).trace(q, k, k, decay, q).lower(lowering_platforms=("tpu",))


def measure(name: str, length: int, ways: int, mesh) -> dict:
  row = {"method": name, "T": length, "W": ways}
  try:
    lowered = program(*METHODS[name], length, mesh)
  except UserError as error:
    return {**row, "refused": str(error)}
  compiled = lowered.compile(compiler_options=EFFORT)
  found = collectives(hlo.parse(compiled.as_text()), mesh)
  for way in ("forward", "backward"):
    mine = [c for c in found if (c.phase == "backward") == (way == "backward")]
    row[f"{way}_bytes"] = sum(c.total for c in mine)
    row[f"{way}_collectives"] = sum(c.count for c in mine)
  row["bytes"] = row["forward_bytes"] + row["backward_bytes"]
  row["kinds"] = sorted({c.kind for c in found})
  return row


def table(rows: list[dict]) -> Table:
  """Lengths down, methods across: MiB a device sends in both passes, with launches."""
  cells = {}
  for row in rows:
    text = "–"
    if "bytes" in row:
      launches = row["forward_collectives"] + row["backward_collectives"]
      text = f"{row['bytes'] / 2**20:,.2f} ({launches})"
    cells.setdefault((row["W"], row["T"]), {})[row["method"]] = text
  lines = [
    {"W": w, "T": f"{t // 1024:,}K", **dict.fromkeys(METHODS, "…"), **values}
    for (w, t), values in sorted(cells.items())
  ]
  columns = [Column("W"), Column("T"), *(Column(name) for name in METHODS)]
  return Table(
    columns, lines, title="MiB that a device sends for one layer, forward and backward (launches)",
    notes=(
      f"One row of T tokens over W v5p chips; {HEADS} heads of {WIDTH}; softmax layers have "
      f"{KV_HEADS} K/V heads in bfloat16, linear layers exchange float32 states.",
      "–: Ulysses deals whole heads, so W can be at most their number. …: not measured.",
    ),
  )  # fmt: skip


def versions() -> dict:
  return installed(("jax", "jaxlib", "libtpu"))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--ways", type=int, nargs="+", choices=SLICES, default=list(SLICES))
  parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
  parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
  parser.add_argument("--redo", action="store_true", help="measure what is there again")
  options = parser.parse_args()
  path = RESULTS / "traffic.json"
  rows = [] if options.redo or not path.exists() else json.loads(path.read_text())["rows"]
  there = {(row["W"], row["T"], row["method"]) for row in rows}
  RESULTS.mkdir(exist_ok=True)
  meshes = {w: make_mesh(seq=w, devices=parse(SLICES[w]).devices()) for w in options.ways}
  for ways, length, name in itertools.product(options.ways, options.lengths, options.methods):
    if (ways, length, name) in there:
      continue
    started = time.perf_counter()
    rows.append(measure(name, length, ways, meshes[ways]))
    print(f"{rows[-1]}  {time.perf_counter() - started:.1f} s", flush=True)
    rows.sort(key=lambda row: (row["W"], row["T"], list(METHODS).index(row["method"])))
    found = table(rows)
    command = "python experiments/plan/traffic.py"
    path.write_text(Table((), rows, found.title).json(command=command, versions=versions()))
    (RESULTS / "traffic.md").write_text(found.markdown())
  print(table(rows).markdown())


if __name__ == "__main__":
  main()
