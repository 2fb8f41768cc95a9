# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run, as data. Loads no array library: bad settings fail at once."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxdec.errors import UserError


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 (all that remain).

  ``dcn_data`` and ``dcn_fsdp`` say over how many slices those two axes reach.
  """

  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  seq: int = 1
  dcn_data: int = 1
  dcn_fsdp: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
  """How a task is trained.

  Attributes:
    work_dir: the run's folder; None keeps nothing (no checkpoints, no metrics file).
    steps: optimizer steps in all. seed: of the initial parameters and of every step's ``rng``.
    optimizer: see ``OptimizerConfig``.
    accumulate: gradients of this many slices of each batch are averaged before a step.
    grad_dtype: in which gradients are summed over those slices and clipped, and the optimizer keeps
      its moments (the model's ``param_dtype`` and ``dtype`` are the two other types of a run, see
      ``jaxdec.training.gradients``); ``bfloat16`` halves that memory and rounds every sum.
    ema: decay of an average of the parameters, which is evaluated and saved beside them; None:
      none. See ``jaxdec.training.ema``.
    nan_policy: where loss or gradient norm are not finite, ``stop`` ends the run and names what is
      wrong, ``skip`` leaves parameters and optimizer (its count of steps too) as they were. No such
      step is ever kept or saved. max_skips: steps in a row that may be skipped; one more stops.
    log_every: steps between reports; None: about 20 reports a run.
    eval_every: steps between evaluations; None: only after the last step. Without evaluation data
      there is none.
    checkpoint_every: steps between checkpoints; the last step is always saved.
    keep: how many checkpoints stay on disk.
    mesh: devices along ``data``, ``fsdp``, ``tensor``, ``seq``.
    profile: ``(start, stop)``: steps ``start`` to ``stop - 1`` are traced into
      ``<work_dir>/profile``, on the first process.
    tensorboard: also write TensorBoard files (needs ``tensorboardX``).
    progress: print reports.
  """

  work_dir: str | None = None
  steps: int = 1000
  seed: int = 0
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  accumulate: int = 1
  grad_dtype: Literal["float32", "bfloat16"] = "float32"
  ema: float | None = None
  nan_policy: Literal["stop", "skip"] = "stop"
  max_skips: int = 10
  log_every: int | None = None
  eval_every: int | None = None
  checkpoint_every: int = 500
  keep: int = 2
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  profile: tuple[int, int] | None = None
  tensorboard: bool = False
  progress: bool = True

  def __post_init__(self):
    for name in (
      "steps", "accumulate", "log_every", "eval_every", "checkpoint_every", "keep", "max_skips",
    ):  # fmt: skip
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")
    choices = {"grad_dtype": ("float32", "bfloat16"), "nan_policy": ("stop", "skip")}
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
    if self.ema is not None and not 0 < self.ema < 1:
      raise UserError(f"ema must lie between 0 and 1, such as 0.999, or be None, got {self.ema}")
    if self.profile is not None:
      self._check_window(*self.profile)

  def _check_window(self, start: int, stop: int) -> None:
    if not 1 <= start < stop <= self.steps + 1:
      raise UserError(
        f"profile={start}:{stop} must be steps START:STOP with 1 <= START < STOP, STOP not traced, "
        f"within the run's {self.steps} steps"
      )
    if self.work_dir is None:
      raise UserError(f"profile={start}:{stop} writes into work_dir, which is None; give one")


def parse_window(text: str) -> tuple[int, int]:
  """``"100:105"`` as ``(100, 105)``: the steps 100 to 104.

  Raises:
    UserError: anything but two whole numbers, the second larger.
  """
  parts = text.split(":")
  if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
    start, stop = map(int, parts)
    if 1 <= start < stop:
      return start, stop
  raise UserError(
    f"a profile window is START:STOP, such as 100:105 for the steps 100 to 104, got {text!r}"
  )
