# SPDX-License-Identifier: Apache-2.0
"""TFDS builders over the same documents, written and read as array_record, without TensorFlow.

Needs the `data` extra. The version folder of a prepared data set carries a hash of its documents,
so another interpreter, or an edited folder, is another data set and nothing stale is read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from jaxdec.data import python_stdlib, text_folder
from jaxdec.data.corpus import cache_folder
from jaxdec.data.documents import SPLITS, Document
from jaxdec.errors import UserError, nearest

try:
  # importlib_resources is imported by tensorflow-datasets 4.9.10 but not declared by it.
  import absl.logging
  import importlib_resources  # noqa: F401
  import tensorflow_datasets as tfds
except ImportError as error:
  raise UserError(
    f"TFDS data needs the `data` extra ({error}); install it with: pip install 'jaxdec[data]'"
  ) from error

FILE_FORMAT = "array_record"
Read = Callable[[str], Iterator[Document]]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """No progress bars and no talk of downloading, where nothing is; errors still raise."""
  level = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
    absl.logging.set_verbosity(level)


def _digest(read: Read) -> str:
  digest = hashlib.sha256()
  for document in read("all"):
    for part in (document.path.encode(), document.text.encode()):
      digest.update(len(part).to_bytes(8, "little") + part)
  return digest.hexdigest()[:12]


class _DocumentBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes the documents of `self._read_split` in their own order."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First."}

  def __init__(self, read: Read, config_name: str, **kwargs: Any):
    self._read_split = read
    config = tfds.core.BuilderConfig(name=f"{config_name}_{_digest(read)}", version=self.VERSION)
    kwargs.setdefault("data_dir", str(cache_folder() / "tfds"))
    kwargs.setdefault("file_format", FILE_FORMAT)
    with _quiet():  # else it warns that the configuration is not one of a fixed list
      super().__init__(config=config, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(
        {"path": tfds.features.Text(), "text": tfds.features.Text()}
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    del dl_manager  # there is nothing to download
    # A split without a document is left out: TFDS refuses to write an empty one.
    return {s: self._examples(s) for s in SPLITS if next(self._read_split(s), None)}

  def _examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
    for index, document in enumerate(self._read_split(split)):
      yield index, {"path": document.path, "text": document.text}

  def _generate_examples(self, split: str) -> Iterator:
    return self._examples(split)


class PythonStdlib(_DocumentBuilder):
  """Standard library sources of the interpreter that prepared it, split by hash of the path."""

  name = "python_stdlib"

  def __init__(self, *, root: str | os.PathLike | None = None, **kwargs: Any):
    read = functools.partial(python_stdlib.sources, root=root)
    super().__init__(read, sys.implementation.cache_tag.replace("-", "_"), **kwargs)


class TextFolder(_DocumentBuilder):
  """Any folder of text or JSONL files, split by hash of the path; see `text_folder.sources`."""

  name = "text_folder"

  def __init__(self, *, path: str | os.PathLike, field: str = "text", **kwargs: Any):
    text_folder.sources(path)  # a missing folder is reported before anything is hashed
    read = functools.partial(text_folder.sources, path, field=field)
    super().__init__(read, "documents", **kwargs)


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
  """Writes the data set unless it is there already."""
  with _quiet():
    builder.download_and_prepare(file_format=FILE_FORMAT)
  return builder


def read(name: str, split: str = "train", *, field: str = "text") -> Iterator[Document]:
  """Documents of a prepared TFDS data set, by random access to its array_record files.

  Args:
    name: `python_stdlib`, prepared on first use; else a data set already prepared under the TFDS
      data folder, as `name`, `name/config` or `name/config:version`.
    split: one of the data set's own; `all` is every split in turn.
    field: the feature that holds the text.

  Raises:
    UserError: if it is not prepared, not array_record, or has no such split or feature.
  """
  builder = prepare(PythonStdlib()) if name == "python_stdlib" else _prepared(name)
  splits = list(builder.info.splits)
  wanted = splits if split == "all" else [split]
  if split not in (*splits, "all"):
    raise UserError(
      f"tfds:{name} has no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}"
    )
  features = list(builder.info.features)
  if field not in features:
    raise UserError(
      f"tfds:{name} has no field {field!r}{nearest(field, features)}; "
      f"it has {', '.join(sorted(features))}"
    )
  return _documents(builder, wanted, field)


def _prepared(name: str) -> tfds.core.DatasetBuilder:
  from tensorflow_datasets.core import read_only_builder

  folder = Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
  try:
    # From files alone: the registry's lookup would ask the network for an unknown name.
    builder = read_only_builder.builder_from_files(name, data_dir=str(folder))
  except (tfds.core.DatasetNotFoundError, ValueError, FileNotFoundError) as error:
    raise UserError(
      f"tfds:{name} is not prepared under {str(folder)!r}; prepare it first "
      f"(tfds build {name} --file_format={FILE_FORMAT}) or set TFDS_DATA_DIR"
    ) from error
  found = builder.info.file_format
  if found is None or found.value != FILE_FORMAT:
    raise UserError(
      f"tfds:{name} is stored as {found and found.value}, which only TensorFlow reads; "
      f"prepare it with --file_format={FILE_FORMAT}"
    )
  return builder


def _documents(
  builder: tfds.core.DatasetBuilder, splits: list[str], field: str
) -> Iterator[Document]:
  for split in splits:
    examples = builder.as_data_source(split=split)
    for index in range(len(examples)):
      example = examples[index]
      text, path = example[field], example.get("path", f"{split}#{index}")
      yield Document(
        path.decode() if isinstance(path, bytes) else str(path),
        text.decode() if isinstance(text, bytes) else str(text),
      )
