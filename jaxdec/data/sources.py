# SPDX-License-Identifier: Apache-2.0
"""One name for any source of documents."""

from __future__ import annotations

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
