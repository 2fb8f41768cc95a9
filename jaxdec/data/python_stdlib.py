# SPDX-License-Identifier: Apache-2.0
"""The standard library of the running interpreter as a corpus: real code on every machine.

About 30 MB of Python (the `test` packages included where they are installed), no download. What is
left out, and why, is `is_table` and `sources`: a language model of code learns nothing from a
character map.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from jaxdec.data.documents import DEFAULT_SHARES, Document, SplitShares, check_split, split_of
from jaxdec.errors import UserError

# lib2to3/tests/data holds files in odd encodings and in Python 2, kept to be mangled by a tool.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_SKIPPED_PATHS = frozenset({"lib2to3/tests/data"})

_TABLE_SHARE = 0.7
# A row of a literal table: starts with a quote, a digit, a sign or a bracket, and calls nothing and
# assigns nothing outside its quotes.
_TABLE_ROW = re.compile(r"\s*(?:[bru]{0,2}(['\"]).*\1|[-\d(\[{'\"\\][^a-zA-Z=]*)[^=]*(?:#.*)?")


def is_table(text: str) -> bool:
  """Whether more than 70 % of the non-blank lines are rows of a literal table.

  True for the character maps under `encodings`, `pydoc_data/topics.py`, `html/entities.py` and the
  build variables in `_sysconfigdata*`, which are 7 % of the text.
  """
  lines = [line for line in text.splitlines() if line.strip()]
  # Cut, because the pattern is quadratic on a long line that it rejects at the end.
  rows = sum(1 for line in lines if _TABLE_ROW.fullmatch(line[:200]))
  return rows > _TABLE_SHARE * len(lines)


def _decode(raw: bytes) -> str | None:
  """The text of a source file by its own encoding declaration, or None where it does not decode."""
  try:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    text = raw.decode(encoding)
  except (SyntaxError, UnicodeDecodeError, LookupError):
    return None
  return text.replace("\r\n", "\n").replace("\r", "\n")


def _paths(root: Path) -> list[str]:
  found = []
  for folder, children, names in os.walk(root):
    relative = Path(folder).relative_to(root)
    children[:] = [
      c
      for c in children
      if c not in _SKIPPED_FOLDERS and (relative / c).as_posix() not in _SKIPPED_PATHS
    ]
    found += [(relative / name).as_posix() for name in names if name.endswith(".py")]
  return sorted(found)


def sources(
  split: str = "train",
  *,
  shares: SplitShares = DEFAULT_SHARES,
  root: str | os.PathLike | None = None,
) -> Iterator[Document]:
  """The source files of `split` in order of their relative path.

  Left out: installed packages, files that do not decode, empty files, files identical to an earlier
  one (by content hash, over all splits, so that no text is in two of them) and literal tables.

  Args:
    split: train, validation, test, or all.
    shares: how much goes to validation and test; by number of files, in expectation.
    root: another folder of Python files to read by the same rules.

  Raises:
    UserError: for an unknown split, or where no source file is installed.
  """
  check_split(split)
  root = Path(root if root is not None else sysconfig.get_path("stdlib"))
  paths = _paths(root) if root.is_dir() else []
  if not paths:
    raise UserError(
      f"no Python source files under {str(root)!r}; "
      "use an interpreter that ships its standard library as .py files"
    )
  return _read(root, paths, split, shares)


def _read(root: Path, paths: list[str], split: str, shares: SplitShares) -> Iterator[Document]:
  seen = set()
  for path in paths:
    try:
      raw = (root / path).read_bytes()
    except OSError:  # a dangling link, or a file this user may not read
      continue
    digest = hashlib.sha256(raw).digest()
    if not raw.strip() or digest in seen:
      continue
    seen.add(digest)
    if split not in ("all", split_of(path, shares)):
      continue
    text = _decode(raw)
    if text is not None and not is_table(text):
      yield Document(path, text)
