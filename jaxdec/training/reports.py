# SPDX-License-Identifier: Apache-2.0
"""Metrics on their way from the device to the file and the screen, without making it wait."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxdec.training.metrics import MetricsWriter, Progress, clock, human, memory_use, peak_flops

if TYPE_CHECKING:
  from jaxdec.training.trainer import Trainer


class Reports:
  """Collects device-side metrics and fetches them one step late, so the device never waits.

  A step's seconds run from the arrival of the result before it to that of its own, evaluation left
  out: what a step costs with all that it waits for (data, saves). The first step, which compiles,
  is in no rate.
  """

  def __init__(self, trainer: Trainer, writer: MetricsWriter | None, progress: Progress):
    self._trainer, self._writer, self._progress = trainer, writer, progress
    self._window: list[dict[str, jax.Array]] = []
    self._ready: tuple[int, list] | None = None
    self._newest: jax.Array | None = None
    self._seconds: list[float] = []
    self._compiled = False
    self.last: dict[str, Any] = {}

  def start(self, params, batch):
    tokens = batch.get("tokens", next(iter(batch.values())))
    self._tokens = self._trainer.global_rows(tokens.shape[0]) * math.prod(tokens.shape[1:2])
    length = tokens.shape[1] if tokens.ndim > 1 else 1
    self._flops = self._trainer.task.flops_per_token(params, length)
    self._mark = time.perf_counter()

  def add(self, step, metrics):
    self._arrive()  # one step of slack bounds how far the host runs ahead
    if self._ready is not None:
      self._emit()
    self._window.append(metrics)
    self._newest = metrics["loss"]

  def request(self, step):
    """Report the window that ends here, once its numbers have arrived."""
    self._ready, self._window = (step, self._window), []

  def flush(self):
    self._arrive()
    if self._ready is not None:
      self._emit()

  def _arrive(self):
    """Waits for the newest step and takes its time."""
    if self._newest is None:
      return
    jax.block_until_ready(self._newest)
    self._newest, now = None, time.perf_counter()
    spent, self._mark = now - self._mark, now
    if self._compiled:
      self._seconds.append(spent)
    else:
      self._compiled = True
      self._progress.line(f"compiled and ran the first step in {clock(spent)}")

  def _emit(self):
    step, window = self._ready
    self._ready = None
    rows = jax.device_get(window)
    good = [row for row in rows if np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"])]
    names = ["loss", *(name for name in rows[0] if name not in ("loss", "weight"))]
    values = {name: np.mean([row[name] for row in good or rows], axis=0) for name in names}
    values["learning_rate"] = rows[-1]["learning_rate"]
    shown: dict[str, Any] = dict(values)
    if self._trainer.config.nan_policy == "skip":
      values["skipped"] = len(rows) - len(good)
      if len(good) < len(rows):
        shown["skipped"] = values["skipped"]
    if self._seconds:
      self._rates(values, shown)
      shown["eta"] = clock((self._trainer.config.steps - step) * np.mean(self._seconds))
      self._seconds = []
    self.last = values
    if self._writer is not None:
      self._writer.write(step, "train", values)
    self._progress.report(step, shown)

  def _rates(self, values, shown):
    """Tokens and FLOPs a second, memory, and how long steps took."""
    rate = self._tokens / np.mean(self._seconds)
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
    for percent in (50, 90, 99):
      values[f"step_seconds_p{percent}"] = np.percentile(self._seconds, percent)
    middle, slow = values["step_seconds_p50"], values["step_seconds_p99"]
    shown["time"] = f"{1e3 * middle:.3g} ms (p99 {1e3 * slow:.3g})"
    memory = memory_use(devices.flat)
    values.update(memory)
    if memory:
      shown["HBM"] = human(memory["hbm_peak_bytes"], "B")

  def evaluated(self, step, values, seconds, kind="eval"):
    self._mark += seconds  # evaluation is no training time
    if self._writer is not None:
      self._writer.write(step, kind, values)
    self._progress.report(step, {f"{kind}:": "", **values})
