# SPDX-License-Identifier: Apache-2.0
"""Tuning a model to speak in lexical units (arXiv 2405.15208), for drafter ``lexical_units``.

  L = L_LM + unit_weight * mean over PADs -log p(x_{t+i} | x_{<t}, PAD, .., PAD),  0 < i < j

with ``x_t .. x_{t+j-1}`` a unit: its tokens after the first have a probability of at least
``threshold``. Plain text and text with PADs weigh alike, as in a one to one mixture.

Decided here: the probabilities are those of the model as it is being tuned, in the same pass, where
the paper prepares its data with the model tuned on plain text beforehand. Tune on plain text first
(``Heal``) and start from there to have the paper's order.

    drafter = LexicalUnits.for_target(model.config, pad=pad)
    task = LexicalTuning(model, weights=params, drafter=drafter)
    tuned = Trainer(task, config, data=data).train().params
    generate(model, tuned, prompts, drafter=drafter, ...)
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdec.drafting.base import Target, TargetOutput
from jaxdec.drafting.checkpoint import to_config
from jaxdec.drafting.lexical_units import UNIT, LexicalUnits, unit_offsets
from jaxdec.errors import UserError
from jaxdec.training.tasks.heal import Heal
from jaxdec.training.tasks.language_model import next_token_targets


@dataclasses.dataclass(frozen=True, eq=False)
class LexicalTuning(Heal):
  """``Heal`` with the loss of PADs beside the text's own.

  Attributes:
    drafter: says which token is PAD, how many follow a text, and at how many places of one.
    threshold: alpha, the probability that makes a token part of the unit before it.
  """

  drafter: LexicalUnits | None = None
  threshold: float = 0.9
  unit_weight: float = 1.0

  def __post_init__(self):
    if not isinstance(self.drafter, LexicalUnits) or not 0 < self.threshold <= 1:
      raise UserError(
        "LexicalTuning needs drafter=LexicalUnits(...) and a threshold in (0, 1], got "
        f"{self.drafter!r} and {self.threshold}"
      )

  def loss(self, params, frozen, batch, rng):
    total, metrics = super().loss(params, frozen, batch, rng)
    metrics.setdefault("cross_entropy", total)
    out = self.model.apply(
      {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"],
      logits=self.loss_chunk is None,
    )  # fmt: skip
    labels, mask = next_token_targets(batch)
    losses = self._of_tokens(params, out.hidden, labels, out.logits)[0]
    sure = jax.lax.stop_gradient((jnp.exp(-losses) >= self.threshold) & (mask > 0))
    sure = jnp.pad(sure[:, :-1], ((0, 0), (1, 0)))  # of the token, not of the one before
    units = unit_offsets(sure, self.drafter.num_heads + 1)
    loss, more = self.drafter.loss(
      {},
      Target(self.model, nn.unbox(params), None),
      TargetOutput(out.hidden),
      {**batch, UNIT: units},
      rng,
    )
    metrics |= {
      "unit_loss": loss,
      "unit_top1": more["top1"],
      "unit_share": jnp.mean(jnp.where(mask[:, :-1] > 0, units[:, 1:] > 0, False)),
    }
    return total + self.unit_weight * loss, metrics

  def flops_per_token(self, params, length):
    rows = min(self.drafter.anchors or length, length) * self.drafter.num_heads
    return super().flops_per_token(params, length) * (1 + rows / length)

  @property
  def config(self):
    return {
      **super().config,
      "task": "lexical_units",
      "drafter": to_config(self.drafter),
      "threshold": self.threshold,
      "unit_weight": self.unit_weight,
    }
