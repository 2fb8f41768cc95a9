# SPDX-License-Identifier: Apache-2.0
"""Distills Hydra heads from the embedded model at T = 2,048, sequences split over four devices.

Command:   python -m experiments.distill_long.run                (ten minutes on two cores)
           python -m experiments.distill_long.run --steps 5      (a quick look)
Expected:  README.md beside this file.

The first steps are repeated on one device, from the same parameters on the same data. The folder of
the run then works as ``jaxdec generate --drafter``. A finished run is read, not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

import jaxdec
from experiments.distill_long import config
from jaxdec.distillation import Corpora, DistillConfig, Distilled, distill, load_corpora
from jaxdec.parallel import make_mesh
from jaxdec.report import Column, Table, describe
from jaxdec.training import MeshConfig, read_metrics

COMPARED = 10  # steps that are repeated on one device, at least twice the steps of warm-up
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
  Column("depth", "draft", align="left"),
  Column("top1", "is the target's best token", ".3f"),
  Column("top5", "has it among its five best", ".3f"),
)


def run(job: DistillConfig, lm: Any, corpora: Corpora | None = None) -> Distilled:
  """One distillation, its teacher split as the job's mesh says.

  The mesh stays in context to the end, so that the accuracies too are measured with split
  sequences.
  """
  split = job.trainer.mesh.seq > 1
  model = lm.model.clone(sequence=config.SEQUENCE if split else None)
  with jax.set_mesh(make_mesh(**dataclasses.asdict(job.trainer.mesh))):
    return distill(model, lm.params, lm.tokenizer, job, corpora)


def on_one_device(job: DistillConfig, work_dir: str) -> DistillConfig:
  """The first steps of the same run (its learning rate is constant) with nothing split."""
  steps = min(COMPARED, job.trainer.steps)
  trainer = dataclasses.replace(job.trainer, mesh=MeshConfig(), steps=steps, work_dir=work_dir)
  return dataclasses.replace(job, trainer=trainer)


def losses(work_dir: str) -> list[float]:
  """The training loss of every step."""
  found = {row["step"]: row["loss"] for row in read_metrics(work_dir, "train")}
  return [found[step] for step in sorted(found)]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, help="other than the preset's; nothing is written")
  parser.add_argument("--work-dir", type=Path, default=Path("runs/distill_long"))
  arguments = parser.parse_args()
  job = config.tiny()
  steps = arguments.steps or job.trainer.steps
  folder = arguments.work_dir / f"{steps}-steps"
  trainer = dataclasses.replace(job.trainer, work_dir=str(folder / "split"), steps=steps)
  job = dataclasses.replace(job, trainer=trainer)
  lm = jaxdec.tiny()
  corpora = load_corpora(job.data, lm.tokenizer)
  split = run(job, lm, corpora)
  alone = on_one_device(job, str(folder / "one_device"))
  if split.drafter is None or run(alone, lm, corpora).drafter is None:
    return 130
  curve = losses(job.trainer.work_dir)
  apart = [abs(a - b) for a, b in zip(curve, losses(alone.trainer.work_dir))]
  metrics = split.result.metrics
  rows = [
    {"depth": k + 1, "top1": float(first), "top5": float(five)}
    for k, (first, five) in enumerate(zip(metrics["top1"], metrics["top5"]))
  ]
  report = Table(COLUMNS, rows, notes=(
    f"Held out, after {steps} steps of {job.batch_size} x {job.seq_len} tokens; training loss "
    f"{curve[0]:.3f} at the first step, {curve[-1]:.3f} at the last.",
    f"Against one device: losses differ by {apart[0]:.1e} at the first step, by at most "
    f"{max(apart):.1e} in the first {len(apart)}.",
  ))  # fmt: skip
  print(report.markdown())
  if arguments.steps is None:
    command = " ".join(["python -m experiments.distill_long.run", *sys.argv[1:]])
    RESULTS.mkdir(exist_ok=True)
    head = {"command": command, "machine": describe(), "held_out": metrics, "losses": curve}
    (RESULTS / "tiny.json").write_text(report.json(**head), encoding="utf-8")
    (RESULTS / "tiny.md").write_text(report.markdown(), encoding="utf-8")
  return 0


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 4)  # before the backend starts
  sys.exit(main())
