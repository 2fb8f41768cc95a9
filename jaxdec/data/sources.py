# SPDX-License-Identifier: Apache-2.0
"""One name for any source of documents."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from jaxdec.data import python_stdlib, text_folder
from jaxdec.data.documents import Document, check_split
from jaxdec.errors import UserError, nearest

_TFDS = "tfds:"


def open_source(
  source: str | os.PathLike, split: str = "train", *, field: str = "text"
) -> Iterator[Document]:
  """The documents of a split, by name.

  Args:
    source: `python_stdlib`; `tfds:NAME` for a data set that TFDS has prepared here, or for one of
      our builders (then prepared on first use; needs the `data` extra); or a path to a folder of
      text or JSONL files, or to one such file. Nothing is ever downloaded.
    split: train, validation, test, or all.
    field: the text field of JSONL lines and TFDS examples.

  Raises:
    UserError: if there is no such source, split or field.
  """
  name = os.fspath(source)
  check_split(split)
  if name == "python_stdlib":
    return python_stdlib.sources(split)
  if name.startswith(_TFDS):
    from jaxdec.data import tfds_builders

    return tfds_builders.read(name.removeprefix(_TFDS), split, field=field)
  if not Path(name).expanduser().exists() and os.sep not in name:
    raise UserError(
      f"no data source {name!r}{nearest(name, ['python_stdlib'])}; "
      "use python_stdlib, tfds:NAME, or the path of an existing folder"
    )
  return text_folder.sources(name, split, field=field)


def parse_mixture(text: str) -> list[tuple[float, str]]:
  """``"0.7*runs/answers + 0.3*python_stdlib"`` as weights and names; a bare name weighs 1.

  Raises:
    UserError: a part without a name, or a weight that is no positive number.
  """
  parts = text.split(" + ") if "*" in text else [text]
  out = []
  for part in parts:
    weight, star, name = part.strip().partition("*")
    if not star:
      weight, name = "1", part.strip()
    try:
      number = float(weight)
    except ValueError:
      number = math.nan
    if not name.strip() or not 0 < number < math.inf:
      raise UserError(
        f"a mixture is written WEIGHT*SOURCE + WEIGHT*SOURCE, such as 0.7*answers + "
        f"0.3*python_stdlib, got {text!r}"
      )
    out.append((number, name.strip()))
  return out
