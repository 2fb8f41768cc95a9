# SPDX-License-Identifier: Apache-2.0
"""HBM of a step on rows of a million tokens, 64 v5p chips: with and without sequence parallelism.

  python experiments/plan/memory.py        (needs libtpu: pip install 'jaxdec[aot]'; no TPU)

The trainer's own step of the 1.1B-parameter hybrid in config.py, optimizer included, compiled by
the TPU compiler. Sequence-parallel: one row of 2^20 tokens over 64 chips. Without: every chip has a
row of its own, which is what data parallelism (with the state sharded over all chips) makes of 64
chips; such a program the compiler refuses, and says how much memory it would need. Rows are kept in
results/memory.json as they come; those that are there are not measured again (--redo does).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import config

from jaxdec.parallel.plan import plan
from jaxdec.report import Column, Table
from jaxdec.report.machine import versions
from jaxdec.training import MeshConfig, TrainerConfig

RESULTS = pathlib.Path(__file__).parent / "results"
TOPOLOGY, TOKENS = "v5p:4x4x4", 2**20
CASES = {
  "sequence-parallel, remat": dict(seq=64, remat="full"),
  "sequence-parallel, no remat": dict(seq=64, remat="none"),
  "whole rows, remat": dict(fsdp=64, remat="full"),
  "whole rows, no remat": dict(fsdp=64, remat="none"),
  "whole rows, remat, logits in chunks": dict(fsdp=64, remat="full", loss_chunk=2048),
  "sequence-parallel, remat, logits in chunks": dict(seq=64, remat="full", loss_chunk=2048),
}


def measure(name: str) -> dict:
  case = dict(CASES[name])
  mesh = {axis: case.pop(axis) for axis in ("seq", "fsdp") if axis in case}
  recipe = dataclasses.replace(
    config.get_config("1m"),
    trainer=TrainerConfig(mesh=MeshConfig(**mesh)),
    batch_size=mesh.get("fsdp", 1),
    **case,
  )
  found = plan(recipe, TOPOLOGY)
  m = found.memory
  return {
    "case": name, **mesh, **case, "count": found.parameters, **m.parts,
    "temporaries": m.temporaries, "needed": m.peak, "limit": m.limit, "fits": m.fits,
    "refusal": m.refusal,
  }  # fmt: skip


def table(rows: list[dict]) -> Table:
  gib = [
    {
      **row,
      "state_gib": (row["parameters"] + row["optimizer"]) / 2**30,
      "temporaries_gib": None if row["temporaries"] is None else row["temporaries"] / 2**30,
      "needed_gib": row["needed"] / 2**30,
      "limit_gib": row["limit"] / 2**30,
    }
    for row in rows
  ]  # fmt: skip
  return Table(
    (
      Column("case", "", align="left"),
      Column("state_gib", "parameters and optimizer, GiB", ".2f"),
      Column("temporaries_gib", "activations and temporaries, GiB", ".1f"),
      Column("needed_gib", "needed, GiB", ".1f"),
      Column("limit_gib", "HBM, GiB", ".1f"),
      Column("fits"),
    ),
    gib,
    title=f"A training step on rows of {TOKENS:,} tokens, one chip of {TOPOLOGY}",
    notes=("–: the compiler refused the program; needed is what its message says.",),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
  parser.add_argument("--redo", action="store_true", help="measure what is there again")
  options = parser.parse_args()
  path = RESULTS / "memory.json"
  rows = [] if options.redo or not path.exists() else json.loads(path.read_text())["rows"]
  RESULTS.mkdir(exist_ok=True)
  for name in options.cases:
    if any(row["case"] == name for row in rows):
      continue
    rows.append(measure(name))
    print(rows[-1], flush=True)
    rows.sort(key=lambda row: list(CASES).index(row["case"]))
    found = table(rows)
    path.write_text(
      Table((), rows, found.title).json(
        command="python experiments/plan/memory.py", versions=versions(("jax", "jaxlib", "libtpu"))
      )
    )
    (RESULTS / "memory.md").write_text(found.markdown())
  print(table(rows).markdown())


if __name__ == "__main__":
  main()
