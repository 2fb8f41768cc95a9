# SPDX-License-Identifier: Apache-2.0
"""Arguments to a frozen configuration; what tyro refuses becomes one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxdec.errors import UserError, nearest

_FRAME = "│╭╮╰╯─|+"


def parse(name: str, kind: type, args: Sequence[str]) -> Any:
  """An instance of ``kind`` from ``args``.

  A first argument that is no option names a Python file (``jaxdec distill config.py``) whose
  ``get_config()`` returns the defaults: an instance of ``kind``, or some of its fields.

  Raises:
    UserError: unknown option, bad value, or a bad configuration file.
  """
  args = list(args)
  default: Any = tyro.MISSING_NONPROP
  positional = any(_is_positional(f) for f in dataclasses.fields(kind))
  if args and not args[0].startswith("-") and not positional:
    default = from_file(kind, args.pop(0))
  errors = io.StringIO()
  try:
    with contextlib.redirect_stderr(errors):
      config, unknown = tyro.cli(
        kind, prog=f"jaxdec {name}", args=args, default=default, return_unknown_args=True,
      )  # fmt: skip
  except SystemExit as stop:
    if not stop.code:  # --help
      raise
    raise UserError(f"{_sentence(errors.getvalue())}; see `jaxdec {name} --help`") from None
  if unknown:
    word = unknown[0].partition("=")[0]
    options = [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(kind)]
    if not word.startswith("-"):
      raise UserError(
        f"unexpected argument {word!r} for `jaxdec {name}`; put text with spaces in quotes, "
        f"and see `jaxdec {name} --help`"
      )
    raise UserError(
      f"unknown option {word!r} for `jaxdec {name}`{nearest(word, options)}; "
      f"see `jaxdec {name} --help`"
    )
  return config


def from_file(kind: type, path: str) -> Any:
  """The defaults that ``get_config()`` in the Python file ``path`` returns."""
  file = Path(path)
  if file.suffix != ".py":
    raise UserError(
      f"unexpected argument {path!r}; options begin with --, configurations end in .py"
    )
  if not file.is_file():
    raise UserError(f"configuration file {path!r} does not exist")
  try:
    names = runpy.run_path(str(file))
  except Exception as error:
    raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
  if not callable(names.get("get_config")):
    raise UserError(f"{path} must define a function get_config()")
  config = names["get_config"]()
  if isinstance(config, kind):
    return config
  if not isinstance(config, Mapping):
    raise UserError(
      f"get_config() in {path} must return a {kind.__name__} or a mapping, "
      f"got {type(config).__name__}"
    )
  known = [f.name for f in dataclasses.fields(kind)]
  for key in config:
    if key not in known:
      raise UserError(
        f"{path}: unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}"
      )
  defaults = kind()
  for key, value in config.items():
    wanted = type(getattr(defaults, key))
    accepted = (int, float) if wanted is float else wanted
    if wanted is not type(None) and not isinstance(value, accepted):
      raise UserError(
        f"{path}: {key} must be {wanted.__name__}, got {value!r} ({type(value).__name__})"
      )
  return kind(**config)


def _is_positional(field: dataclasses.Field) -> bool:
  return "Positional" in str(field.type)


def _sentence(message: str) -> str:
  """The first paragraph of tyro's framed message, on one line."""
  lines: list[str] = []
  for line in message.splitlines():
    text = line.strip(_FRAME + " ")
    if line.startswith("╭"):
      continue
    if not text:
      if lines:
        break
      continue
    lines.append(text)
  return " ".join(lines).rstrip(".") or "the arguments could not be read"
