# SPDX-License-Identifier: Apache-2.0
"""A run is a folder; this file keeps one run from touching another's.

``config.json`` holds the resolved configuration. The same configuration continues the run; another
one is refused with the first difference.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxdec.errors import UserError
from jaxdec.parallel.distributed import gather_texts
from jaxdec.training.config import TrainerConfig

# How a run is watched, stored and spread over devices does not change what it computes (up to
# rounding, for the mesh), so a resumed run may differ in these.
FREE = frozenset(
  {
    "work_dir",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep",
    "nan_policy",
    "max_skips",
    "profile",
    "tensorboard",
    "progress",
    "mesh",
  }
)


def to_json(value: Any) -> Any:
  """Nested dataclasses, mappings and sequences as plain JSON values.

  A nested dataclass records its class where a field may hold one of several (``"type"``).
  """
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"type": type(value).__name__, **fields}
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  if value is None or isinstance(value, bool | int | float | str):
    return value
  return str(value)


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
  """Dotted path, old and new value of every leaf that differs."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    for key in sorted({*old, *new}):
      where = f"{path}.{key}" if path else key
      yield from differences(old.get(key), new.get(key), where)
  elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    for i, (a, b) in enumerate(zip(old, new)):
      yield from differences(a, b, f"{path}[{i}]")
  elif old != new:
    yield path, old, new


def _free(where: str) -> bool:
  """Whether a setting may change between the parts of one run; see ``FREE``."""
  room, _, rest = where.partition(".")
  if room == "trainer":
    return rest.split(".")[0] in FREE
  return room == "rules" or where.split(".")[:2] == ["task", "sequence"]


class RunFolder:
  """Claims a work directory for one configuration; ``close`` gives it back.

  Raises:
    UserError: the directory holds another run, something else, or a live process's run.
  """

  def __init__(self, path: str | pathlib.Path, config: dict[str, Any]):
    self.path = pathlib.Path(path).absolute()
    self._lock = None
    # The first process decides; the others hear its objection, or find what it wrote.
    problem = ""
    if jax.process_index() == 0:
      try:
        self._open(path, config)
      except UserError as error:
        problem = str(error)
    problem = gather_texts(problem)[0]
    if problem:
      raise UserError(problem)
    if jax.process_index():
      stored = self.path / "config.json"
      if not stored.is_file():
        raise UserError(
          f"process {jax.process_index()} does not see work_dir {str(path)!r}, which process 0 has "
          "opened; all processes need the same folder, on a file system they share"
        )
      self._same(path, _read(stored), config)

  def _open(self, path, config):
    stored = self.path / "config.json"
    if self.path.exists() and not self.path.is_dir():
      raise UserError(f"work_dir {str(path)!r} is a file; give a folder, new or of the same run")
    if stored.is_file():
      self._same(path, _read(stored), config)
    elif self.path.is_dir() and any(p.name != ".lock" for p in self.path.iterdir()):
      raise UserError(
        f"work_dir {str(path)!r} holds files that are no training run (no config.json); "
        "give a new folder"
      )
    self.path.mkdir(parents=True, exist_ok=True)
    self._claim(path)
    if not stored.is_file():
      temporary = stored.with_suffix(".tmp")
      temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
      os.replace(temporary, stored)

  @staticmethod
  def _same(path, old, new):
    if "trainer" in old:  # a setting that the run's version did not have yet was at its default
      old = {**old, "trainer": {**to_json(TrainerConfig()), **old["trainer"]}}
    found = [item for item in differences(old, json.loads(json.dumps(new))) if not _free(item[0])]
    if found:
      where, before, now = found[0]
      more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
      raise UserError(
        f"work_dir {str(path)!r} already holds another run: {where} is {before!r} there and "
        f"{now!r} here{more}; give a new work_dir, or the same configuration to resume"
      )

  def _claim(self, path):
    """One process per folder. The kernel drops the lock with the process, however it ends."""
    try:
      import fcntl
    except ImportError:  # Windows
      return
    self._lock = (self.path / ".lock").open("w")
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      self._lock.close()
      raise UserError(
        f"work_dir {str(path)!r} is in use by a run that is still going; wait for it, stop it, or "
        "give another work_dir"
      ) from error
    except OSError:
      pass  # a file system without locks

  def close(self) -> None:
    if self._lock is not None:
      self._lock.close()
      self._lock = None


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(
      f"{str(path)!r} is not valid JSON ({error}); give a new work_dir, or restore the file"
    ) from error
