# SPDX-License-Identifier: Apache-2.0
"""``jaxdec train``: a configuration file, changed by options, run on the devices there are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxdec.cli import configs
from jaxdec.cli.checks import mesh_axes
from jaxdec.cli.distilling import free_folder
from jaxdec.errors import UserError


def run(config: configs.Train) -> int:
  """Trains, or resumes what the run's folder holds; 130 where it was stopped and saved.

  Whoever starts it again after a preemption tells by that code that there is more to do.
  """
  from jaxdec.parallel.distributed import DistributedConfig, fail_fast, initialize

  initialize(DistributedConfig(config.coordinator, config.num_processes, config.process_id))
  with fail_fast():
    result = _in_a_folder(recipe(config), config.config).make_trainer().train()
  return 130 if result.interrupted else 0


def _in_a_folder(found: Any, source: str) -> Any:
  """The recipe with a folder of its own below ``runs``, where neither file nor option names one."""
  if found.trainer.work_dir is not None:
    return found
  import jax

  if jax.process_count() > 1:
    raise UserError(
      "a run on several processes needs --work-dir, a folder that all of them see; none was given"
    )
  file, _, preset = source.partition(":")
  folder = free_folder("runs", preset or Path(file).resolve().parent.name)
  print(f"run folder: {folder}", flush=True)
  trainer = dataclasses.replace(found.trainer, work_dir=str(folder))
  return dataclasses.replace(found, trainer=trainer)


def recipe(config: configs.Train) -> Any:
  """The file's recipe with the options in place of its own settings."""
  from jaxdec.training import MeshConfig, load_recipe
  from jaxdec.training.config import parse_window

  found = load_recipe(config.config)
  trainer: dict[str, Any] = {
    name: getattr(config, name)
    for name in ("work_dir", "steps", "seed")
    if getattr(config, name) is not None
  }
  if config.mesh is not None:
    trainer["mesh"] = MeshConfig(**mesh_axes(config.mesh))
  if config.profile is not None:
    trainer["profile"] = parse_window(config.profile)
  changes = {} if config.data is None else {"data": config.data}
  return dataclasses.replace(
    found, trainer=dataclasses.replace(found.trainer, **trainer), **changes
  )
