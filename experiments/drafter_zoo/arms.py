# SPDX-License-Identifier: Apache-2.0
"""The drafters compared, and the budget they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdec.distillation import DistillConfig
from jaxdec.drafting import (
  Drafter,
  DynamicExit,
  DynamicTree,
  EarlyExit,
  StaticTree,
  TrainedDrafter,
  greedy_tree,
)
from jaxdec.drafting.base import Target
from jaxdec.drafting.vocab_trim import frequent, trim
from jaxdec.models import DecoderConfig
from jaxdec.training import OptimizerConfig, TrainerConfig

CHAIN = 5
Shapes = dict[str, Drafter]


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
  timed_prompts: int = 6


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
    untrained: makes a drafter that has nothing to train, for the target's configuration.
    shapes: the trees it is measured with. after: what is done to each of them, given its
      parameters, the target and how often each token occurs in the training text.
  """

  name: str
  kind: str = ""
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  learning_rate: float | None = None
  trained_as: str | None = None
  untrained: Callable[[DecoderConfig], Drafter] | None = None
  shapes: Callable[[Any, Any], Shapes] = with_trees
  after: Callable[[Any, Any, Target, np.ndarray], tuple[Drafter, Any]] = (
    lambda drafter, params, target, counts: (drafter, params)
  )

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


def drafts_only(drafter: Drafter, accuracy: Any) -> Shapes:
  """A drafter whose only shape is its chain."""
  del accuracy
  return {"chain5": drafter}


def trimmed(drafter: Drafter, params: Any, target: Target, counts: np.ndarray):
  """VocabTrim to the most frequent quarter of the tokens."""
  return trim(drafter, params, target, frequent(counts, len(counts) // 4))


_HEADS = {"share_head": True, "objective": "soft"}
_BLOCKS = {"num_anchors": 64, "num_layers": 2}
_ALL = (
  Arm(name="medusa", kind="medusa", options=_HEADS),
  Arm(name="hydra", kind="hydra", options=_HEADS),
  Arm(name="hydra++", kind="hydra++", options={"share_head": True, "dropout": 0.0}),
  Arm(name="clover", kind="clover", options={"objective": "soft"}),
  Arm(name="clover2", kind="clover2"),
  Arm(name="chimera", kind="chimera", options={"share_head": True}),
  Arm(name="eagle", kind="eagle"),
  Arm(name="eagle2", trained_as="eagle", shapes=with_dynamic_trees),
  Arm(name="eagle_trimmed", trained_as="eagle", after=trimmed),
  Arm(name="hass", kind="hass"),
  Arm(name="fspad", kind="fspad"),
  Arm(name="dovetail", kind="dovetail"),
  Arm(name="falcon", kind="falcon"),
  Arm(name="mtp", kind="mtp"),
  Arm(name="mtp_modules", kind="mtp_modules"),
  Arm(name="eagle3", kind="eagle3"),
  Arm(name="eagle3_warm", kind="eagle3", options={"head_init": "target"}),
  Arm(name="eagle3_dynamic", trained_as="eagle3", shapes=with_dynamic_trees),
  Arm(name="p_eagle", kind="p_eagle"),
  Arm(name="dflash", kind="dflash", options={"labels": "from_anchor", **_BLOCKS}),
  Arm(name="dspark", kind="dspark", options={"rank": 64, **_BLOCKS}),
  Arm(name="ppd", kind="ppd", learning_rate=1e-2),
  Arm(name="masked_mtp", kind="masked_mtp", options={"rank": 16}),
  Arm(name="hidden_transfer", kind="hidden_transfer", learning_rate=1e-3),
  Arm(
    name="early_exit", shapes=drafts_only,
    untrained=lambda config: EarlyExit(exit=config.num_layers // 2, num_drafts=CHAIN),
  ),
  Arm(name="del", shapes=drafts_only, untrained=lambda config: DynamicExit(max_drafts=CHAIN)),
)  # fmt: skip
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ALL}
# Registered drafters that take no part, and why.
LEFT_OUT = dict.fromkeys(("specvlm", "vispec", "flash"), "reads images; on text an EAGLE drafter")
# (larger, smaller, strictly): the published order, each pair on the same prompts.
CLAIMS = (
  ("hydra", "medusa", True),
  ("hydra++", "hydra", False),
  ("eagle3", "eagle", False),
  ("eagle3_warm", "eagle", False),
  ("hass", "eagle", False),
  ("dspark", "dflash", False),
)
