# SPDX-License-Identifier: Apache-2.0
"""What one step of the long distillation needs on a TPU slice that is not there.

Command:   python -m experiments.distill_long.plan --topology v5p:2x2x4    (16 chips; needs libtpu)
Expected:  README.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

from experiments.distill_long import config
from jaxdec.distillation import DistillConfig, make_drafter
from jaxdec.parallel import make_mesh
from jaxdec.parallel.plan import parse, report
from jaxdec.parallel.plan.planner import Plan, examine
from jaxdec.training import Recipe, Trainer
from jaxdec.training.tasks.distill import Distill

RESULTS = Path(__file__).parent / "results"


class Planned(Distill):
  """Distillation from a teacher of which only the shapes are known."""

  def __init__(self, drafter: Any, model: Any, abstract: Any):
    self.drafter, self.model = drafter, model
    self._target_params, self._fingerprint = abstract, {"weights": None}


def plan(teacher: Recipe, job: DistillConfig, name: str) -> Plan:
  """Compiles the distillation step for the slice ``name``.

  Raises:
    UserError: libtpu is missing, unknown slice, or a mesh of another size.
  """
  from pallas_kernels import target

  topology = parse(name)
  devices = topology.devices()  # first: libtpu reads its environment once
  mesh = make_mesh(**dataclasses.asdict(job.trainer.mesh), devices=devices)
  with target("tpu", generation=topology.generation.name):
    abstract = jax.eval_shape(teacher.task().init, jax.random.key(0))
    task = Planned(make_drafter(job, teacher.model), teacher.decoder(), abstract)
    trainer = Trainer(task, job.trainer, mesh=mesh)
    lowered = trainer.lower(teacher.batch(), platform="tpu")
  params = trainer.abstract.params
  tokens = job.batch_size * job.seq_len
  parts = {"heads": params, "optimizer": trainer.abstract.optimizer, "parameters": abstract}
  flops = task.flops_per_token(params, job.seq_len) * tokens
  return examine(lowered, parts, mesh, topology, tokens=tokens, model_flops=flops)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v5p:2x2x4")
  arguments = parser.parse_args()
  found = plan(*config.long(), arguments.topology)
  lines = [table.markdown() for table in report.tables(found, rows=20)]
  text = "\n".join([*lines, *(f"{line}  " for line in report.summary(found))]) + "\n"
  print(text)
  RESULTS.mkdir(exist_ok=True)
  name = arguments.topology.replace(":", "-")
  (RESULTS / f"plan-{name}.md").write_text(text, encoding="utf-8")
  return 0 if found.memory.fits else 1


if __name__ == "__main__":
  sys.exit(main())
