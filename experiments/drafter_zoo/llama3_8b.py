# SPDX-License-Identifier: Apache-2.0
"""A full-budget distillation for an 8B target, costed before a slice is rented.

    jaxdec plan experiments/drafter_zoo/llama3_8b.py:eagle3 --topology v5p:2x2x4

Presets are names of drafters. The target's shapes are those of Llama 3.1 8B; sixteen chips hold it
split over ``fsdp``. Rows of 4,096 tokens, 64 a step; 20,000 steps read 5.2 billion tokens.
"""

from __future__ import annotations

from typing import Any

from jaxdec.draft_recipe import DraftRecipe
from jaxdec.drafting import DraftVocabulary
from jaxdec.errors import UserError, nearest
from jaxdec.mixers import AttentionConfig, RopeConfig
from jaxdec.models import DecoderConfig, LayerConfig, MLPConfig
from jaxdec.training import MeshConfig, OptimizerConfig, TrainerConfig

VOCAB = 128_256
# Which tokens are kept doesn't change the cost; a real run takes the most frequent ones.
DRAFT_VOCABULARY = DraftVocabulary(range(32_000), VOCAB)
DRAFTERS: dict[str, dict[str, Any]] = {
  "medusa": {"share_head": True, "num_heads": 4, "objective": "soft", "loss_fraction": 0.25},
  "hydra": {"share_head": True, "num_heads": 4, "objective": "soft", "loss_fraction": 0.25},
  "eagle3": {"num_heads": 7, "vocabulary": DRAFT_VOCABULARY},
}


def target() -> DecoderConfig:
  """Llama 3.1 8B's shapes."""
  layer = LayerConfig(
    AttentionConfig(
      num_heads=32, num_kv_heads=8, head_dim=128, rope=RopeConfig(theta=500_000.0)
    ),
    MLPConfig(14_336),
  )  # fmt: skip
  return DecoderConfig(
    vocab_size=VOCAB, dim=4096, layers=(layer,) * 32, tie_embeddings=False, max_length=8192
  )


def get_config(preset: str = "eagle3") -> DraftRecipe:
  """The distillation of one drafter.

  Raises:
    UserError: a drafter without settings here.
  """
  if preset not in DRAFTERS:
    raise UserError(
      f"preset {preset!r}{nearest(preset, DRAFTERS)} is not one of {', '.join(DRAFTERS)}"
    )
  return DraftRecipe(
    model=target(),
    param_dtype="bfloat16",
    drafter=preset,
    options={"dtype": "bfloat16", **DRAFTERS[preset]},
    batch_size=64,
    seq_len=4096,
    trainer=TrainerConfig(
      steps=20_000,
      optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=300, clip_norm=0.5),
      mesh=MeshConfig(fsdp=16),
    ),
  )
