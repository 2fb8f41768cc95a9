# SPDX-License-Identifier: Apache-2.0
"""``jaxdec distill``: options to a ``DistillConfig``, and a folder of its own for every run."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

from jaxdec.cli import configs
from jaxdec.errors import UserError


def run(config: configs.Distill, mesh: dict[str, int], lm: Any) -> int:
  """Trains, or resumes what ``work_dir`` holds; 0 also where it was stopped and saved."""
  import jax

  from jaxdec.distillation import distill, make_drafter
  from jaxdec.training.tasks.medusa2 import TARGET

  if config.work_dir is None and jax.process_count() > 1:
    raise UserError("several processes need one folder for all; give --work-dir")
  # A drafter that can't be made leaves no folder behind.
  make_drafter(settings(config, mesh, ""), lm.config)
  work_dir = config.work_dir or str(free_folder("runs", config.drafter))
  first = jax.process_index() == 0
  if first:
    print(f"run folder: {work_dir}", flush=True)
  job = settings(config, mesh, work_dir)
  done = distill(lm.model, lm.params, lm.tokenizer, job)
  if done.drafter is not None and first:
    model = config.model if config.joint is None else Path(work_dir) / TARGET
    print(
      f"{config.drafter} trained in {done.seconds:.0f} s; use it with\n"
      f"  jaxdec generate --model {model} --drafter {work_dir} --prompt ..."
    )
  return 0


def settings(config: configs.Distill, mesh: dict[str, int], work_dir: str):
  """The library's configuration."""
  from jaxdec.distillation import DistillConfig
  from jaxdec.drafting.kinds import KINDS
  from jaxdec.training import MeshConfig, OptimizerConfig, TrainerConfig

  fields = {f.name for f in dataclasses.fields(KINDS[config.drafter])}
  options: dict[str, Any] = {"num_heads": config.num_heads}
  shares = "share_head" in fields  # heads that start as the target's, and may simply read it
  if shares:
    options["share_head"] = not config.own_heads
  elif config.own_heads:
    raise UserError(
      f"{config.drafter} has no choice of heads; leave --own-heads out (medusa and hydra have)"
    )
  if config.objective is not None or shares:
    options["objective"] = config.objective or "soft"
  options |= dict(parse_option(text) for text in config.options)
  return DistillConfig(
    drafter=config.drafter, options=options, data=config.data, batch_size=config.batch_size,
    seq_len=config.seq_len, num_nodes=config.tree_nodes,
    acceptance_every=config.acceptance_every, teacher=config.teacher,
    teacher_dtype=config.teacher_dtype, joint=config.joint,
    trainer=TrainerConfig(
      work_dir=work_dir, steps=config.steps, seed=config.seed, mesh=MeshConfig(**mesh),
      checkpoint_every=config.checkpoint_every, log_every=config.log_every,
      tensorboard=config.tensorboard,
      optimizer=OptimizerConfig(
        learning_rate=config.learning_rate, warmup_steps=min(100, config.steps // 10),
        weight_decay=0.0,
      ),
    ),
  )  # fmt: skip


def parse_option(text: str) -> tuple[str, Any]:
  """``name=value``, the value as in Python (a word that is none is a string).

  Raises:
    UserError: anything without an equals sign.
  """
  name, equals, value = text.partition("=")
  if not equals or not name.isidentifier():
    raise UserError(f"--options takes NAME=VALUE, such as depth_decay=0.9, got {text!r}")
  try:
    return name, ast.literal_eval(value)
  except (SyntaxError, ValueError):
    return name, value


def free_folder(parent: str, name: str) -> Path:
  """The first of ``parent/name-001``, ``-002``, ... that doesn't exist; made here."""
  number = 1
  while True:
    folder = Path(parent) / f"{name}-{number:03d}"
    try:
      folder.mkdir(parents=True)
      return folder
    except FileExistsError:
      number += 1
