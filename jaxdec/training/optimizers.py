# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules, as data."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxdec.parallel.rules import path_name
from jaxdec.training.config import OptimizerConfig


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
