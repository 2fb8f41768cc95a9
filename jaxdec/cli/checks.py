# SPDX-License-Identifier: Apache-2.0
"""Everything about a configuration that can be refused without JAX: numbers, names, paths, files.

The library checks again, and more; this is what makes a mistake cost a second and not a minute.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxdec.errors import UserError, nearest

# Names of jaxdec.drafting's registry; a test holds the two equal.
UNTRAINED = ("prompt_lookup", "token_recycling")
TRAINED = ("medusa", "hydra", "hydra++", "eagle3")
MESH_AXES = ("data", "fsdp", "tensor", "seq")

_AT_LEAST = {
  "max_new_tokens": 1, "steps": 1, "batch_size": 1, "seq_len": 2, "prompts": 1, "num_prompts": 1,
  "repeats": 1, "draws": 1, "checkpoint_every": 1, "log_every": 1, "top_k": 1,
}  # fmt: skip


def check(config: Any) -> None:
  """Raises UserError for the first thing wrong with a command's configuration."""
  fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  _numbers(fields)
  if "mesh" in fields:
    mesh_axes(fields["mesh"])
  if "model" in fields:
    model_folder(fields["model"])
  for name in (fields.get("drafters") or "").split(","):
    drafter_name(name.strip())
  if fields.get("drafter") is not None:
    if "work_dir" in fields:
      _trainable(fields["drafter"])
    else:
      drafter_name(fields["drafter"])
  if "prompt" in fields or isinstance(fields.get("prompts"), str):
    texts(fields.get("prompt", ()), fields.get("prompts"), needed="prompt" in fields)
  if fields.get("data") is not None:
    _data(fields["data"])
  for key in ("output", "work_dir"):
    path = fields.get(key)
    if path is not None and key + "s" not in fields and "runs" not in fields:
      _folder_to_write(f"--{key.replace('_', '-')}", path)
  if fields.get("runs") == ():
    raise UserError("no run folder; write `jaxdec plot runs/a runs/b`")
  for run in fields.get("runs", ()):
    if not Path(run).is_dir():
      raise UserError(f"run folder {run!r} does not exist")


def _numbers(fields: dict[str, Any]) -> None:
  for key, least in _AT_LEAST.items():
    value = fields.get(key)
    if isinstance(value, int) and value < least:
      raise UserError(f"--{key.replace('_', '-')} must be at least {least}, got {value}")
  temperatures = [fields["temperature"]] if "temperature" in fields else []
  for value in [*temperatures, *fields.get("temperatures", ())]:
    if not 0 <= value < float("inf"):
      raise UserError(f"temperature must be 0 (greedy) or positive, got {value:g}")
  for key in ("top_p", "min_p"):
    value = fields.get(key)
    if value is not None and not 0 < value <= 1:
      raise UserError(f"--{key.replace('_', '-')} must lie in (0, 1], got {value:g}")
  for key in ("learning_rate", "minutes"):
    value = fields.get(key)
    if value is not None and not 0 < value < float("inf"):
      raise UserError(f"--{key.replace('_', '-')} must be positive, got {value:g}")


def mesh_axes(text: str) -> dict[str, int]:
  """``"data=2,tensor=4"`` as a mapping; every axis not named has one device."""
  axes: dict[str, int] = {}
  for part in text.split(","):
    name, equals, size = (piece.strip() for piece in part.partition("="))
    if not equals or not size.lstrip("-").isdigit():
      raise UserError(
        f"--mesh is written axis=size,axis=size such as data=2,tensor=4, got {text!r}"
      )
    if name not in MESH_AXES:
      raise UserError(
        f"unknown mesh axis {name!r}{nearest(name, MESH_AXES)}; axes are {', '.join(MESH_AXES)}"
      )
    if name in axes:
      raise UserError(f"mesh axis {name!r} is given twice in {text!r}")
    if int(size) < 1:
      raise UserError(f"mesh axis {name!r} must have at least one device, got {size}")
    axes[name] = int(size)
  return axes


def model_folder(model: str) -> Path | None:
  """The folder behind ``--model`` (None for 'tiny'), after a look at its files."""
  if model == "tiny":
    return None
  folder = Path(model).expanduser()
  if not folder.exists():
    raise UserError(
      f"model folder {model!r} does not exist{nearest(model, ['tiny'])}; give a folder in Hugging "
      "Face layout (config.json, *.safetensors, tokenizer.json) or 'tiny'"
    )
  if not folder.is_dir():
    raise UserError(
      f"--model must be a folder with config.json and *.safetensors, {model!r} is a file"
    )
  fields = read_json(folder / "config.json", "config.json")
  from jaxdec.io import hf_config

  if fields.get("model_type") != "jaxdec":
    hf_config.parse(fields)
  weights = sorted(folder.glob("*.safetensors"))
  if not weights:
    raise UserError(f"no *.safetensors file in {model!r}; weights in other formats are not read")
  for file in weights:
    safetensors_header(file)
  if not (folder / "tokenizer.json").is_file():
    raise UserError(f"no tokenizer.json in {model!r}; copy it there from the model's source")
  return folder


def safetensors_header(path: Path) -> dict[str, Any]:
  """The header of a safetensors file, after checking that all the bytes it promises are there.

  Layout: 8 bytes little-endian header size, JSON header, data; ``data_offsets`` count from its end.
  """
  size = path.stat().st_size
  with open(path, "rb") as file:
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 2 <= length <= 100_000_000 or 8 + length > size:
      raise UserError(f"{path} is no complete safetensors file ({size} bytes); fetch it again")
    try:
      header = json.loads(file.read(length))
      ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
      raise UserError(f"{path} has a damaged safetensors header; fetch it again") from error
  expected = 8 + length + max(ends, default=0)
  if size < expected:
    raise UserError(f"{path} is truncated: {size} bytes of {expected}; fetch it again")
  return header


def drafter_name(name: str) -> None:
  """Raises unless ``name`` is a drafter, or a folder (which only the library can judge fully)."""
  if not name or name in ("none", *UNTRAINED, *TRAINED) or Path(name).is_dir():
    return
  if "/" in name or Path(name).exists():
    raise UserError(f"drafter folder {name!r} does not exist; give the folder of a distilled run")
  known = ("none", *UNTRAINED, *TRAINED)
  raise UserError(
    f"unknown drafter {name!r}{nearest(name, known)}; give one of {', '.join(known)}, or the "
    "folder of a distilled run or of a small model"
  )


def _trainable(name: str) -> None:
  if name not in TRAINED:
    why = (
      f"drafter {name!r} has nothing to train" if name in UNTRAINED else f"unknown drafter {name!r}"
    )
    raise UserError(f"{why}{nearest(name, TRAINED)}; distill one of {', '.join(TRAINED)}")


def texts(given: tuple[str, ...], path: str | None, needed: bool = True) -> list[str]:
  """The prompts of ``--prompt`` and ``--prompts``."""
  out = list(given)
  if path is not None:
    if not Path(path).is_file():
      raise UserError(f"prompt file {path!r} does not exist")
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
      if not line.strip():
        continue
      try:
        out.append(json.loads(line)["prompt"])
      except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}, line {number}: expected {{"prompt": "..."}}') from error
  if needed and not out:
    raise UserError("no prompt; give --prompt TEXT, or --prompts FILE.jsonl")
  for number, text in enumerate(out, 1):
    if not isinstance(text, str) or not text:
      raise UserError(f"prompt {number} is empty; give at least one character")
  return out


def _data(data: str) -> None:
  if data != "python_stdlib" and not Path(data.partition("@")[0]).expanduser().exists():
    raise UserError(
      f"data {data!r} does not exist{nearest(data, ['python_stdlib'])}; give a folder, a file, or "
      "python_stdlib"
    )


def _folder_to_write(option: str, path: str) -> None:
  folder = Path(path).expanduser()
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{option} must be a folder, {path!r} is a file")


def read_json(path: Path, what: str) -> dict[str, Any]:
  """A JSON object from a file that must be there."""
  if not path.is_file():
    raise UserError(
      f"no {what} in {str(path.parent)!r}; it is no model folder in Hugging Face layout"
    )
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}")
  return value
