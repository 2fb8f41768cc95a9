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
UNTRAINED = (
  "prompt_lookup", "token_recycling", "suffix", "combined", "aded", "aggressive", "jacobi",
  "lookahead", "sjd", "early_exit", "del",
)  # fmt: skip
TRAINED = (
  "medusa", "hydra", "hydra++", "eagle", "eagle3", "p_eagle", "dovetail",
  "mtp", "mtp_modules", "fspad", "hass", "dflash", "dspark", "chimera",
  "falcon", "clover", "clover2", "ppd", "masked_mtp", "hidden_transfer", "specvlm",
  "vispec", "flash",
)  # fmt: skip
_DRAFTER_FILES = ("drafter.json", "config.json", "datastore.json")
MESH_AXES = ("data", "fsdp", "tensor", "seq", "dcn_data", "dcn_fsdp")

_AT_LEAST = {
  "max_new_tokens": 1, "steps": 1, "batch_size": 1, "seq_len": 2, "prompts": 1, "num_prompts": 1,
  "repeats": 1, "draws": 100, "num_heads": 1, "tree_nodes": 2,
  "checkpoint_every": 1, "cache_length": 1, "log_every": 1, "top_k": 1, "shards": 1,
  "prompt_tokens": 1, "num_processes": 1, "max_tokens": 1, "acceptance_every": 1,
}  # fmt: skip


def check(config: Any) -> None:
  """Raises UserError for the first thing wrong with a command's configuration."""
  fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  _numbers(fields)
  if fields.get("config") is not None:
    config_file(fields["config"])
  if "topology" in fields:
    from jaxdec.slices import parse

    parse(fields["topology"])
  if fields.get("to") is not None:
    _layout(fields["to"])
  if fields.get("mesh") is not None:
    mesh_axes(fields["mesh"])
  for name in (fields.get("drafters") or "").split(","):
    drafter_name(name.strip())
  if fields.get("drafter") is not None:
    (_trainable if "work_dir" in fields else drafter_name)(fields["drafter"])
  if fields.get("joint") is not None:
    _joint(fields)
  prompts: list[str] = []
  if "prompt" in fields or isinstance(fields.get("prompts"), str):
    prompts = texts(fields.get("prompt", ()), fields.get("prompts"), needed="prompt" in fields)
  if fields.get("data") is not None:
    _data(fields["data"])
  if "split" in fields:
    _datastore(fields)
  if fields.get("runs") == ():
    raise UserError("no run folder; write `jaxdec plot runs/a runs/b`")
  for run in fields.get("runs", ()):
    if not Path(run).is_dir():
      raise UserError(f"run folder {run!r} does not exist")
  for key in ("output", "work_dir"):
    if fields.get(key) is not None and "runs" not in fields:
      _folder_to_write(f"--{key.replace('_', '-')}", fields[key])
  if "model" in fields:
    folder = model_folder(fields["model"])
    if prompts:
      prompts_fit(folder, prompts, fields.get("max_new_tokens", 1))
    if "work_dir" not in fields:
      for name in (fields.get("drafters") or fields.get("drafter") or "").split(","):
        drafter_fits(name.strip(), folder)


def _datastore(fields: dict[str, Any]) -> None:
  from jaxdec.io import folders

  if "*" in fields["data"]:
    raise UserError(
      f"a datastore is built from one source, got the mixture {fields['data']!r}; name one"
    )
  folders.check_target(fields["output"], False)


def _layout(name: str) -> None:
  from jaxdec.io.drafters import LAYOUTS

  known = ("jaxdec", "speculators", *LAYOUTS)
  if name not in known:
    raise UserError(f"no layout {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def _numbers(fields: dict[str, Any]) -> None:
  for key, least in _AT_LEAST.items():
    value = fields.get(key)
    if isinstance(value, int) and value < least:
      raise UserError(f"--{key.replace('_', '-')} must be at least {least}, got {value}")
  temperatures = [fields["temperature"]] if "temperature" in fields else []
  for value in [*temperatures, *fields.get("temperatures", ())]:
    if not 0 <= value < float("inf"):
      raise UserError(f"temperature must be 0 (greedy) or positive, got {value:g}")
  top_p, min_p = fields.get("top_p"), fields.get("min_p")
  if top_p is not None and not 0 < top_p <= 1:
    raise UserError(f"--top-p must lie in (0, 1], got {top_p:g}")
  if min_p is not None and not 0 <= min_p <= 1:
    raise UserError(f"--min-p must lie in [0, 1], got {min_p:g}")
  for key in ("learning_rate", "minutes", "price"):
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


def config_file(path: str) -> None:
  """``config.py`` or ``config.py:preset``."""
  file = path.partition(":")[0]
  if not Path(file).is_file() or Path(file).suffix != ".py":
    why = "is no Python file" if Path(file).exists() else "does not exist"
    raise UserError(
      f"configuration {file!r} {why}; give a file with get_config(), such as "
      "experiments/lasp2/config.py"
    )


def model_folder(model: str) -> Path:
  """The folder behind ``--model``, after a look at its files and their headers."""
  from jaxdec.io import folders

  if model == "tiny":
    path = Path(__file__).parent.parent / "assets" / "tiny_python"
  elif not Path(model).expanduser().exists():
    raise UserError(
      f"model folder {model!r} does not exist{nearest(model, ['tiny'])}; give a local folder in "
      "Hugging Face layout (config.json, *.safetensors, tokenizer.json), or 'tiny'"
    )
  else:
    path = Path(model).expanduser()
  folders.open_model(path)
  return path


def prompts_fit(folder: Path, prompts: list[str], new: int = 1) -> None:
  """Raises for a tokenizer of another model, and for a prompt longer than the model's limit.

  The weights are not read, so this takes a moment even where they take minutes.
  """
  from jaxdec.io import folders, hf_config, tokenizers

  fields = folders.read_json(folder / "config.json")
  if fields.get("model_type") == "jaxdec":
    return  # our own layout is read by jaxdec.models
  size, limit = fields["vocab_size"], hf_config.parse(fields)["max_length"]
  tokenizer = tokenizers.load_tokenizer(folder, model_vocab_size=size)
  for number, text in enumerate(prompts, 1):
    length = len(tokenizer.encode(text))
    if length + new > limit:
      raise UserError(
        f"prompt {number} has {length} tokens and --max-new-tokens is {new}: together "
        f"{length + new}, over the model's limit of {limit}; shorten one of them"
      )


def drafter_name(name: str) -> None:
  """Raises unless ``name`` is a drafter, or a folder (which only the library can judge fully)."""
  if not name or name in ("none", "auto", *UNTRAINED, *TRAINED):
    return
  if Path(name).is_dir():
    _drafter_folder(Path(name))
    return
  if "/" in name or Path(name).exists():
    raise UserError(f"drafter folder {name!r} does not exist; give the folder of a distilled run")
  known = ("none", "auto", *UNTRAINED, *TRAINED)
  raise UserError(
    f"unknown drafter {name!r}{nearest(name, known)}; give one of {', '.join(known)}, or the "
    "folder of a distilled run or of a small model"
  )


def _drafter_folder(folder: Path) -> None:
  """A run that hasn't finished has a configuration and no drafter yet."""
  run = (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
  if run and not (folder / "drafter.json").is_file():
    raise UserError(
      f"{str(folder)!r} holds a run that has not finished; the command that began it resumes it"
    )
  if not any((folder / name).is_file() for name in _DRAFTER_FILES):
    raise UserError(
      f"{str(folder)!r} holds no drafter (no drafter.json); give the folder of a distilled run, "
      "of a datastore or of a small model"
    )


def drafter_fits(name: str, folder: Path) -> None:
  """Raises where a distilled drafter was made for a model of other sizes.

  The weights are compared by the library; sizes alone tell most mix-ups apart without reading them.
  """
  from jaxdec.io import folders

  path = Path(name) / "drafter.json"
  fields = folders.read_json(folder / "config.json")
  if not path.is_file() or fields.get("model_type") == "jaxdec":
    return
  made_for = folders.read_json(path).get("target", {})
  here = {"vocab_size": "vocab_size", "dim": "hidden_size", "num_layers": "num_hidden_layers"}
  words = {"vocab_size": "vocabulary", "dim": "width", "num_layers": "layers"}
  wrong = [
    f"{words[key]} {made_for.get(key)} against {fields[field]}"
    for key, field in here.items()
    if made_for.get(key) != fields[field]
  ]
  if wrong:
    raise UserError(
      f"the drafter in {name!r} was made for another target: {', '.join(wrong)} in this model; "
      "distill one for this model"
    )


def _trainable(name: str) -> None:
  if name not in TRAINED:
    why = (
      f"drafter {name!r} has nothing to train" if name in UNTRAINED else f"unknown drafter {name!r}"
    )
    raise UserError(f"{why}{nearest(name, TRAINED)}; distill one of {', '.join(TRAINED)}")


def _joint(fields: dict[str, Any]) -> None:
  if fields["drafter"] != "medusa":
    raise UserError(
      f"--joint trains the model together with Medusa heads, and --drafter is "
      f"{fields['drafter']!r}; give --drafter medusa, or leave --joint out"
    )
  for option, plain in (("teacher", "online"), ("acceptance_every", None)):
    if fields[option] != plain:
      raise UserError(
        f"with --joint the model changes at every step, which --{option.replace('_', '-')} "
        f"{fields[option]} can't follow; leave one of them out"
      )


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
  from jaxdec.data.sources import parse_mixture

  for _, name in parse_mixture(data):
    if name == "python_stdlib" or name.startswith("tfds:") or Path(name).expanduser().exists():
      continue
    raise UserError(
      f"data {name!r} does not exist{nearest(name, ['python_stdlib'])}; give a folder, a file, "
      "tfds:NAME, or python_stdlib"
    )


def _folder_to_write(option: str, path: str) -> None:
  folder = Path(path).expanduser()
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{option} must be a folder, {path!r} is a file")
