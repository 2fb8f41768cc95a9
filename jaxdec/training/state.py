# SPDX-License-Identifier: Apache-2.0
"""What a training run changes, and what it leaves behind."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import struct


@struct.dataclass
class TrainState:
  """Everything a step changes. ``ema``: the average of ``params``, ``memory``: what the task
  remembers; or None."""

  step: jax.Array
  params: Any
  optimizer: Any
  ema: Any = None
  memory: Any = None

  def saved(self) -> dict[str, Any]:
    """What a checkpoint holds of it, by name."""
    state = {"params": self.params, "optimizer": self.optimizer}
    some = {"ema": self.ema, "memory": self.memory}
    return state | {name: tree for name, tree in some.items() if tree is not None}

  @property
  def evaluated(self) -> Any:
    """The parameters that evaluation is about: the average, where there is one."""
    return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What ``Trainer.train`` leaves behind.

  Attributes:
    params: trained parameters, still on the mesh. ema: their average, if one was kept.
    step: steps done; fewer than configured only if ``interrupted``.
    interrupted: a SIGTERM or Ctrl-C came; the state was saved, the same call resumes.
    metrics: last evaluation (or last report, without evaluation data).
  """

  params: Any
  step: int
  interrupted: bool
  metrics: dict[str, Any]
  ema: Any = None
