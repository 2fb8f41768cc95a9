# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules, as data."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxdec.errors import UserError
from jaxdec.parallel.rules import path_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """How parameters follow gradients.

  Attributes:
    name: ``adamw`` (arXiv 1711.05101), or ``muon`` (arXiv 2502.16982): orthogonalised momentum for
      the matrices of the blocks, AdamW for embeddings, norms, biases and the LM head.
    learning_rate: the peak.
    schedule: after a linear warm-up, ``cosine`` to ``final_ratio``; ``wsd`` (warm-up, stable,
      decay: arXiv 2404.06395) stays at the peak, then falls linearly; or ``constant``.
    warmup_steps: steps from 0 to the peak. decay_fraction: share of all steps in which wsd falls.
    final_ratio: last learning rate as a share of the peak.
    weight_decay: decoupled, on matrices only (not on embeddings, norms and biases).
    clip_norm: gradients are scaled down to this global norm; None: never.
    adam_learning_rate: the AdamW part's peak under ``muon``; None: the same. Muon's updates are
      scaled to AdamW's usual root mean square (0.2), so one rate fits both.
    beta1, beta2, eps: AdamW. momentum: Muon.
  """

  name: Literal["adamw", "muon"] = "adamw"
  learning_rate: float = 3e-4
  schedule: Literal["cosine", "wsd", "constant"] = "cosine"
  warmup_steps: int = 100
  decay_fraction: float = 0.2
  final_ratio: float = 0.1
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  momentum: float = 0.95
  adam_learning_rate: float | None = None

  def __post_init__(self):
    choices = {"name": ("adamw", "muon"), "schedule": ("cosine", "wsd", "constant")}
    for field, allowed in choices.items():
      if getattr(self, field) not in allowed:
        raise UserError(
          f"optimizer {field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}"
        )
    if not self.learning_rate > 0:
      raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
    if self.warmup_steps < 0 or not 0 < self.decay_fraction <= 1:
      raise UserError(
        f"warmup_steps must be >= 0 and decay_fraction in (0, 1], got {self.warmup_steps} and "
        f"{self.decay_fraction}"
      )


def schedule(config: OptimizerConfig, steps: int, *, peak: float | None = None) -> optax.Schedule:
  """Learning rate by step: warm-up, then the configured shape, over ``steps`` in all.

  A warm-up longer than half the run is shortened to half of it, so that a short trial run of a
  long recipe still reaches its peak.
  """
  peak = config.learning_rate if peak is None else peak
  warmup = min(config.warmup_steps, steps // 2)
  final = peak * config.final_ratio
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.final_ratio)
  elif config.schedule == "wsd":
    fall = min(max(round(steps * config.decay_fraction), 1), steps - warmup)
    stable = steps - warmup - fall
    main = optax.join_schedules(
      [optax.constant_schedule(peak), optax.linear_schedule(peak, final, fall)], [stable]
    )
  else:
    main = optax.constant_schedule(peak)
  if not warmup:
    return main
  # Step 0 already learns: the ramp's first value is peak / warmup, not 0.
  ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, main], [warmup])


def decay_mask(params: Any) -> Any:
  """True for matrices: leaves called ``kernel``; never embeddings, norm scales and biases.

  By name, because under scanned layers a norm scale is a matrix too, ``[layers, D]``.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: _leaf(path) == "kernel", params)


def muon_dimensions(params: Any) -> Any:
  """Which two axes Muon orthogonalises: the last two of every hidden matrix; None for all others.

  Leading axes (scanned layers, stacked heads) are batch axes: each matrix on its own. The LM head
  reads one token's row at a time, like an embedding, and stays with AdamW.
  """

  def one(path, leaf):
    parts = path_name(path).split("/")
    hidden = parts[-1] == "kernel" and leaf.ndim >= 2 and not {"head", "lm_head"} & set(parts)
    return optax.contrib.MuonDimensionNumbers(-2, -1) if hidden else None

  return jax.tree_util.tree_map_with_path(one, params)


def _leaf(path: tuple[Any, ...]) -> str:
  return path_name(path[-1:])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The whole chain: clipping, the optimizer, its schedule and decay."""
  rate = schedule(config, steps)
  if config.name == "adamw":
    core = optax.adamw(
      rate,
      b1=config.beta1,
      b2=config.beta2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    )
  else:
    adam_rate = rate
    if config.adam_learning_rate is not None:
      adam_rate = schedule(config, steps, peak=config.adam_learning_rate)
    core = optax.contrib.muon(
      rate,
      beta=config.momentum,
      weight_decay=config.weight_decay,
      adam_learning_rate=adam_rate,
      adam_b1=config.beta1,
      adam_b2=config.beta2,
      muon_weight_dimension_numbers=muon_dimensions,
      consistent_rms=0.2,
    )
  if config.clip_norm is None:
    return core
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), core)


def global_norm(tree: Any) -> jax.Array:
  """Euclidean norm over all leaves, float32."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
