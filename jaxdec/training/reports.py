# SPDX-License-Identifier: Apache-2.0
"""Metrics on their way from the device to the file and the screen, without making it wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxdec.errors import UserError
from jaxdec.training.metrics import MetricsWriter, Progress, clock, human, peak_flops

if TYPE_CHECKING:
  from jaxdec.training.trainer import Trainer


class Reports:
  """Collects device-side metrics and fetches them one step late, so the device never waits."""

  def __init__(self, trainer: Trainer, writer: MetricsWriter | None, progress: Progress):
    self._trainer, self._writer, self._progress = trainer, writer, progress
    self._window: list[dict[str, jax.Array]] = []
    self._ready: tuple[int, list] | None = None
    self.last: dict[str, Any] = {}

  def start(self, params, batch, step):
    tokens = batch.get("tokens", next(iter(batch.values())))
    self._tokens = int(np.prod(tokens.shape[:2])) * jax.process_count()
    length = tokens.shape[1] if tokens.ndim > 1 else 1
    self._flops = self._trainer.task.flops_per_token(params, length)
    self._time, self._step = time.perf_counter(), step
    self._begin, self._first = self._time, None

  def add(self, step, metrics):
    if self._window:
      # One step of slack bounds how far the host runs ahead.
      jax.block_until_ready(self._window[-1]["loss"])
    if self._first is None and step > self._step + 1:
      # From here on no step compiles, so rates leave the first step out.
      self._first = time.perf_counter() - self._begin
      self._progress.line(f"compiled and ran the first step in {clock(self._first)}")
      self._time, self._step = time.perf_counter(), step - 1
    if self._ready is not None:
      self._emit()
    self._window.append(metrics)

  def request(self, step):
    """Report the window that ends here, once its numbers have arrived."""
    self._ready, self._window = (step, self._window), []

  def flush(self):
    if self._ready is not None:
      self._emit()
    elif self._window:
      self._check(jax.device_get(self._window[-1]))

  def _check(self, metrics):
    if not np.isfinite(metrics["loss"]):
      raise UserError(
        f"the loss is {float(metrics['loss'])}; lower the learning rate or clip harder, and resume "
        "from the last checkpoint"
      )

  def _emit(self):
    step, window = self._ready
    self._ready = None
    rows = jax.device_get(window)
    now = time.perf_counter()
    for row in rows:
      self._check(row)
    names = ["loss", *(name for name in rows[0] if name not in ("loss", "weight"))]
    values = {name: np.mean([row[name] for row in rows], axis=0) for name in names}
    values["learning_rate"] = rows[-1]["learning_rate"]
    spent, steps = now - self._time, step - self._step
    shown: dict[str, Any] = dict(values)
    if steps > 0 and spent > 0 and self._first is not None:
      rate = self._tokens * steps / spent
      devices = self._trainer.mesh.devices
      peak = peak_flops(devices.flat[0])
      values["tokens_per_second"] = rate
      values["model_flops_per_second"] = rate * self._flops
      shown[""] = f"{human(rate)} tok/s"
      if peak is None:
        shown["model"] = human(rate * self._flops, "FLOP/s")
      else:
        values["mfu"] = rate * self._flops / (peak * devices.size)
        shown["MFU"] = f"{values['mfu']:.1%}"
      shown["eta"] = clock((self._trainer.config.steps - step) * spent / steps)
      self._time, self._step = now, step
    self.last = values
    if self._writer is not None:
      self._writer.write(step, "train", values)
    self._progress.report(step, shown)

  def evaluated(self, step, values, seconds):
    self._time += seconds  # evaluation is no training time
    if self._writer is not None:
      self._writer.write(step, "eval", values)
    self._progress.report(step, {"eval:": "", **values})
