# SPDX-License-Identifier: Apache-2.0
"""A distillation as a recipe: what ``jaxdec plan`` costs on hardware that is not there.

Only the teacher's shapes are needed for that, not its weights; ``jaxdec distill`` runs the same
settings with a real one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdec.distillation import make_drafter
from jaxdec.drafting.base import Target
from jaxdec.errors import UserError
from jaxdec.training.recipe import Recipe
from jaxdec.training.tasks.distill import Distill


class Planned(Distill):
  """Distillation from a teacher of which only the shapes are known."""

  def __init__(self, drafter: Any, model: Any, abstract: Any):
    self.drafter, self.model = drafter, model
    self._target_params, self._fingerprint = abstract, {"weights": None}

  def init(self, rng: jax.Array) -> Any:
    # Traced, never run: zeros stand for weights that a drafter starts from.
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.unbox(self._target_params))
    return self.drafter.init_boxed(rng, Target(self.model, params, None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftRecipe(Recipe):
  """A drafter's distillation; ``model``, ``layout`` and the types are the teacher's.

  Attributes:
    drafter: its name. options: fields of it.
  """

  drafter: str = "eagle3"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def task(self) -> Planned:
    model = self.decoder()
    abstract = jax.eval_shape(super().task().init, jax.random.key(0))
    return Planned(make_drafter(self, self.model), model, abstract)

  def make_trainer(self):
    raise UserError(
      f"this configuration distills {self.drafter!r} and has no weights of a teacher; run it with "
      "`jaxdec distill`, or cost it with `jaxdec plan`"
    )
