# SPDX-License-Identifier: Apache-2.0
"""``jaxdec train``: a configuration file, changed by options, run on the devices there are."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxdec.cli import configs
from jaxdec.cli.checks import mesh_axes


def run(config: configs.Train) -> int:
  """Trains, or resumes what the run's folder holds; 130 where it was stopped and saved.

  Whoever starts it again after a preemption tells by that code that there is more to do.
  """
  from jaxdec.parallel.distributed import DistributedConfig, fail_fast, initialize

  initialize(DistributedConfig(config.coordinator, config.num_processes, config.process_id))
  with fail_fast():
    result = recipe(config).make_trainer().train()
  return 130 if result.interrupted else 0


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
