# SPDX-License-Identifier: Apache-2.0
"""Plots as PNG files: benchmark and training curves. matplotlib is loaded on first use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdec.errors import UserError

# Okabe and Ito's palette: distinguishable with any colour vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")


def new_figure(columns: int, width: float, height: float):
  """A figure with its own Agg canvas, whatever backend or style the caller has set."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, columns, squeeze=False)[0]
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  return figure, axes


def benchmark(rows: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "") -> Path:
  """Three panels: tokens per step, speed-up over plain decoding, acceptance by depth.

  Args:
    rows: as ``jaxdec.bench`` writes them; ``drafter``, ``temperature``, ``tokens_per_step``,
      ``speedup`` and ``accepted_by_depth`` are read.
    path: PNG to write.
  """
  figure, (steps, speed, depth) = new_figure(3, 12.0, 3.6)
  names = list(dict.fromkeys(row["drafter"] for row in rows))
  laws = list(dict.fromkeys(row["temperature"] for row in rows))
  height = 0.8 / len(laws)
  for axis, key, label in (
    (steps, "tokens_per_step", "tokens per target pass"),
    (speed, "speedup", "speed-up over plain decoding"),
  ):
    for j, law in enumerate(laws):
      value = {row["drafter"]: row[key] for row in rows if row["temperature"] == law}
      places = [i + (j - (len(laws) - 1) / 2) * height for i in range(len(names))]
      bars = axis.barh(
        places, [value.get(name) or 0.0 for name in names], height, color=COLORS[j],
        label="greedy" if law == 0 else f"temperature {law:g}",
      )  # fmt: skip
      axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axis.axvline(1.0, color="0.6", linewidth=0.8)
    axis.margins(x=0.15)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(label)
  # the upper right corner belongs to the first bar, plain decoding, the shortest of all
  steps.legend(frameon=False, fontsize=8, loc="upper right")
  for i, name in enumerate(names):
    row = next(r for r in rows if r["drafter"] == name and r["temperature"] == laws[0])
    accepted = list(row.get("accepted_by_depth") or [])
    if accepted:
      depth.plot(range(1, len(accepted) + 1), accepted, "o-", ms=3, color=COLORS[i % 8], label=name)
  depth.set_xlabel("draft depth" + (" (greedy)" if laws[0] == 0 else ""))
  depth.set_ylabel("share of steps accepted to this depth")
  depth.set_ylim(0, 1)
  depth.xaxis.get_major_locator().set_params(integer=True)
  if depth.lines:
    depth.legend(frameon=False, fontsize=8)
  if title:
    figure.suptitle(title, fontsize=10)
  figure.savefig(path, format="png")
  return Path(path)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
  """The lines of a run's ``metrics.jsonl``; a last line cut off by a kill is left out.

  Raises:
    UserError: no such file, or a damaged line that is not the last.
  """
  path = Path(run) / "metrics.jsonl"
  if not path.is_file():
    raise UserError(f"no metrics.jsonl in {str(run)!r}; give the folder of a training run")
  lines = path.read_text(encoding="utf-8").splitlines()
  out = []
  for number, line in enumerate(lines, 1):
    try:
      out.append(json.loads(line))
    except ValueError:
      if number < len(lines):
        raise UserError(f"{path}, line {number} is damaged") from None
  return out


def curves(runs: Sequence[str | Path], path: str | Path) -> Path:
  """Every scalar metric of the runs against the step: one panel a metric, one line a run."""
  series: dict[str, dict[str, tuple[list, list]]] = {}
  for run in runs:
    for line in read_metrics(run):
      step = line.get("step")
      for key, value in line.items():
        if (
          key in ("step", "time") or isinstance(value, bool) or not isinstance(value, (int, float))
        ):
          continue
        panel = f"{line['kind']} {key}" if line.get("kind") else key
        xs, ys = series.setdefault(panel, {}).setdefault(Path(run).name, ([], []))
        xs.append(step)
        ys.append(value)
  if not series:
    raise UserError(f"no numbers to plot in {', '.join(str(run) for run in runs)}")
  keys = sorted(series)
  figure, axes = new_figure(len(keys), 3.2 * len(keys), 3.0)
  for axis, key in zip(axes, keys):
    for i, (name, (xs, ys)) in enumerate(series[key].items()):
      axis.plot(xs, ys, color=COLORS[i % len(COLORS)], linewidth=1, label=name)
    axis.set_title(key, fontsize=9)
    axis.set_xlabel("step")
  axes[0].legend(frameon=False, fontsize=8)
  figure.savefig(path, format="png")
  return Path(path)
