# SPDX-License-Identifier: Apache-2.0
"""Folders that hold models: checked before anything heavy is imported, replaced atomically.

Nothing here imports JAX, so that a wrong path or a damaged file is reported at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdec.errors import UserError
from jaxdec.io import hf_config
from jaxdec.io.safetensors import File

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a model folder may hold and still be replaced by a save that says ``overwrite=True``.
_OURS = (
  "config.json",
  "generation_config.json",
  INDEX,
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
)


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object; raises UserError where the file is no such thing."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise UserError(
      f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
    ) from None
  except UnicodeDecodeError:
    raise UserError(f"{path} is not valid JSON: it is not UTF-8 text.") from None
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}.")
  return value


@dataclasses.dataclass(frozen=True)
class ModelFolder:
  """A folder in Hugging Face layout.

  Attributes:
    path: the folder. fields: its ``config.json``. generation: its ``generation_config.json`` or {}.
    files: tensor name -> the file that holds it.
  """

  path: Path
  fields: dict[str, Any]
  generation: dict[str, Any]
  files: dict[str, File]

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """Ids that end a sequence, of both files."""
    ids: list[int] = []
    for source in (self.fields, self.generation):
      value = source.get("eos_ids", source.get("eos_token_id"))
      ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))

  @property
  def bos_id(self) -> int | None:
    """The beginning-of-sequence id the files name."""
    named = self.fields.get("bos_id", self.fields.get("bos_token_id"))
    return self.generation.get("bos_token_id") if named is None else named


def open_model(folder: str | os.PathLike) -> ModelFolder:
  """Checks path, ``config.json`` and the headers of the weight files.

  Raises:
    UserError: the folder or one of its files is missing, unreadable or truncated, or its family or
      one of its fields is not supported.
  """
  path = Path(folder).expanduser()
  if not path.exists():
    raise UserError(
      f"folder '{folder}' does not exist; give a local folder in Hugging Face layout "
      "(nothing is downloaded)."
    )
  if not path.is_dir():
    raise UserError(
      f"'{folder}' is a file; give the folder that holds config.json and the weights."
    )
  if not (path / "config.json").is_file():
    raise UserError(
      f"folder '{folder}' has no config.json; give a folder in Hugging Face layout "
      "(config.json, *.safetensors, tokenizer.json)."
    )
  fields = read_json(path / "config.json")
  if hf_config.family_of(fields) != "jaxdec":
    hf_config.parse(fields)
  generation = path / "generation_config.json"
  return ModelFolder(
    path, fields, read_json(generation) if generation.is_file() else {}, weight_files(path)
  )


def weight_files(path: Path) -> dict[str, File]:
  """Tensor name -> the safetensors file that holds it, of one file or an index of several.

  Raises:
    UserError: no weights, or files that are missing or truncated.
  """
  if (path / INDEX).is_file():
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict):
      raise UserError(f"{path / INDEX} has no 'weight_map'; write the checkpoint again.")
    shards = sorted(set(index.values()))
    missing = [s for s in shards if not (path / s).is_file()]
    if missing:
      raise UserError(
        f"folder '{path}' lacks {len(missing)} of {len(shards)} weight files: "
        f"{listed(missing)}; copy them too."
      )
    opened = {s: File(path / s) for s in shards}
    files = {name: file for file in opened.values() for name in file.entries}
    absent = sorted(set(index) - set(files))
    if absent:
      raise UserError(
        f"folder '{path}': {INDEX} names tensors that no file holds: {listed(absent)}."
      )
  elif (path / SINGLE).is_file():
    file = File(path / SINGLE)
    files = dict.fromkeys(file.entries, file)
  else:
    other = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = f" (found {listed(other)}: convert it to safetensors)" if other else ""
    raise UserError(f"folder '{path}' has no weights: neither {SINGLE} nor {INDEX}{hint}.")
  truncated = sorted(name for name, file in files.items() if name in file.truncated)
  if truncated:
    names = listed(sorted({files[n].path.name for n in truncated}))
    raise UserError(
      f"folder '{path}': {names} is truncated; incomplete tensors: {listed(truncated)}; "
      "download or copy it again."
    )
  return files


def listed(names: list[str], limit: int = 8) -> str:
  """``a, b, c and 5 more``."""
  rest = len(names) - limit
  return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def check_target(folder: str | os.PathLike, overwrite: bool) -> Path:
  """Whether a save may go to ``folder``; raises UserError where it would destroy something."""
  path = Path(folder).expanduser()
  if path.exists() and not path.is_dir():
    raise UserError(f"'{folder}' is a file; give a folder to save into.")
  content = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
  if not content:
    return path
  foreign = [n for n in content if n not in _OURS and not n.endswith(".safetensors")]
  if foreign or "config.json" not in content:
    raise UserError(
      f"folder '{folder}' holds something else ({listed(foreign or content, 3)}) and is "
      "left as it is; give a new folder."
    )
  if not overwrite:
    raise UserError(
      f"folder '{folder}' already holds a model; give a new folder or overwrite=True."
    )
  return path


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
  """A temporary folder beside ``target`` that takes its place when the block ends without an error.

  Until then ``target`` is untouched; a previous folder is moved aside first and deleted last.
  """
  target = Path(os.path.abspath(target))
  target.parent.mkdir(parents=True, exist_ok=True)
  work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
  try:
    yield work
    umask = os.umask(0)
    os.umask(umask)
    work.chmod(0o777 & ~umask)  # mkdtemp makes it private
    aside = None
    if target.exists():
      if any(target.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
      else:
        target.rmdir()
    if aside is not None:
      os.replace(target, aside)
    try:
      os.replace(work, target)
    except BaseException:
      if aside is not None:
        os.replace(aside, target)
      raise
    if aside is not None:
      shutil.rmtree(aside, ignore_errors=True)
  finally:
    shutil.rmtree(work, ignore_errors=True)
