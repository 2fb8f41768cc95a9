# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of given weights with the language-modelling loss (a pruned model, a checkpoint)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from jaxdec.drafting.checkpoint import fingerprint
from jaxdec.parallel.distributed import to_host
from jaxdec.training.tasks.language_model import LanguageModel


@dataclasses.dataclass(frozen=True, eq=False)
class Heal(LanguageModel):
  """``LanguageModel`` that starts from ``weights`` (plain arrays, in the model's layout).

  Attributes:
    weights: parameters at step 0, cast to the model's ``param_dtype``.
  """

  weights: Any = None

  def init(self, rng):
    boxed = jax.eval_shape(super().init, rng)  # for the logical axes

    def fill(box, x):
      plain = nn.unbox(box)
      if x.shape != plain.shape:
        raise ValueError(f"a weight is {x.shape}, but the model has {plain.shape} there")
      x = jax.numpy.asarray(x, plain.dtype)
      return box.replace_boxed(x) if isinstance(box, nn.meta.AxisMetadata) else x

    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(fill, boxed, nn.unbox(self.weights), is_leaf=is_box)

  @property
  def config(self):
    start = fingerprint(self.model, to_host(nn.unbox(self.weights)))
    return {**super().config, "task": "heal", "weights": start["weights"]}
