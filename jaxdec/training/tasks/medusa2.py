# SPDX-License-Identifier: Apache-2.0
"""Medusa-2 (arXiv 2401.10774, section 2.2.2): heads and model tuned together.

  L = L_LM + lambda_0 sum_k 0.8^k CE_k

``L_LM`` keeps the model what it is: KL to the untouched model (``keep="kl"``, self-distillation),
or cross-entropy on data the model was trained on (``keep="hard"``). The model changes by a LoRA
alone. Heads are trained first, the model untouched (``Distill``), then all together from there:
``DistillConfig(joint="kl")`` does both. By hand:

    heads = ...                                        # parameters of a distilled Medusa
    task = Medusa2(medusa, model, target_params, heads)
    ...                                                # train it
    tuned, heads = task.result(trained)

What results is a *new* target and heads for it: with the tuned target drafting changes no token,
but the tuned target doesn't write what the original one writes.

The paper gives the heads four times the learning rate of the model. LoRA leaves are stored divided
by ``backbone_rate`` = 1/4: Adam's steps do not depend on a gradient's scale, so that is a learning
rate a quarter as large, whatever the optimizer's settings. lambda_0 is 0.2 with
``hard`` and here 0.01 with ``kl``, a term that begins at zero.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from jaxdec.drafting.base import Params, Target, TargetOutput
from jaxdec.drafting.checkpoint import to_config
from jaxdec.drafting.lora import LoRA
from jaxdec.drafting.losses import cross_entropy, kl_divergence, masked_mean
from jaxdec.drafting.medusa import Medusa
from jaxdec.errors import UserError
from jaxdec.models.flops import per_token
from jaxdec.parallel.distributed import to_host
from jaxdec.training.task import Batch, Task
from jaxdec.training.tasks.distill import Distill, finish
from jaxdec.training.tasks.language_model import next_token_targets

HEAD_WEIGHT = {"hard": 0.2, "kl": 0.01}
TARGET = "target"  # the tuned model's folder, inside that of its heads


class Medusa2(Task):
  """Tunes ``drafter``'s heads and the decoder ``model`` (either layout) together.

  Args:
    heads: parameters to start from; None: fresh ones (the paper trains them first).
    keep: what holds the model in place; see above.
    head_weight: lambda_0; None: the default of ``keep``.
    backbone_rate: learning rate of the model as a share of the heads'.

  Raises:
    UserError: a drafter other than Medusa, whose states cut the model off from its gradients.
  """

  def __init__(
    self,
    drafter: Medusa,
    model: Any,
    target_params: Params,
    heads: Params | None = None,
    *,
    lora: LoRA | None = None,
    keep: Literal["kl", "hard"] = "kl",
    head_weight: float | None = None,
    backbone_rate: float = 0.25,
  ):
    if not isinstance(drafter, Medusa):
      raise UserError(f"Medusa-2 tunes a model with Medusa heads, got {drafter.name!r}; use medusa")
    if keep not in HEAD_WEIGHT or backbone_rate <= 0:
      raise UserError(
        f"keep must be 'kl' or 'hard' and backbone_rate positive, got {keep!r} and {backbone_rate}"
      )
    self.drafter, self.model, self.lora = drafter, model, lora or LoRA()
    self.keep, self.backbone_rate = keep, backbone_rate
    self.head_weight = HEAD_WEIGHT[keep] if head_weight is None else head_weight
    self._heads, self._distill = heads, Distill(drafter, model, target_params)

  @property
  def frozen(self) -> Params:
    return self._distill.frozen

  def init(self, rng: jax.Array) -> Params:
    lora = self.lora.init(jax.random.fold_in(rng, 1), self.frozen["target"])
    heads = self._distill.init(rng)
    if self._heads is not None:  # under the axis names of fresh ones
      heads = jax.tree.map(
        lambda box, x: box.replace_boxed(x) if isinstance(box, nn.Partitioned) else x,
        heads,
        nn.unbox(self._heads),
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
      )
    return {"heads": heads, "lora": jax.tree.map(lambda x: x / self.backbone_rate, lora)}

  def tuned(self, params: Params, base: Params) -> Params:
    """The model's parameters with the LoRA in."""
    lora = jax.tree.map(lambda x: x * self.backbone_rate, params["lora"])
    return self.lora.merge(base, lora)

  def loss(self, params: Params, frozen: Params, batch: Batch, rng: jax.Array | None):
    base = jax.lax.stop_gradient(nn.unbox(frozen["target"]))
    tuned = self.tuned(params, base)

    def run(params):
      args = batch["tokens"], batch["positions"], batch["segment_ids"]
      return self.model.apply({"params": params}, *args)

    out = run(tuned)
    # No logits: the heads' loss compares them with the tuned model's own law, from its states.
    output, target = TargetOutput(out.hidden, out.features), Target(self.model, tuned, None)
    head_loss, metrics = self.drafter.loss(params["heads"], target, output, batch, rng)
    labels, mask = next_token_targets(batch)
    if self.keep == "kl":
      kept = kl_divergence(out.logits, run(base).logits)
    else:
      kept = cross_entropy(out.logits, labels)
    kept = masked_mean(kept, mask)
    return kept + self.head_weight * head_loss, {**metrics, "kept": kept, "head_loss": head_loss}

  def evaluate(self, params: Params, frozen: Params, batch: Batch, rng: jax.Array):
    del rng  # every slot
    loss, metrics = self.loss(params, frozen, batch, None)
    return {"loss": loss, **metrics}

  def result(self, params: Params) -> tuple[Params, Params]:
    """The new target's parameters, in the model's layout, and its heads."""
    return self.tuned(nn.unbox(params), nn.unbox(self.frozen["target"])), nn.unbox(params["heads"])

  def finish(
    self,
    params: Params,
    batches: Iterable[Batch],
    folder: str | os.PathLike | None = None,
    *,
    num_nodes: int = 16,
    extra: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
  ) -> tuple[Medusa, Params, Params]:
    """The drafter with the best static tree for the tuned target, that target, and its heads.

    With ``folder`` all is saved: the drafter into it, and ``folder/target``, a model folder (with
    the ``tokenizer``, if given) that takes the place of the original one.
    """
    from jaxdec.io import save_checkpoint

    target, heads = self.result(params)
    distill = Distill(self.drafter, self.model, target)
    if folder is not None:
      # The model first: a folder that holds a drafter then holds its model too.
      weights = to_host(target)
      if jax.process_index() == 0:
        where = os.path.join(folder, TARGET)
        save_checkpoint(where, self.model.config, weights, tokenizer=tokenizer, overwrite=True)
    drafter = finish(distill, heads, batches, folder, num_nodes=num_nodes, extra=extra)
    return drafter, target, heads

  def flops_per_token(self, params: Params, length: int) -> float:
    model = per_token(self.model.config, length)
    heads = sum(x.size for x in jax.tree.leaves(params["heads"]))
    return model.training + (model.forward if self.keep == "kl" else 0.0) + 6.0 * heads

  @property
  def sequence(self):
    return self.model.sequence

  @property
  def config(self) -> dict[str, Any]:
    return {
      "task": "medusa2",
      "drafter": to_config(self.drafter),
      "target": self._distill.config["target"],
      "lora": self.lora,
      "keep": self.keep,
      "head_weight": self.head_weight,
      "backbone_rate": self.backbone_rate,
      "heads": None if self._heads is None else _digest(self._heads),
    }


def _digest(heads: Params) -> float:
  """Which heads a run began with, as far as its identity needs to tell: the same on any mesh."""
  leaves = jax.tree.leaves(to_host(nn.unbox(heads)))
  return float(sum(np.abs(np.asarray(x, np.float64)).sum() for x in leaves))
