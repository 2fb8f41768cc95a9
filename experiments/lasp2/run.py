# SPDX-License-Identifier: Apache-2.0
"""Every layer kind, pure and 1/4 hybrid, on split sequences and on one device, at equal steps.

Command:   python -m experiments.lasp2.run                       (half an hour on two cores)
           python -m experiments.lasp2.run --kinds gla --steps 20   (a quick look)
Expected:  README.md beside this file.

Each variant is trained with LASP-2's one all-gather of states per layer (and LASP-2H's all-gather
of keys and values in softmax layers) on four simulated devices, and for its first steps, from the
same parameters on the same data, on one device too. A finished run is read, not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.lasp2.config import KINDS, get_config
from jaxdec.report import Column, Table, describe
from jaxdec.training import MeshConfig, Recipe, read_metrics

COMPARED = 20  # steps that are repeated on one device, at least twice the steps of warm-up
RESULTS = Path(__file__).parent / "results"
# Loss after 50B tokens of SlimPajama at 1B parameters, arXiv 2502.07563 (pure, 1/4 hybrid).
PAPER = {
  "basic": (2.892, 2.824), "lightning": (2.862, 2.758), "retention": (2.867, 2.759),
  "gla": (2.845, 2.754), "softmax": (2.759, None),
}  # fmt: skip
COLUMNS = (
  Column("kind", align="left"),
  Column("pure", "pure: validation loss", ".3f"),
  Column("hybrid", "1/4 hybrid: validation loss", ".3f"),
  Column("first", "loss difference to one device: first step", ".1e"),
  Column("apart", f"largest of {COMPARED} steps", ".1e"),
  Column("pure_parameters", "parameters, pure", ",d"),
  Column("hybrid_parameters", "parameters, hybrid", ",d"),
  Column("pure_paper", "paper, 1B: pure", ".3f"),
  Column("hybrid_paper", "paper, 1B: hybrid", ".3f"),
)


def on_one_device(recipe: Recipe) -> Recipe:
  """The first steps of the same run (its learning rate is constant) with nothing split."""
  steps = min(COMPARED, recipe.trainer.steps)
  trainer = dataclasses.replace(recipe.trainer, mesh=MeshConfig(), steps=steps)
  return dataclasses.replace(recipe, trainer=trainer, sequence=None)


def train(recipe: Recipe, folder: Path) -> dict[str, Any]:
  """Trains (or resumes, or reads) a run: the loss of every step and the last evaluation."""
  settings = dataclasses.replace(recipe.trainer, work_dir=str(folder), progress=False)
  trainer = dataclasses.replace(recipe, trainer=settings).make_trainer()
  result = trainer.train()
  if result.interrupted:
    raise SystemExit(f"stopped at step {result.step}; the same command resumes")
  losses = {row["step"]: row["loss"] for row in read_metrics(folder, "train")}
  evaluation = read_metrics(folder, "eval")
  return {
    "losses": [losses[step] for step in sorted(losses)],
    "validation": evaluation[-1]["loss"] if evaluation else None,
    "parameters": sum(int(np.size(x)) for x in jax.tree.leaves(result.params)),
  }


def variant(recipe: Recipe, folder: Path, name: str) -> dict[str, Any]:
  """Both arms of a variant, and how far apart their losses are."""
  split = train(recipe, folder / f"{name}-split")
  whole = train(on_one_device(recipe), folder / f"{name}-one-device")
  apart = [abs(a - b) for a, b in zip(split["losses"], whole["losses"])]
  return {**split, "first": apart[0], "apart": max(apart)}


def table(variants: dict[str, dict[str, Any]]) -> Table:
  """One row a kind: pure beside hybrid."""
  rows = []
  for kind in dict.fromkeys(name.split("-")[1] for name in variants):
    row: dict[str, Any] = {"kind": kind}
    found = {"pure": variants.get(f"tiny-{kind}"), "hybrid": variants.get(f"tiny-{kind}-hybrid")}
    for (shape, result), paper in zip(found.items(), PAPER.get(kind, (None, None))):
      row[f"{shape}_paper"] = paper
      if result is not None:
        row[shape], row[f"{shape}_parameters"] = result["validation"], result["parameters"]
    for name in ("first", "apart"):  # the larger of pure and hybrid
      row[name] = max(result[name] for result in found.values() if result is not None)
    rows.append(row)
  first = next(iter(variants.values()))
  return Table(COLUMNS, rows, notes=(
    f"{len(first['losses'])} steps each. Differences: the larger of pure and hybrid, in nats; "
    "AdamW divides small gradients by their size, so rounding grows from step to step.",
    "Paper: LASP-2 (arXiv 2502.07563), 50B tokens of SlimPajama; other data and tokenizer, so only "
    "the order within a column compares.",
  ))  # fmt: skip


def write(variants: dict[str, dict[str, Any]], out: Path) -> None:
  """The table, and every tenth loss of each variant."""
  out.mkdir(parents=True, exist_ok=True)
  report = table(variants)
  curves = {name: [round(x, 4) for x in v["losses"][9::10]] for name, v in variants.items()}
  command = " ".join(["python -m experiments.lasp2.run", *sys.argv[1:]])
  head = {"command": command, "machine": describe(), "every_tenth_loss": curves}
  (out / "losses.json").write_text(report.json(**head), encoding="utf-8")
  (out / "losses.md").write_text(report.markdown(), encoding="utf-8")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
  parser.add_argument("--steps", type=int, help="other than the preset's")
  parser.add_argument("--work-dir", type=Path, default=Path("runs/lasp2"))
  parser.add_argument("--out", type=Path, help="folder of the results (default: results/, if all)")
  arguments = parser.parse_args()
  variants = {}
  for name in (f"tiny-{kind}{h}" for kind in arguments.kinds for h in ("", "-hybrid")):
    if name == "tiny-softmax-hybrid":
      continue
    recipe = get_config(name)
    if arguments.steps is not None:
      trainer = dataclasses.replace(recipe.trainer, steps=arguments.steps)
      recipe = dataclasses.replace(recipe, trainer=trainer)
    if jax.device_count() < recipe.trainer.mesh.seq:
      raise SystemExit(f"needs {recipe.trainer.mesh.seq} devices, there are {jax.device_count()}")
    steps = recipe.trainer.steps
    variants[name] = variant(recipe, arguments.work_dir / f"{steps}-steps", name)
    result = variants[name]
    print(
      f"{name}: validation {result['validation']:.4f}, "
      f"difference to one device {result['first']:.1e}, then at most {result['apart']:.1e}",
      flush=True,
    )  # fmt: skip
  print(table(variants).markdown())
  everything = arguments.steps is None and tuple(arguments.kinds) == KINDS
  out = arguments.out or (RESULTS if everything else None)
  if out is not None:
    write(variants, out)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 4)  # before the backend starts
  main()
