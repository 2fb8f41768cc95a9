# SPDX-License-Identifier: Apache-2.0
"""What a run tells: ``metrics.jsonl`` always, TensorBoard on request, one line per report."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxdec.errors import UserError

# Dense bf16 FLOP/s of a JAX device, from the vendors' data sheets; the longest matching prefix
# counts. A device is a chip, but on TPU7x one of a chip's two cores.
_PEAK = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H100": 989e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L4": 121e12,
  "Tesla T4": 65e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """Peak dense bf16 FLOP/s of a device; None where unknown (CPUs)."""
  kind = device.device_kind
  found = [name for name in _PEAK if kind.startswith(name)]
  return _PEAK[max(found, key=len)] if found else None


def memory_use(devices: Iterable[jax.Device]) -> dict[str, int]:
  """Device memory in use now and at most so far, of this process's fullest device; ``{}`` where
  the backend does not tell (CPUs)."""
  local = [d for d in devices if d.process_index == jax.process_index()]
  stats = [s for d in local if (s := d.memory_stats())]
  names = {"hbm_bytes": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use"}
  return {
    name: max(s[key] for s in stats)
    for name, key in names.items()
    if stats and all(key in s for s in stats)
  }


def weighted_mean(parts: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
  """Mean of metrics over batches, each counted by its ``weight`` (1 where it has none); float64.

  Raises:
    UserError: nothing to average.
  """
  sums: dict[str, np.ndarray] = {}
  total = 0.0
  for part in parts:
    weight = float(part.get("weight", 1.0))
    total += weight
    for name, value in part.items():
      if name != "weight":
        sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64) * weight
  if not total:
    raise UserError("the evaluation data holds no labelled token; give longer or more text")
  return {name: value / total for name, value in sums.items()}


def plain(value: Any) -> Any:
  """Numbers and lists as JSON wants them; NaN and infinities as strings, which JSON lacks."""
  value = np.asarray(value)
  if value.ndim:
    return [plain(x) for x in value]
  if value.dtype.kind in "biu":
    return value.item()
  number = float(value)
  return number if math.isfinite(number) else str(number)


class MetricsWriter:
  """Appends one JSON object per report to ``metrics.jsonl``; silent on all processes but the first.

  Args:
    resume_step: reports beyond this step come from work that was lost with the crash and is about
      to be done again; they are dropped.

  Raises:
    UserError: TensorBoard asked for, and ``tensorboardX`` is not installed.
  """

  def __init__(self, folder: pathlib.Path, *, tensorboard: bool = False, resume_step: int = 0):
    self._file = self._board = None
    if jax.process_index():
      return
    path = folder / "metrics.jsonl"
    if path.exists():
      _drop_after(path, resume_step)
    self._file = path.open("a", encoding="utf-8")
    if tensorboard:
      self._board = _board(folder / "tensorboard", resume_step)

  def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    """One report: ``{"step": ..., "kind": ..., name: value, ...}``, kinds train, eval, inspect."""
    if self._file is None:
      return
    values = {name: plain(value) for name, value in values.items()}
    self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
    self._file.flush()
    if self._board is not None:
      for name, value in values.items():
        if isinstance(value, int | float):
          self._board.add_scalar(f"{kind}/{name}", value, step)

  def close(self) -> None:
    for sink in (self._file, self._board):
      if sink is not None:
        sink.close()


def _board(folder: pathlib.Path, resume_step: int):
  try:
    from tensorboardX import SummaryWriter
  except ImportError as error:
    raise UserError(
      "tensorboard=True needs the package tensorboardX, which is not installed; "
      "run `pip install tensorboardX` or set tensorboard=False"
    ) from error
  return SummaryWriter(str(folder), purge_step=resume_step + 1)


def _drop_after(path: pathlib.Path, step: int) -> None:
  kept = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except (ValueError, KeyError):
      continue  # the crash cut this line off
  temporary = path.with_suffix(".tmp")
  temporary.write_text("".join(kept), encoding="utf-8")
  os.replace(temporary, path)


def read_metrics(work_dir: str | pathlib.Path, kind: str | None = None) -> list[dict[str, Any]]:
  """The reports of a run, in order; ``kind`` picks one: train, eval or inspect."""
  path = pathlib.Path(work_dir) / "metrics.jsonl"
  if not path.is_file():
    raise UserError(f"no metrics.jsonl in {str(work_dir)!r}; give the work_dir of a training run")
  rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  return [row for row in rows if kind in (None, row["kind"])]


def human(number: float, unit: str = "") -> str:
  """``12.3k``, ``45.6G``."""
  for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(number) >= scale:
      return f"{number / scale:.1f}{' ' if unit else ''}{prefix}{unit}"
  return f"{number:.0f}{' ' if unit else ''}{unit}"


def clock(seconds: float) -> str:
  """``1h02m``, ``3m04s`` or ``5s``."""
  seconds = round(seconds)
  if seconds >= 3600:
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
  return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Progress:
  """One printed line per report, and on a terminal a live bar below it; first process only."""

  def __init__(self, steps: int, *, enabled: bool = True):
    self._steps = steps
    self._enabled = enabled and jax.process_index() == 0
    self._bar = self._task = None
    if self._enabled and sys.stdout.isatty():
      from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
      from rich.progress import Progress as Bar

      columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
      self._bar = Bar(*columns, transient=True)
      self._task = self._bar.add_task("training", total=steps)
      self._bar.start()

  def step(self, step: int) -> None:
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def line(self, text: str) -> None:
    """Prints one line, above the bar where there is one."""
    if not self._enabled:
      return
    if self._bar is not None:
      self._bar.console.print(text, highlight=False, markup=False)
    else:
      print(text, flush=True)

  def report(self, step: int, values: dict[str, Any]) -> None:
    """``step 20/100  loss 4.321  accuracy 0.25 ...``; vectors in brackets."""
    parts = [f"step {step}/{self._steps}"]
    for name, value in values.items():
      if isinstance(value, str):
        parts.append(f"{name} {value}" if name else value)
      elif np.ndim(value):
        parts.append(f"{name} [{' '.join(f'{float(x):.3f}' for x in np.asarray(value))}]")
      else:
        parts.append(f"{name} {float(value):.4g}")
    self.line("  ".join(parts))

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None
