# SPDX-License-Identifier: Apache-2.0
"""Lowers a recipe's step for a slice, compiles it, and reads what came out."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

from jaxdec.errors import UserError, nearest
from jaxdec.parallel.plan import hlo, memory
from jaxdec.parallel.plan.collectives import Collective, collectives
from jaxdec.parallel.plan.costs import Costs, costs
from jaxdec.parallel.plan.roofline import Roofline, dollars, roofline
from jaxdec.slices import Topology, parse

if TYPE_CHECKING:
  import jax
  from jax.sharding import Mesh

  from jaxdec.training.recipe import Recipe

STEPS = ("train", "decode")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one step needs on one slice.

  Attributes:
    collectives, costs, roofline: None where the compiler refused the program for want of memory.
    parameters: of the model. tokens: in a step, of all devices.
    cost: for a billion tokens at ``price`` a chip-hour, at the roofline's speed.
    seconds: that lowering, compiling and reading took. notes: what a reader should know.
  """

  topology: Topology
  mesh: dict[str, int]
  step: str
  parameters: int
  tokens: int
  memory: memory.Memory
  collectives: tuple[Collective, ...] | None
  costs: Costs | None
  roofline: Roofline | None
  seconds: float
  price: float | None = None
  notes: tuple[str, ...] = ()

  @property
  def cost(self) -> float | None:
    if self.price is None or self.roofline is None:
      return None
    return dollars(self.topology, 1e9 / self.roofline.tokens_per_second, self.price)


def plan(
  recipe: Recipe,
  topology: str | Topology,
  *,
  step: str = "train",
  price: float | None = None,
  batch_size: int | None = None,
  cache_length: int | None = None,
) -> Plan:
  """Compiles a recipe's step for a TPU slice.

  Args:
    recipe: the run; its mesh must have as many devices as the slice.
    topology: such as ``v5p:4x4x8``.
    step: ``train``: the trainer's step with its optimizer. ``decode``: one new token a sequence.
    price: of a chip-hour, in any currency.
    batch_size, cache_length: of ``decode``: sequences in all, and positions of the cache (defaults:
      the recipe's batch size and sequence length).

  Raises:
    UserError: libtpu is missing, unknown slice, sizes that don't divide, a mesh of another size.
  """
  if step not in STEPS:
    raise UserError(f"step={step!r}{nearest(step, STEPS)} is not one of {', '.join(STEPS)}")
  topology = parse(topology) if isinstance(topology, str) else topology
  devices = topology.devices()  # first: libtpu reads its environment once

  from jaxdec.parallel.mesh import make_mesh
  from jaxdec.parallel.plan.programs import decode_program, train_program
  from pallas_kernels import target

  started = time.perf_counter()
  mesh = make_mesh(**dataclasses.asdict(recipe.trainer.mesh), devices=devices)
  with target("tpu", generation=topology.generation.name):
    if step == "train":
      program = train_program(recipe, mesh)
    else:
      program = decode_program(
        recipe, mesh, batch_size or recipe.batch_size, cache_length or recipe.seq_len
      )
  return examine(
    program.lowered,
    program.parts,
    mesh,
    topology,
    step=step,
    tokens=program.tokens,
    model_flops=program.model_flops,
    price=price,
    started=started,
  )


def examine(
  lowered: jax.stages.Lowered,
  parts: dict[str, Any],
  mesh: Mesh,
  topology: Topology,
  *,
  step: str = "train",
  tokens: int = 0,
  model_flops: float = 0.0,
  price: float | None = None,
  started: float | None = None,
) -> Plan:
  """Compiles any program lowered for ``mesh`` and reads it.

  Args:
    parts: its abstract arguments by what they are; ``parameters`` is counted.
    tokens, model_flops: of one run, all devices.
  """
  started = time.perf_counter() if started is None else started
  limit = topology.generation.hbm
  common = dict(
    topology=topology,
    mesh=dict(mesh.shape),
    step=step,
    parameters=_count(parts.get("parameters")),
    tokens=tokens,
    price=price,
  )
  try:
    compiled = lowered.compile()
  except Exception as error:
    refusal = memory.refused(error, parts, limit)
    if refusal is None:
      raise
    spent = time.perf_counter() - started
    note = "the compiler stopped for want of memory, so collectives and times are not known"
    return Plan(
      memory=refusal, collectives=None, costs=None, roofline=None, seconds=spent,
      notes=(note,), **common,
    )  # fmt: skip
  module = hlo.parse(compiled.as_text())
  found, spent = tuple(collectives(module, mesh)), costs(module)
  notes = []
  if module.unknown_loops:
    notes.append(
      f"{len(module.unknown_loops)} loops of unknown length count as one trip: "
      f"{', '.join(module.unknown_loops)}"
    )
  if spent.unpriced:
    notes.append(f"kernels without a cost estimate count as nothing: {', '.join(spent.unpriced)}")
  return Plan(
    memory=memory.measured(compiled, parts, limit),
    collectives=found,
    costs=spent,
    roofline=roofline(spent, found, mesh, topology, tokens=tokens, model_flops=model_flops),
    seconds=time.perf_counter() - started,
    notes=tuple(notes),
    **common,
  )


def _count(tree: Any) -> int:
  import jax

  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
