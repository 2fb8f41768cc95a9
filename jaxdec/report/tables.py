# SPDX-License-Identifier: Apache-2.0
"""One table, three outputs: Markdown for files, JSON for programs, rich for the terminal."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Column:
  """One column.

  Attributes:
    key: name of the value in a row.
    title: heading; defaults to the key.
    spec: format spec for numbers (``".2f"``); other values are written with ``str``.
    align: side the cells are set to.
    terminal: heading for the terminal, narrow by its own line breaks ("" hides the column there);
      cells of such a column are never broken.
    shorten: text of a value for the terminal, where that differs.
  """

  key: str
  title: str = ""
  spec: str = ""
  align: Literal["left", "right"] = "right"
  terminal: str | None = None
  shorten: Callable[[Any], str] | None = None

  def text(self, row: Mapping[str, Any]) -> str:
    """The cell of ``row``: a dash for no value or NaN, spaces between the items of a sequence."""
    return _text(row.get(self.key), self.spec)


def _text(value: Any, spec: str) -> str:
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return "–"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, (list, tuple)):
    return " ".join(_text(item, spec) for item in value) or "–"
  if isinstance(value, (int, float)):
    return format(value, spec)
  return str(value)


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of named values with the columns to show; values that no column names stay in the JSON."""

  columns: Sequence[Column]
  rows: Sequence[Mapping[str, Any]]
  title: str = ""
  notes: Sequence[str] = ()

  def markdown(self) -> str:
    """A GitHub table; pipes inside cells are escaped."""
    heads = [c.title or c.key for c in self.columns]
    cells = [[c.text(row) for c in self.columns] for row in self.rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    width = [max(3, len(h), *(len(row[i]) for row in cells)) for i, h in enumerate(heads)]
    rule = [
      "-" * n if c.align == "left" else "-" * (n - 1) + ":" for c, n in zip(self.columns, width)
    ]
    lines = [f"**{self.title}**", ""] if self.title else []
    for row in (heads, rule, *cells):
      padded = [
        text.ljust(n) if c.align == "left" else text.rjust(n)
        for c, text, n in zip(self.columns, row, width)
      ]
      lines.append("| " + " | ".join(padded) + " |")
    if self.notes:
      lines += ["", *(f"{note}  " for note in self.notes)]
    return "\n".join(lines).rstrip() + "\n"

  def json(self, **extra: Any) -> str:
    """Title, rows and ``extra`` (machine, command, ...) as JSON; NaN and infinity become null."""
    content = {"title": self.title, **extra, "rows": [dict(row) for row in self.rows]}
    if self.notes:
      content["notes"] = list(self.notes)
    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"

  def rich(self):
    """A ``rich.table.Table`` for the terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
      title=self.title or None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
      pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    shown = [column for column in self.columns if column.terminal != ""]
    for column in shown:
      title = column.terminal or column.title or column.key
      table.add_column(
        title, justify=column.align, overflow="fold", no_wrap=column.terminal is not None
      )
    for row in self.rows:
      table.add_row(
        *(
          Text(column.text(row) if column.shorten is None else column.shorten(row.get(column.key)))
          for column in shown
        )
      )
    return table


def plain(value: Any) -> Any:
  """``value`` with arrays, NumPy scalars, tuples and dataclasses turned into what JSON knows."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple, set, frozenset)):
    return [plain(v) for v in value]
  if hasattr(value, "tolist"):
    return plain(value.tolist())
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, (bool, int, str)):
    return value
  return str(value)
