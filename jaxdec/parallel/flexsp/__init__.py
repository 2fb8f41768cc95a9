# SPDX-License-Identifier: Apache-2.0
"""FlexSP: groups of devices as wide as the sequences need, chosen anew for every batch.

In a batch of mixed lengths one sequence-parallel degree for all makes short sequences pay for the
communication that only the long ones need. Here each micro-batch is computed by groups of several
degrees side by side, chosen by a measured cost model.

    model = fit(measure(executor, params, ...), cap=4096)         # or CostModel(...), gpt_7b(64)
    planner = Planner(devices=8, model=model)
    plan = planner.plan(lengths)                                  # on the host, ahead of the step
    loss, gradients = executor(plan, params, sequences)

Softmax layers profit; linear-attention layers (``a1 = 0``, one exchange whose size does not depend
on the length) need none of it. Source: FlexSP, arXiv 2412.01523.

Planning loads numpy, and scipy when an integer program is solved; jax only comes with running.
"""

from __future__ import annotations

import importlib

from jaxdec.parallel.flexsp.cost import CostModel, Exchange, Step, fit, gpt_7b, lower_bound
from jaxdec.parallel.flexsp.plan import Group, Plan, Planner

_LAZY = {
  "Executor": "execute",
  "Result": "execute",
  "task_gradients": "execute",
  "Measurements": "timing",
  "exchange_bytes": "timing",
  "measure": "timing",
}
__all__ = [
  "CostModel",
  "Exchange",
  "Group",
  "Plan",
  "Planner",
  "Step",
  "fit",
  "gpt_7b",
  "lower_bound",
  *_LAZY,
]


def __getattr__(name: str):
  if name in _LAZY:
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
