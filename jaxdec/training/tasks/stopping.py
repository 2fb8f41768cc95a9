# SPDX-License-Identifier: Apache-2.0
"""Training the acceptance head of SpecDec++ on the target's texts; both models stay as they are."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxdec.drafting.base import Params
from jaxdec.drafting.specdec import SpecDec
from jaxdec.training.task import Batch, Task


class LearnStopping(Task):
  """Trains the head of ``drafter`` between a draft model and its target.

  Args:
    drafter: whose draft model reads the texts with ``draft_params`` (its ``["model"]``).
    model, target_params: the target. The texts should be its own answers.
    sampler: the law decoding will use.
    mix, rejection_weight: r and w of ``SpecDec.head_loss``.
  """

  def __init__(
    self,
    drafter: SpecDec,
    draft_params: Params,
    model: Any,
    target_params: Params,
    sampler: Any,
    *,
    mix: float = 0.15,
    rejection_weight: float = 6.0,
  ):
    self.drafter, self.model, self.sampler = drafter, model, sampler
    self._draft_params, self._target_params = draft_params, target_params
    self._options = {"mix": mix, "rejection_weight": rejection_weight}

  def init(self, rng: jax.Array) -> Params:
    return self.drafter.init_head(rng)

  @property
  def frozen(self) -> Params:
    return {"target": self._target_params, "draft": self._draft_params}

  def loss(self, params: Params, frozen: Params, batch: Batch, rng: jax.Array):
    frozen = jax.lax.stop_gradient(nn.unbox(dict(frozen)))
    logits = self.model.apply(
      {"params": frozen["target"]}, batch["tokens"], batch["positions"], batch["segment_ids"]
    ).logits
    return self.drafter.head_loss(
      params, frozen["draft"], logits, batch, rng, self.sampler, **self._options
    )

  @property
  def config(self) -> dict[str, Any]:
    return {
      "task": "stopping",
      "num_blocks": self.drafter.num_blocks,
      "temperature": self.sampler.temperature,
      **self._options,
    }
