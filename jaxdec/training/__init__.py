# SPDX-License-Identifier: Apache-2.0
"""One trainer and its tasks. Names load on first use: optimizers and models take a moment."""

from __future__ import annotations

import importlib

_LAZY = {
  "LanguageModel": "jaxdec.training.tasks.language_model",
  "MeshConfig": "jaxdec.training.config",
  "OptimizerConfig": "jaxdec.training.config",
  "Recipe": "jaxdec.training.recipe",
  "Task": "jaxdec.training.task",
  "TrainResult": "jaxdec.training.state",
  "Trainer": "jaxdec.training.trainer",
  "TrainerConfig": "jaxdec.training.config",
  "load_params": "jaxdec.training.checkpoints",
  "load_recipe": "jaxdec.training.recipe",
  "make_optimizer": "jaxdec.training.optimizers",
  "read_metrics": "jaxdec.training.metrics",
}
__all__ = [
  "LanguageModel",
  "MeshConfig",
  "OptimizerConfig",
  "Recipe",
  "Task",
  "TrainResult",
  "Trainer",
  "TrainerConfig",
  "load_params",
  "load_recipe",
  "make_optimizer",
  "read_metrics",
]


def __getattr__(name: str):
  if name in _LAZY:
    return getattr(importlib.import_module(_LAZY[name]), name)
  raise AttributeError(f"module 'jaxdec.training' has no attribute {name!r}")
