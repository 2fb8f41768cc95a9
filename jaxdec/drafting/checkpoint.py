# SPDX-License-Identifier: Apache-2.0
"""A trained drafter on disk: ``drafter.json`` (kind, settings, target), ``drafter.safetensors``.

``generate(drafter="folder")`` needs nothing else. The target is remembered by its sizes and a
fingerprint of its weights, because a drafter for another model drafts nonsense without any error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdec.drafting.base import Drafter, Params, Target
from jaxdec.drafting.dynamic_tree import DynamicTree
from jaxdec.drafting.kinds import KINDS
from jaxdec.drafting.objectives import Term
from jaxdec.drafting.ppd_tree import SparseTrees
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.stop_early import StopEarly
from jaxdec.drafting.trained import TrainedDrafter
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.errors import UserError, nearest
from jaxdec.mixers import AttentionConfig, RopeConfig

CONFIG_FILE, WEIGHTS_FILE = "drafter.json", "drafter.safetensors"
_SAMPLES = 256  # entries per tensor that enter the fingerprint

# What may lie in a folder: what is distilled, and what is made of one that was.
_STORED: dict[str, type[Drafter]] = {**KINDS, StopEarly.name: StopEarly}


def fingerprint(model: Any, params: Params) -> dict[str, Any]:
  """Sizes of a target and a hash of its weights: some entries of each tensor, as bfloat16.

  The same for both parameter layouts, and for float32 and bfloat16 copies of one checkpoint.
  """
  import flax.linen as nn
  import ml_dtypes

  from jaxdec.models.decoder import unstack_layers

  config, params = model.config, nn.unbox(params)
  if "stack" in params:
    params = unstack_layers(params, config)
  digest = hashlib.sha256()
  for name, leaf in sorted(_flatten(params).items()):
    flat = leaf.reshape(-1)
    index = np.linspace(0, flat.shape[0] - 1, min(_SAMPLES, flat.shape[0])).astype(np.int64)
    digest.update(name.encode())
    digest.update(np.asarray(flat[index], np.float32).astype(ml_dtypes.bfloat16).tobytes())
  return {
    "vocab_size": config.vocab_size,
    "dim": config.dim,
    "num_layers": config.num_layers,
    "weights": digest.hexdigest()[:16],
  }


def to_config(drafter: TrainedDrafter | StopEarly) -> dict[str, Any]:
  """JSON-able description of a drafter; ``from_config`` inverts it."""

  def value(x):
    if isinstance(x, StaticTree):
      return {"paths": [list(p) for p in x.paths]}
    if isinstance(x, DraftVocabulary):
      return {"ids": x.ids.tolist(), "vocab_size": x.vocab_size}
    if dataclasses.is_dataclass(x):
      kind = {"kind": x.name} if isinstance(x, Drafter) else {}
      return kind | {f.name: value(getattr(x, f.name)) for f in dataclasses.fields(x)}
    return [value(y) for y in x] if isinstance(x, tuple) else x

  return value(drafter)


def from_config(config: Mapping[str, Any]) -> TrainedDrafter | StopEarly:
  """The drafter described by ``to_config``.

  Raises:
    UserError: unknown kind or field.
  """
  config = dict(config)
  kind = config.pop("kind", None)
  if kind not in _STORED:
    raise UserError(
      f"unknown drafter kind {kind!r}{nearest(str(kind), _STORED)}; known: {', '.join(_STORED)}"
    )
  fields = {f.name for f in dataclasses.fields(_STORED[kind])}
  for name in config:
    if name not in fields:
      raise UserError(f"drafter {kind!r} has no setting {name!r}{nearest(name, fields)}")

  def value(name, x):
    if name == "drafter":
      return from_config(x)
    if name == "tree" and x is not None:
      return StaticTree.from_paths(x["paths"]) if "paths" in x else DynamicTree(**x)
    if name == "attention":
      rope = x.get("rope")
      return AttentionConfig(**{**x, "rope": None if rope is None else RopeConfig(**rope)})
    if name == "vocabulary" and x is not None:
      return DraftVocabulary(x["ids"], x["vocab_size"])
    if name == "sparse" and x is not None:
      return SparseTrees.of((t["candidates"]["paths"], t["prompts"]) for t in x["trees"])
    if name == "objective" and isinstance(x, list):
      return tuple(Term(**term) for term in x)
    return tuple(x) if isinstance(x, list) else x

  return _STORED[kind](**{k: value(k, v) for k, v in config.items()})


def save_drafter(
  folder: str | os.PathLike,
  drafter: TrainedDrafter | StopEarly,
  params: Params,
  target: Target,
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Writes both files. A failure leaves what was there before intact.

  ``extra``: JSON-able facts worth keeping (measured accuracies, training data).
  """
  from safetensors.numpy import save

  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _flatten(params).items()}
  if getattr(drafter, "vocabulary", None) is not None:  # interchange with other EAGLE-3 readers
    tensors |= {"d2t": drafter.vocabulary.d2t, "t2d": drafter.vocabulary.t2d}
  weights = save(tensors)
  config = {
    "format": 1,
    "drafter": to_config(drafter),
    "target": fingerprint(target.model, target.params),
    "weights_sha256": hashlib.sha256(weights).hexdigest(),
    **dict(extra or {}),
  }
  text = json.dumps(config, indent=2) + "\n"
  # Both files are complete on disk before either takes its name.
  pending = [(folder / WEIGHTS_FILE, weights), (folder / CONFIG_FILE, text.encode())]
  for path, content in pending:
    path.with_suffix(path.suffix + ".tmp").write_bytes(content)
  for path, _ in pending:
    os.replace(path.with_suffix(path.suffix + ".tmp"), path)


def load_drafter(
  folder: str | os.PathLike, target: Target | None = None, *, strict: bool = True
) -> tuple[TrainedDrafter | StopEarly, Params]:
  """Drafter and parameters (float32) of a folder written by ``save_drafter``.

  Args:
    target: checked against the target the drafter was made for. ``strict=False`` checks sizes only:
      a drafter of a model's fine-tuned sibling still works, if worse.

  Raises:
    UserError: missing or damaged files, or a drafter made for another target.
  """
  import jax.numpy as jnp
  from safetensors import SafetensorError
  from safetensors.numpy import load

  folder = Path(folder)
  if not folder.is_dir():
    raise UserError(
      f"drafter folder {str(folder)!r} does not exist; give the folder of a distilled "
      f"run or one of {', '.join(KINDS)}"
    )
  for name in (CONFIG_FILE, WEIGHTS_FILE):
    if not (folder / name).is_file():
      raise UserError(
        f"{str(folder)!r} holds no {name}, so it is no finished drafter; distill one into it first"
      )
  try:
    config = json.loads((folder / CONFIG_FILE).read_text())
    described, made_for, checksum = config["drafter"], config["target"], config["weights_sha256"]
  except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
    raise UserError(
      f"{folder / CONFIG_FILE} is damaged ({error}); write the drafter again"
    ) from error
  content = (folder / WEIGHTS_FILE).read_bytes()
  try:
    tensors = load(content)
  except SafetensorError as error:
    raise UserError(
      f"{folder / WEIGHTS_FILE} is truncated or damaged ({error}); write the drafter again"
    ) from error
  if hashlib.sha256(content).hexdigest() != checksum:
    raise UserError(
      f"{folder / WEIGHTS_FILE} does not belong to its {CONFIG_FILE} (checksums differ); "
      "write the drafter again"
    )
  drafter = from_config(described)
  if target is not None:
    check_target(drafter, made_for, target, str(folder), strict=strict)
  for name in ("d2t", "t2d"):
    tensors.pop(name, None)
  return drafter, _unflatten({name: jnp.asarray(x) for name, x in tensors.items()})


def check_target(
  drafter: Drafter,
  made_for: Mapping[str, Any],
  target: Target,
  where: str,
  *,
  strict: bool = True,
) -> None:
  """Raises UserError, naming both sides, unless the drafter was made for ``target``."""
  given = fingerprint(target.model, target.params)
  names = {"vocab_size": "vocabulary", "dim": "width", "num_layers": "layers"}
  wrong = [
    f"{names[k]} {made_for.get(k)} against {given[k]}" for k in names if made_for.get(k) != given[k]
  ]
  if wrong:
    raise UserError(
      f"the {drafter.name} drafter in {where!r} was made for another target: "
      f"{', '.join(wrong)} in this model; distill one for this model"
    )
  if strict and made_for.get("weights") != given["weights"]:
    raise UserError(
      f"the {drafter.name} drafter in {where!r} was made for a target of the same sizes but other "
      f"weights (fingerprint {made_for.get('weights')} against {given['weights']}); distill one "
      "for this model, or load it with strict=False"
    )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
  flat = {}
  for name, leaf in tree.items():
    if isinstance(leaf, Mapping):
      flat |= _flatten(leaf, f"{prefix}{name}.")
    else:
      flat[prefix + name] = np.asarray(leaf)
  return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *parents, last = name.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree
