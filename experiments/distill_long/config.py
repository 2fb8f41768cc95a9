# SPDX-License-Identifier: Apache-2.0
"""Hydra heads for a teacher that reads long contexts, each split over several devices.

    python -m experiments.distill_long.run                            (tiny, on this machine)
    python -m experiments.distill_long.plan --topology v5p:2x2x4      (long, without one)

The teacher's forward pass is sequence-parallel: one all-gather of keys and values in every softmax
layer, one of states in every recurrent layer, and none backward, since nothing is differentiated
with respect to it. The heads (Hydra, arXiv 2402.05109) read its states where they lie.
"""

from __future__ import annotations

import dataclasses

from experiments.lasp2.config import get_config as linear_llama3
from jaxdec.distillation import DistillConfig
from jaxdec.draft_recipe import DraftRecipe
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.training import MeshConfig, OptimizerConfig, TrainerConfig

SEQUENCE = SequenceConfig()  # contiguous shards: the heads read the tokens that follow
# All heads share the teacher's own LM head; a share of the positions is learned from at each step.
OPTIONS = {"share_head": True, "num_heads": 4, "objective": "soft"}


def tiny(work_dir: str | None = None) -> DistillConfig:
  """The embedded model as the teacher, rows of 2,048 tokens (its longest) over four devices."""
  return DistillConfig(
    drafter="hydra",
    options={**OPTIONS, "loss_fraction": 0.25},
    batch_size=2,
    seq_len=2048,
    eval_batches=4,
    trainer=TrainerConfig(
      work_dir=work_dir,
      steps=60,
      log_every=1,
      optimizer=OptimizerConfig(
        learning_rate=5e-3, schedule="constant", warmup_steps=5, weight_decay=0.0
      ),
      mesh=MeshConfig(seq=4),
    ),
  )


def long() -> DraftRecipe:
  """A 1.4B hybrid as the teacher, in bfloat16, one row of 131,072 tokens over 16 devices."""
  seq_len = 2**17
  teacher = linear_llama3("1b-gla-hybrid")
  return DraftRecipe(
    model=dataclasses.replace(teacher.model, max_length=seq_len),
    param_dtype="bfloat16",
    sequence=SEQUENCE,
    drafter="hydra",
    options={**OPTIONS, "loss_fraction": 0.0625},
    data=teacher.data,
    batch_size=1,
    seq_len=seq_len,
    trainer=TrainerConfig(
      steps=10_000,
      optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, weight_decay=0.0),
      mesh=MeshConfig(seq=16),
    ),
  )


def get_config() -> DraftRecipe:
  """What ``jaxdec plan experiments/distill_long/config.py`` costs."""
  return long()
