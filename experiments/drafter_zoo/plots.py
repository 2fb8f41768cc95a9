# SPDX-License-Identifier: Apache-2.0
"""The two pictures: tokens per step with intervals, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.drafter_zoo import measure
from jaxdec.report.plots import COLORS, new_figure

TREES = {"chain5": "chain of 5", "tree16": "tree of at most 16", "tree64": "tree of at most 64"}


def intervals(results: Sequence[dict[str, Any]], path: Path) -> None:
  """One line a drafter, one point a tree, 95 % bootstrap intervals; best tree of 16 on top."""
  values = {
    r["drafter"]: {
      row["drafter"]: measure.tokens_per_step(row) for row in r["rows"] if row["drafter"] in TREES
    }
    for r in results
  }

  def rank(name):
    found = values[name]
    return found.get("tree16", found.get("chain5", (0.0,)))[0]

  names = sorted(values, key=rank)
  canvas, (axis,) = new_figure(1, 7.0, 1.2 + 0.32 * len(names))
  for j, (tree, label) in enumerate(TREES.items()):
    rows = [(i, *values[name][tree]) for i, name in enumerate(names) if tree in values[name]]
    places = [i + 0.22 * (j - 1) for i, *_ in rows]
    middle = [v for _, v, _, _ in rows]
    errors = [[v - low for _, v, low, _ in rows], [high - v for _, v, _, high in rows]]
    axis.errorbar(middle, places, xerr=errors, fmt="o", ms=3, lw=1, color=COLORS[j], label=label)
  axis.set_yticks(range(len(names)), names)
  axis.axvline(1.0, color="0.6", linewidth=0.8)
  axis.set_xlabel("tokens per target pass (greedy, 95 % over prompts)")
  axis.legend(frameon=False, fontsize=8, loc="lower right")
  canvas.savefig(path, format="png")


def cost(rows: Sequence[dict[str, Any]], path: Path) -> None:
  """Tokens per step of the chain against trained parameters and the drafter's share of time."""
  canvas, (left, right) = new_figure(2, 10.0, 4.0)
  for i, row in enumerate(rows):
    if "chain5" not in row:  # a dynamic tree's size is another
      continue
    value = float(str(row["chain5"]).split()[0])
    for axis, key in ((left, "parameters"), (right, "draft_share")):
      if key not in row:
        continue
      axis.plot([row[key]], [value], "o", ms=4, color=COLORS[i % len(COLORS)])
      axis.annotate(
        row["drafter"], (row[key], value), fontsize=6, xytext=(3, 2), textcoords="offset points"
      )
  for axis in (left, right):
    axis.margins(x=0.15)  # room for the names
  left.set_xscale("symlog", linthresh=1e3)
  left.set_xlabel("trained parameters")
  right.set_xlabel("drafting, % of decoding time")
  left.set_ylabel("tokens per target pass")
  canvas.savefig(path, format="png")
