# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.report import Column, Table, numbered, plain
from jaxdec.report.plots import benchmark, curves, read_metrics

COLUMNS = [Column("name", "drafter", align="left"), Column("x", spec=".2f"), Column("depth")]
ROWS = [
  {"name": "a|b", "x": 1.234, "depth": [1, 2], "extra": np.float32(0.5)},
  {"name": "c", "x": None, "depth": []},
]


def test_markdown_is_exact():
  table = Table(COLUMNS, ROWS, title="T", notes=["one"])
  assert table.markdown() == (
    "**T**\n\n"
    "| drafter |    x | depth |\n"
    "| ------- | ---: | ----: |\n"
    "| a\\|b    | 1.23 |   1 2 |\n"
    "| c       |    – |     – |\n"
    "\none\n"
  )


def test_json_keeps_every_value():
  content = json.loads(Table(COLUMNS, ROWS, title="T").json(machine={"cores": 2}))
  assert content["machine"] == {"cores": 2}
  assert content["rows"][0] == {"name": "a|b", "x": 1.234, "depth": [1, 2], "extra": 0.5}


def test_rich_shows_markup_as_text():
  from rich.console import Console

  console = Console(width=80, record=True, file=io.StringIO())
  console.print(Table(COLUMNS, [{"name": "[bold]x[/bold]", "x": 2.0}]).rich())
  assert "[bold]x[/bold]" in console.export_text()


def test_plain():
  @dataclasses.dataclass
  class Point:
    x: float
    y: tuple

  got = plain({"p": Point(float("nan"), (np.int32(3), np.arange(2))), 1: {2}, "n": None})
  assert got == {"p": {"x": None, "y": [3, [0, 1]]}, "1": [2], "n": None}


def test_numbered_never_reuses(tmp_path):
  root = tmp_path / "out"
  first, second = numbered(root), numbered(root)
  assert (first.name, second.name) == ("001", "002")
  (root / "notes").mkdir()
  (root / "041").mkdir()
  assert numbered(root).name == "042"
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match="is a file"):
    numbered(tmp_path / "file")


def test_benchmark_plot_without_acceptance(tmp_path):
  rows = [
    {"drafter": d, "temperature": t, "tokens_per_step": 1.0 + i, "speedup": 1.0,
     "accepted_by_depth": [0.5, 0.2] if i else []}
    for t in (0.0, 1.0) for i, d in enumerate(("none", "hydra"))
  ]  # fmt: skip
  path = benchmark(rows, tmp_path / "a.png")
  assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  benchmark(rows[:1], tmp_path / "b.png")


def test_curves(tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  with pytest.raises(UserError, match=r"no metrics\.jsonl"):
    curves([run], tmp_path / "c.png")
  lines = [{"step": i, "kind": "train", "loss": 3.0 - i, "heads": [1, 2]} for i in range(3)]
  text = "\n".join(json.dumps(line) for line in lines)
  (run / "metrics.jsonl").write_text(text + '\n{"step": 3, "lo')
  assert read_metrics(run) == lines  # a run killed while writing stays readable
  assert curves([run], tmp_path / "c.png").stat().st_size > 1000
  (run / "metrics.jsonl").write_text('{"step\n' + text)
  with pytest.raises(UserError, match="line 1 is damaged"):
    read_metrics(run)
