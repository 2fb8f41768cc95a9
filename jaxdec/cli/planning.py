# SPDX-License-Identifier: Apache-2.0
"""``jaxdec plan``: a configuration file, changed by options, compiled for a slice and reported."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxdec.cli import configs
from jaxdec.cli.checks import mesh_axes
from jaxdec.errors import UserError

_ROWS = 20  # of collectives on the terminal


def run(config: configs.Plan, console: Any) -> int:
  """0 where the step fits in memory, 1 where it doesn't."""
  from jaxdec.parallel.plan import parse, plan, report
  from jaxdec.report import plain

  if config.step != "decode" and config.cache_length is not None:
    raise UserError("--cache-length belongs to --step decode; a train step has no cache")
  topology = parse(config.topology)
  topology.devices()  # before anything starts a backend: libtpu reads its environment once
  with console.status(f"compiling for {topology.name}"):
    found = plan(
      recipe(config), topology, step=config.step, price=config.price,
      batch_size=config.batch_size, cache_length=config.cache_length,
    )  # fmt: skip
  if config.json:
    print(json.dumps(plain(report.to_json(found)), indent=2, allow_nan=False))
  else:
    for table in report.tables(found, rows=_ROWS):
      console.print(table.rich())
      for note in table.notes:
        console.print(note, style="dim")
      console.print()
    for line in report.summary(found):
      console.print(line, markup=False)
  return 0 if found.memory.fits else 1


def recipe(config: configs.Plan) -> Any:
  """The file's recipe with the options in place of its own settings."""
  from jaxdec.training import MeshConfig, load_recipe

  found = load_recipe(config.config)
  changes = {
    name: getattr(config, name)
    for name in ("batch_size", "seq_len")
    if getattr(config, name) is not None
  }
  if config.mesh is not None:
    mesh = MeshConfig(**mesh_axes(config.mesh))
    changes["trainer"] = dataclasses.replace(found.trainer, mesh=mesh)
  return dataclasses.replace(found, **changes)
