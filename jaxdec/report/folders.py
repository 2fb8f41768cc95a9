# SPDX-License-Identifier: Apache-2.0
"""Result folders: numbered, never overwritten."""

from __future__ import annotations

import re
from pathlib import Path

from jaxdec.errors import UserError


def numbered(parent: str | Path) -> Path:
  """Creates and returns the next free ``parent/001``, ``parent/002``, ...

  ``mkdir`` decides who owns a number, so two runs started together get different folders.

  Raises:
    UserError: ``parent`` is a file, or cannot be written.
  """
  parent = Path(parent)
  if parent.exists() and not parent.is_dir():
    raise UserError(f"results go into a folder, but {str(parent)!r} is a file; name another folder")
  try:
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(p.name) for p in parent.iterdir() if re.fullmatch(r"\d+", p.name)]
    number = max(taken, default=0) + 1
    while True:
      folder = parent / f"{number:03d}"
      try:
        folder.mkdir()
        return folder
      except FileExistsError:
        number += 1
  except OSError as error:
    raise UserError(
      f"cannot write into {str(parent)!r} ({error.strerror}); name a folder you may write to"
    ) from error
