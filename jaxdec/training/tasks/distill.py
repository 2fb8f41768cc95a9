# SPDX-License-Identifier: Apache-2.0
"""Drafter distillation: the frozen target runs in the same program, the drafter learns from it.

The target's parameters are an argument of the compiled step (``frozen``), its output is cut off
from differentiation, and gradients are taken with respect to the drafter alone, so no gradient of a
target leaf is ever computed. Batches may bring the target's states instead (``HIDDEN``,
``FEATURES``; see ``jaxdec.training.teachers``): then it only embeds and unembeds. Its logits are
never part of the output; who wants them unembeds ``hidden``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxdec.drafting.base import Params, Target, TargetOutput
from jaxdec.drafting.checkpoint import fingerprint, save_drafter, to_config
from jaxdec.drafting.dynamic_tree import DynamicTree
from jaxdec.drafting.prefix_drafter import prefix_of
from jaxdec.drafting.static_tree import StaticTree, expected_tokens, greedy_tree
from jaxdec.drafting.trained import TrainedDrafter
from jaxdec.errors import UserError
from jaxdec.models.flops import per_token
from jaxdec.parallel.distributed import to_host
from jaxdec.training.task import Batch, Task

# What a batch may bring of the target: post-norm states [B,T,D], and the captured ones [B,T,F,D].
HIDDEN, FEATURES = "teacher_hidden", "teacher_features"


class Distill(Task):
  """Trains ``drafter`` for the decoder ``model`` (either layout) and its ``target_params``.

  Args:
    runs_target: whether training runs the target, or batches bring states from disk: for the count
      of FLOPs alone.

  Raises:
    UserError: the model's sequences lie zigzag.
  """

  runs_target: bool = True

  def __init__(
    self, drafter: TrainedDrafter, model: Any, target_params: Params, *, runs_target: bool = True
  ):
    if model.sequence is not None and model.sequence.layout != "contiguous":
      raise UserError(
        f"a drafter learns from the tokens that follow each position, which lie elsewhere with "
        f"sequence layout={model.sequence.layout!r}; distill with layout='contiguous'"
      )
    self.drafter = drafter
    self.model = model
    self.runs_target = runs_target
    self._target_params = target_params
    self._fingerprint = fingerprint(model, to_host(nn.unbox(target_params)))

  def init(self, rng: jax.Array) -> Params:
    target = Target(self.model, nn.unbox(self._target_params), None)
    return self.drafter.init_boxed(rng, target)

  @property
  def frozen(self) -> Params:
    return {"target": self._target_params}

  def teacher(self, frozen: Params, batch: Batch) -> tuple[Target, TargetOutput]:
    """The target and what it computes on a batch (logits apart), cut off from differentiation."""
    params = jax.lax.stop_gradient(nn.unbox(frozen["target"]))
    if HIDDEN in batch:
      hidden = batch[HIDDEN].astype(self.model.dtype)
      stacked = batch[FEATURES].astype(self.model.dtype) if FEATURES in batch else None
      features = tuple(stacked[:, :, i] for i in range(len(self.drafter.capture)))
    else:
      images = prefix_of(batch)
      out = self.model.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        capture=self.drafter.capture,
        logits=False,
        embeddings=None if images is None else images.embeddings(batch["positions"]),
      )
      # Nothing of the drafter is compiled into the target's pass: states that were computed in a
      # program of their own are the same numbers.
      hidden, features = jax.lax.optimization_barrier((out.hidden, out.features))
    output = jax.lax.stop_gradient(TargetOutput(hidden, features))
    return Target(self.model, params, None), output

  def loss(self, params: Params, frozen: Params, batch: Batch, rng: jax.Array | None):
    target, output = self.teacher(frozen, batch)
    return self.drafter.loss(params, target, output, batch, rng)

  def evaluate(self, params: Params, frozen: Params, batch: Batch, rng: jax.Array):
    del rng  # no dropout, every slot
    loss, metrics = self.loss(params, frozen, batch, None)
    return {"loss": loss, **metrics}

  @functools.cached_property
  def rank_step(self):
    """``drafter.accuracy`` of one batch, compiled."""

    @jax.jit
    def one(params, frozen, batch):
      target, output = self.teacher(frozen, batch)
      return self.drafter.accuracy(params, target, output, batch)

    return one

  def flops_per_token(self, params: Params, length: int) -> float:
    drafter = self.drafter
    head = 2.0 * drafter.dim * drafter.vocab_size
    flops = 6.0 * drafter.multiplied(params)
    # The target's law is computed in any case, if only from states on disk.
    flops += per_token(self.model.config, length).forward if self.runs_target else head
    if getattr(drafter, "share_head", False):
      # Forward, and backward to the states, through the target's head at each depth.
      flops += 2.0 * head * drafter.depths_trained
    return flops

  @property
  def sequence(self):
    return self.model.sequence

  @property
  def config(self) -> dict[str, Any]:
    return {"task": "distill", "drafter": to_config(self.drafter), "target": self._fingerprint}


def measure_accuracy(task: Distill, params: Params, batches: Iterable[Batch]) -> np.ndarray:
  """Rank table ``[D, R]`` of a trained drafter over held-out batches.

  Entry ``[k-1, r]``: how often the target's best token was the drafter's number r at depth k.
  """
  frozen, hits, counts = task.frozen, 0.0, 0.0
  for batch in batches:
    table, count = jax.device_get(task.rank_step(params, frozen, dict(batch)))
    hits = hits + np.asarray(table, np.float64) * np.asarray(count, np.float64)[:, None]
    counts = counts + np.asarray(count, np.float64)
  return hits / np.maximum(counts, 1.0)[:, None]


def best_tree(drafter: TrainedDrafter, accuracy: np.ndarray, num_nodes: int) -> StaticTree | None:
  """The best static tree for a rank table; None where the drafter keeps the one it has.

  A drafter that grows its own trees or drafts chains only keeps doing so; one that is never right
  has no best tree.
  """
  if isinstance(drafter.tree, DynamicTree) or not drafter.takes_trees:
    return None
  tree = greedy_tree(np.clip(accuracy, 0.0, 1.0), num_nodes)
  return tree if tree.paths else None


def finish(
  task: Distill,
  params: Params,
  batches: Iterable[Batch],
  folder: str | None = None,
  *,
  num_nodes: int = 16,
  extra: Mapping[str, Any] | None = None,
) -> TrainedDrafter:
  """Measures the drafter on held-out batches, gives it the best static tree of ``num_nodes`` nodes,
  root included, and saves it to ``folder`` (if any). Returns the drafter with its tree."""
  accuracy = measure_accuracy(task, params, batches)
  drafter, facts = task.drafter, {"accuracy": accuracy.round(6).tolist()}
  tree = best_tree(drafter, accuracy, num_nodes)
  if tree is not None:
    drafter = dataclasses.replace(drafter, tree=tree)
    facts["expected_tokens_per_step"] = expected_tokens(tree, accuracy)
  if folder is not None:
    target = Target(task.model, to_host(nn.unbox(task.frozen["target"])), None)
    params = to_host(params)
    if jax.process_index() == 0:
      save_drafter(folder, drafter, params, target, {**facts, **dict(extra or {})})
  return drafter
