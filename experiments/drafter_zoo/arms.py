# SPDX-License-Identifier: Apache-2.0
"""The drafters compared, and the budget they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdec.distillation import DistillConfig
from jaxdec.drafting import DynamicTree, StaticTree, greedy_tree
from jaxdec.drafting.trained import TrainedDrafter
from jaxdec.training import OptimizerConfig, TrainerConfig

CHAIN = 5
Shapes = dict[str, TrainedDrafter]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """What every arm gets: the same batches in the same order, steps, optimizer and prompts."""

  steps: int
  batch_size: int = 8
  seq_len: int = 256
  learning_rate: float = 4e-3
  eval_batches: int = 8
  prompts: int = 48
  prompt_tokens: int = 64
  new_tokens: int = 128
  repeats: int = 3


def with_trees(drafter: TrainedDrafter, accuracy: Any) -> Shapes:
  """A chain of 5, and the best static trees of at most 16 and 64 nodes for these accuracies."""
  table = np.clip(np.asarray(accuracy, float), 0, 1)
  shapes = {
    "chain5": StaticTree.chain(CHAIN),
    "tree16": greedy_tree(table, 16),
    "tree64": greedy_tree(table, 64),
  }
  return {name: dataclasses.replace(drafter, tree=tree) for name, tree in shapes.items()}


def with_dynamic_trees(drafter: TrainedDrafter, accuracy: Any) -> Shapes:
  """EAGLE-2's trees of 16 and 64 nodes."""
  del accuracy
  trees = {
    "tree16": DynamicTree(num_nodes=16, max_depth=CHAIN, width=4),
    "tree64": DynamicTree(num_nodes=64, max_depth=CHAIN + 1, width=8),
  }
  return {name: dataclasses.replace(drafter, tree=tree) for name, tree in trees.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One drafter.

  Attributes:
    kind: its registered name. options: fields of it.
    learning_rate: where a method needs another one than the budget's (a few embeddings, say).
    trained_as: the arm whose trained parameters are used; this one differs at decoding only.
    changed: what differs then. shapes: the trees it is measured with.
  """

  name: str
  kind: str = ""
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  learning_rate: float | None = None
  trained_as: str | None = None
  changed: Callable[[TrainedDrafter], TrainedDrafter] = lambda drafter: drafter
  shapes: Callable[[TrainedDrafter, Any], Shapes] = with_trees

  def job(self, budget: Budget, work_dir: Path) -> DistillConfig:
    """Its distillation; ``work_dir/name`` is the folder."""
    return DistillConfig(
      drafter=self.kind,
      options={"num_heads": CHAIN, **self.options},
      batch_size=budget.batch_size,
      seq_len=budget.seq_len,
      num_nodes=16,
      eval_batches=budget.eval_batches,
      trainer=TrainerConfig(
        work_dir=str(work_dir / self.name),
        steps=budget.steps,
        optimizer=OptimizerConfig(
          name="muon", learning_rate=self.learning_rate or budget.learning_rate, schedule="wsd",
          warmup_steps=min(20, budget.steps // 5), decay_fraction=0.4, final_ratio=0.02,
          weight_decay=0.0,
        ),
      ),
    )  # fmt: skip


_HEADS = {"share_head": True, "objective": "soft"}
_ALL = (
  Arm(name="medusa", kind="medusa", options=_HEADS),
  Arm(name="hydra", kind="hydra", options=_HEADS),
  Arm(name="hydra++", kind="hydra++", options={"share_head": True, "dropout": 0.0}),
  Arm(name="eagle3", kind="eagle3"),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ALL}
# (larger, smaller, strictly): the published order, each pair on the same prompts.
CLAIMS = (
  ("hydra", "medusa", True),
  ("hydra++", "hydra", False),
  ("eagle3", "eagle", False),
  ("hass", "eagle", False),
  ("dspark", "dflash", False),
)
