# SPDX-License-Identifier: Apache-2.0
"""What a training run learns: the ``Task`` contract.

A task owns the objective, the trainer everything else (mesh, optimizer, checkpoints, logging). The
smallest task is an object with ``init`` and ``loss``; deriving from ``Task`` supplies the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxdec.parallel.sequence.config import SequenceConfig

Params = Any
Batch = Mapping[str, Any]


class Task:
  """Base of all tasks.

  ``loss`` is traced once; anything it closes over (configs, small tables) becomes a constant of the
  compiled step, so large arrays belong in ``frozen``.
  """

  def init(self, rng: jax.Array) -> Params:
    """Trainable parameters. Called under ``jit``.

    Leaves may carry logical axis names (``nn.with_logical_partitioning``): the trainer lays them
    on the mesh by its rules and strips the names, so ``loss`` sees plain arrays.
    """
    raise NotImplementedError

  @property
  def frozen(self) -> Params:
    """Arrays that ``loss`` reads and no step changes (a teacher); an argument of the compiled step.

    Leaves with logical axis names are laid out like parameters; arrays already on the run's mesh
    stay as they are; all others are replicated.
    """
    return {}

  def loss(
    self, params: Params, frozen: Params, batch: Batch, rng: jax.Array
  ) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
    """The number to minimise, and metrics: a flat dict of scalars or short vectors.

    A metric named ``weight`` says how many items (labelled tokens) the means were taken over.
    Gradient accumulation and evaluation weight by it, so that their result is the mean over all
    items; without it every batch counts the same. ``loss`` itself is logged by the trainer.

    Args:
      batch: ``tokens``, ``segment_ids`` (0: padding), ``positions``, ``loss_mask``, all ``[B, T]``;
        where tokens don't lie in their order (a zigzag layout), also ``labels`` and ``label_mask``.
      rng: differs by step, the same on every device.
    """
    raise NotImplementedError

  @property
  def memory(self) -> Any:
    """What the objective remembers from step to step (a weight that follows a loss), at step 0: a
    tree of scalars, kept in the run's checkpoints; None: nothing."""
    return None

  def recall(self, memory: Any, batch: Batch) -> Batch:
    """The batch of a step, with what is remembered in it; leaves begin with ``[B]``. Traced."""
    raise NotImplementedError

  def remember(self, memory: Any, metrics: dict[str, Array]) -> Any:
    """``memory`` after a step with these metrics. Traced."""
    raise NotImplementedError

  def evaluate(
    self, params: Params, frozen: Params, batch: Batch, rng: jax.Array
  ) -> dict[str, Float[Array, "..."]]:
    """Metrics of one held-out batch; by default those of ``loss``. Traced, like ``loss``."""
    loss, metrics = self.loss(params, frozen, batch, rng)
    return {"loss": loss, **metrics}

  def summarize(self, metrics: dict[str, np.ndarray]) -> dict[str, Any]:
    """Host-side last touch on averaged evaluation metrics (bits per byte, tokens per step)."""
    return metrics

  def flops_per_token(self, params: Params, length: int) -> float:
    """Model FLOPs of forward and backward pass per token, for the MFU estimate.

    Default: 6 per trainable parameter, 2 per frozen one (arXiv 2001.08361, table 1).
    """
    del length

    def count(tree):
      return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))

    return 6.0 * count(params) + 2.0 * count(self.frozen)

  @property
  def sequence(self) -> SequenceConfig | None:
    """How the task's model computes on a mesh that splits sequences; None: it cannot."""
    return None

  @property
  def config(self) -> Any:
    """JSON-able (or dataclass) description; part of the run's identity."""
    return {"task": type(self).__name__}
