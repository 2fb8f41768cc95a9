# SPDX-License-Identifier: Apache-2.0
"""What a run will need, before any chip is rented: the real step, compiled for a TPU slice.

  plan = jaxdec.parallel.plan.plan(recipe, "v5p:4x4x8", price=4.2)
  print(plan.memory.verdict, plan.roofline.tokens_per_second)

The trainer's own step (or a decoding step) is lowered for compile-only devices and compiled by the
TPU compiler itself, so memory, fusions and collectives are those of the chip; only times are a
model (see ``roofline``). Needs libtpu: ``pip install 'jaxdec[aot]'``.
"""

from __future__ import annotations

from jaxdec.parallel.plan.collectives import Collective
from jaxdec.parallel.plan.costs import Costs
from jaxdec.parallel.plan.memory import Memory
from jaxdec.parallel.plan.planner import Plan, examine, plan
from jaxdec.parallel.plan.roofline import Roofline
from jaxdec.slices import GENERATIONS, Topology, parse

__all__ = [
  "GENERATIONS",
  "Collective",
  "Costs",
  "Memory",
  "Plan",
  "Roofline",
  "Topology",
  "examine",
  "parse",
  "plan",
]
