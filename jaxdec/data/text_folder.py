# SPDX-License-Identifier: Apache-2.0
"""Any folder of text as a corpus: one document a file, or one a line of a JSONL file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from jaxdec.data.documents import DEFAULT_SHARES, Document, SplitShares, check_split, split_of
from jaxdec.errors import UserError, nearest

SUFFIXES = (".jsonl", ".md", ".py", ".txt")


def sources(
  path: str | os.PathLike,
  split: str = "train",
  *,
  field: str = "text",
  shares: SplitShares = DEFAULT_SHARES,
) -> Iterator[Document]:
  """The documents of `split`, in order of their relative path and line.

  The split is by hash of the relative path (`#line` appended for JSONL, counted from 1), so a
  document stays in its split whatever is added beside it. Hidden files and folders are left out.

  Args:
    path: a folder, searched to any depth, or one file.
    split: train, validation, test, or all.
    field: which field of a JSONL line holds the text.
    shares: how much goes to validation and test.

  Raises:
    UserError: for a missing or empty folder at once; for a line that is not a JSON object with
      that field, or a file that is not UTF-8, when it is reached, naming file and line.
  """
  check_split(split)
  root = Path(path).expanduser()
  if not root.exists():
    raise UserError(
      f"no such file or folder: {str(path)!r}; give a folder of {' '.join(SUFFIXES)} files"
    )
  if root.is_file() and root.suffix not in SUFFIXES:
    raise UserError(
      f"{str(path)!r} is not a text file by its name; it must end in one of {' '.join(SUFFIXES)}"
    )
  files = [root] if root.is_file() else _files(root)
  if not files:
    raise UserError(f"the folder {str(path)!r} holds no file that ends in {' '.join(SUFFIXES)}")
  base = root.parent if root.is_file() else root
  documents = (d for file in files for d in _read(file, file.relative_to(base).as_posix(), field))
  return (d for d in documents if split in ("all", split_of(d.path, shares)))


def _files(root: Path) -> list[Path]:
  found = []
  for folder, children, names in os.walk(root):
    children[:] = [c for c in children if not c.startswith(".") and c != "__pycache__"]
    found += [
      Path(folder, n) for n in names if Path(n).suffix in SUFFIXES and not n.startswith(".")
    ]
  return sorted(found, key=lambda f: f.relative_to(root).as_posix())


def _read(file: Path, name: str, field: str) -> Iterator[Document]:
  try:
    with open(file, encoding="utf-8") as stream:
      if file.suffix != ".jsonl":
        if (text := stream.read()).strip():
          yield Document(name, text)
        return
      for number, line in enumerate(stream, start=1):
        if line.strip():
          yield Document(f"{name}#{number}", _parse(line, file, number, field))
  except UnicodeDecodeError as error:
    raise UserError(f"{file} is not UTF-8 text ({error}); convert it or move it away") from error


def _parse(line: str, file: Path, number: int, field: str) -> str:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(
      f"{file}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
      "each line must be one JSON object"
    ) from error
  if not isinstance(record, dict):
    raise UserError(f"{file}, line {number}: expected a JSON object, got {type(record).__name__}")
  if field not in record:
    raise UserError(
      f"{file}, line {number}: no field {field!r}{nearest(field, record)}; "
      f"the line has {', '.join(sorted(record)) or 'no fields'}"
    )
  text = record[field]
  if not isinstance(text, str):
    raise UserError(
      f"{file}, line {number}: field {field!r} must be a string, got {type(text).__name__}"
    )
  return text
