# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in Hugging Face layout: read straight into a mesh's sharding, written bit-exactly.

The map of names is ``jaxdec.models.families.source``; here it is applied in both directions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdec.errors import UserError, nearest
from jaxdec.io import folders, safetensors
from jaxdec.io.folders import ModelFolder, listed, open_model
from jaxdec.models import families
from jaxdec.models.config import DecoderConfig
from jaxdec.models.decoder import Decoder, unstack_layers
from jaxdec.parallel import rules as parallel_rules

DTYPES = ("float32", "bfloat16", "float16")


def parse_dtype(dtype: Any) -> np.dtype | None:
  """A floating type by name or object; None stays None (the file's own)."""
  if dtype is None:
    return None
  name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
  if name not in DTYPES:
    raise UserError(
      f"dtype {name!r} is not supported{nearest(name, DTYPES)}; use {', '.join(DTYPES)} or "
      "None for the file's own."
    )
  return jnp.dtype(name)


def load_checkpoint(
  folder: str | os.PathLike | ModelFolder,
  dtype: Any = None,
  mesh: Mesh | None = None,
  rules: parallel_rules.Rules = parallel_rules.DEFAULT,
) -> tuple[DecoderConfig, dict]:
  """Configuration and parameters (unboxed, unrolled layout) of a model folder.

  Args:
    folder: path, or a folder already opened.
    dtype: type of the parameters; None keeps each tensor's own.
    mesh: where to put them: every device reads its own slices only. None: the default device.
    rules: logical to mesh axes.

  Raises:
    UserError: see ``open_model``; also missing, unexpected and mis-shaped tensors, all listed.
  """
  dtype = parse_dtype(dtype)
  model = folder if isinstance(folder, ModelFolder) else open_model(folder)
  config = families.config_from_hf(model.fields)
  eos = dict.fromkeys((*config.eos_ids, *model.eos_ids))  # the files' and the family's default
  config = dataclasses.replace(config, eos_ids=tuple(eos))
  family = model.fields["model_type"]
  boxed = abstract_params(config)
  paths = _flatten(nn.unbox(boxed))
  shardings = None if mesh is None else _flatten(parallel_rules.shardings(boxed, rules, mesh))
  sources = {path: families.source(path, config, family) for path in paths}
  _check(model, config, paths, sources)
  leaves = {
    path: _read(model, src, paths[path].shape, dtype, shardings and shardings[path])
    for path, src in sources.items()
  }
  return config, _unflatten(leaves)


def abstract_params(config: DecoderConfig) -> Any:
  """Shapes, types and logical axes of the parameters, without making them."""
  model = Decoder(config)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))[
    "params"
  ]


def _flatten(tree: Any) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {parallel_rules.path_name(path): leaf for path, leaf in leaves}


def _unflatten(leaves: Mapping[str, Any]) -> dict:
  tree: dict = {}
  for path, leaf in leaves.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def _stored_shapes(
  paths: Mapping[str, Any], sources: Mapping[str, families.Source]
) -> dict[str, tuple[int, ...]]:
  """Checkpoint name -> shape it must have, the parts of fused tensors put together."""
  shapes: dict[str, tuple[int, ...]] = {}
  for path, src in sources.items():
    shape = tuple(paths[path].shape)
    shape = shape[::-1] if src.transpose else shape
    if src.rows is not None:
      shape = (max(src.rows[1], shapes.get(src.name, (0,))[0]), *shape[1:])
    shapes[src.name] = shape
  return shapes


def _check(
  model: ModelFolder,
  config: DecoderConfig,
  paths: Mapping[str, Any],
  sources: Mapping[str, families.Source],
) -> None:
  expected = _stored_shapes(paths, sources)
  found = {name: file.entries[name] for name, file in model.files.items()}
  missing = sorted(set(expected) - set(found))
  unexpected = sorted(n for n in set(found) - set(expected) if not families.IGNORED.match(n))
  if config.tie_embeddings and "lm_head.weight" in unexpected:
    unexpected.remove("lm_head.weight")
    _check_tied(model)
  wrong = [
    f"{n} is {found[n].shape}, expected {expected[n]}"
    for n in sorted(expected)
    if n in found and found[n].shape != expected[n]
  ]
  integral = [
    f"{n} is {found[n].dtype.name}, expected a floating type"
    for n in sorted(expected)
    if n in found and found[n].dtype.kind in "iub"
  ]
  parts = [
    f"missing: {listed(missing)}" if missing else "",
    f"unexpected: {listed(unexpected)}" if unexpected else "",
    f"mis-shaped: {listed(wrong)}" if wrong else "",
    f"not weights: {listed(integral)}" if integral else "",
  ]
  if any(parts):
    raise UserError(
      f"folder '{model.path}': the tensors don't fit config.json; "
      f"{'; '.join(p for p in parts if p)}."
    )


def _check_tied(model: ModelFolder) -> None:
  name = "model.embed_tokens.weight"
  if name in model.files:
    head, table = (model.files[n].view(n) for n in ("lm_head.weight", name))
    if head.shape != table.shape or not np.array_equal(head.view(np.uint8), table.view(np.uint8)):
      raise UserError(
        f"folder '{model.path}': config.json ties the LM head to the embeddings, but "
        "lm_head.weight differs from them; set tie_word_embeddings to false."
      )


def _read(
  model: ModelFolder,
  src: families.Source,
  shape: tuple[int, ...],
  dtype: np.dtype | None,
  sharding: Any,
) -> jax.Array:
  view = model.files[src.name].view(src.name)
  if src.rows is not None:
    view = view[slice(*src.rows)]
  if src.transpose:
    view = view.T
  dtype = dtype or view.dtype

  def copy(index) -> np.ndarray:
    # A copy, because JAX may alias host memory and the mapped file may be replaced later.
    return np.array(view[index], dtype=dtype, order="C", copy=True)

  if sharding is None:
    return jax.device_put(copy(...))
  return jax.make_array_from_callback(shape, sharding, copy)


def save_checkpoint(
  folder: str | os.PathLike,
  config: DecoderConfig,
  params: Any,
  *,
  tokenizer: Any = None,
  family: str | None = None,
  overwrite: bool = False,
  max_shard_bytes: int = 5_000_000_000,
) -> Path:
  """Writes a model folder that transformers loads; parameters keep their type, bit for bit.

  Args:
    folder: new, empty, or (with ``overwrite``) a folder that holds nothing but a model.
    params: either layout, boxed or not.
    tokenizer: a ``jaxdec.io.Tokenizer`` to write beside the weights.
    family: ``model_type`` to write as; None: the configuration's own, or ``jaxdec`` with a warning
      where that can't express the decoder.
    max_shard_bytes: weights above it are split into several files.

  Raises:
    UserError: the folder holds something else, or ``family`` can't express the decoder.
  """
  target = folders.check_target(folder, overwrite)
  fields = _fields(config, family)
  params = nn.unbox(params)
  if "stack" in params:
    params = unstack_layers(params, config)
  tensors = _tensors(config, _flatten(params), fields["model_type"])
  fields["torch_dtype"] = max(tensors, key=lambda t: t.size).dtype.name
  with folders.replacing(target) as work:
    _write_json(work / "config.json", fields)
    eos = list(config.eos_ids)
    generation = {
      "bos_token_id": config.bos_id,
      "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    _write_json(
      work / "generation_config.json", {k: v for k, v in generation.items() if v is not None}
    )
    _write_weights(work, tensors, max_shard_bytes)
    if tokenizer is not None:
      tokenizer.save(work)
  return target


def _fields(config: DecoderConfig, family: str | None) -> dict[str, Any]:
  try:
    return families.config_to_hf(config, family)
  except UserError as error:
    if family is not None:
      raise
    # A save at the end of a long run must not fail for a name; say what it costs.
    warnings.warn(
      f"{error} Saved as model_type 'jaxdec', which transformers does not read.", stacklevel=3
    )
    return families.config_to_hf(config, "jaxdec")


def _write_json(path: Path, value: dict) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tensors(
  config: DecoderConfig, leaves: Mapping[str, Any], family: str
) -> list[safetensors.Tensor]:
  expected = _flatten(nn.unbox(abstract_params(config)))
  wrong = [
    f"{p} is {tuple(leaves[p].shape) if p in leaves else 'missing'}, expected {tuple(e.shape)}"
    for p, e in expected.items()
    if p not in leaves or leaves[p].shape != e.shape
  ]
  wrong += [f"{p} is unexpected" for p in leaves if p not in expected]
  if wrong:
    raise UserError(f"the parameters don't fit the configuration: {listed(wrong)}.")
  parts: dict[str, list[tuple[families.Source, Any]]] = {}
  for path, leaf in leaves.items():
    src = families.source(path, config, family)
    parts.setdefault(src.name, []).append((src, leaf))
  shapes = _stored_shapes(expected, {p: families.source(p, config, family) for p in expected})

  def make(pieces):
    pieces = sorted(pieces, key=lambda piece: piece[0].rows or (0, 0))
    arrays = [np.asarray(leaf).T if src.transpose else np.asarray(leaf) for src, leaf in pieces]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=0)

  return [
    safetensors.Tensor(name, shapes[name], np.dtype(pieces[0][1].dtype), lambda p=pieces: make(p))
    for name, pieces in sorted(parts.items())
  ]


def _write_weights(work: Path, tensors: list[safetensors.Tensor], max_shard_bytes: int) -> None:
  shards: list[list[safetensors.Tensor]] = [[]]
  for tensor in tensors:
    if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > max_shard_bytes:
      shards.append([])
    shards[-1].append(tensor)
  metadata = {"format": "pt"}  # transformers refuses files without it
  if len(shards) == 1:
    safetensors.write(work / folders.SINGLE, tensors, metadata)
    return
  names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  for name, shard in zip(names, shards):
    safetensors.write(work / name, shard, metadata)
  weight_map = {t.name: name for name, shard in zip(names, shards) for t in shard}
  total = sum(t.size for t in tensors)
  _write_json(work / folders.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
