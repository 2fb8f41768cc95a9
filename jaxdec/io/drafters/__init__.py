# SPDX-License-Identifier: Apache-2.0
"""Draft heads in the layouts that servers read: one small file per layout, both directions.

``read_drafter`` tells the layout from the folder, checks it against the target and gives a drafter
with float32 parameters; ``write_drafter`` writes one. What a layout has no field for is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxdec.errors import UserError, nearest
from jaxdec.io import folders, safetensors
from jaxdec.io.drafters.dflash import DFLASH
from jaxdec.io.drafters.eagle import EAGLE
from jaxdec.io.drafters.eagle3 import EAGLE3
from jaxdec.io.drafters.layout import Layout, Opened, check_tensors, stored_ids
from jaxdec.io.drafters.medusa import MEDUSA, MEDUSA_ORIGINAL, ORIGINAL_FILE
from jaxdec.io.drafters.speculators import SPECULATORS

LAYOUTS: dict[str, Layout] = {
  layout.name: layout for layout in (*SPECULATORS, MEDUSA, MEDUSA_ORIGINAL, EAGLE3, EAGLE, DFLASH)
}
# Fields that only drafters have, so that weights we don't read are not taken for a model's.
_MARKS = {"speculators_model_type", "medusa_num_heads", "draft_vocab_size", "dflash_config"}
_COMPARED = 64  # rows of an embedding table stored with a head that are compared with the target's
__all__ = ["LAYOUTS", "Layout", "find_layout", "read_drafter", "write_drafter"]


def find_layout(folder: str | os.PathLike) -> Layout | None:
  """The layout of a drafter's folder; None: it holds none of them (perhaps a whole decoder).

  Raises:
    UserError: unreadable or truncated files.
  """
  path = Path(folder).expanduser()
  if not (path / "config.json").is_file():
    return None
  fields = folders.read_json(path / "config.json")
  try:
    files = _files(path)
  except UserError:
    if _MARKS & set(fields) or fields.get("model_type") == "medusa":
      raise
    return None
  algorithm = fields.get("speculators_model_type")
  candidates = LAYOUTS.values() if algorithm is None else SPECULATORS
  for layout in candidates:
    if layout.recognises(fields, {layout.rename(name) for name in files}):
      return layout
  if algorithm is None:
    return None
  known = [layout.name.removeprefix("speculators_") for layout in SPECULATORS]
  raise UserError(
    f"drafter folder '{folder}' holds a speculator of type {algorithm!r}, which is not supported; "
    f"supported: {', '.join(known)}"
  )


def read_drafter(
  folder: str | os.PathLike, target: Any, *, params: Any = None, **options: Any
) -> tuple[Any, dict]:
  """A drafter and its parameters (float32) from any of ``LAYOUTS``.

  Args:
    target: the ``DecoderConfig`` of the model it drafts for; sizes, vocabulary and captured layers
      are checked against it.
    params: the target's parameters: copies of its embeddings or LM head in the folder are compared
      with them.
    options: settings that no layout holds, such as ``tree`` or ``num_heads`` (EAGLE).

  Raises:
    UserError: no such layout, another target, tensors that don't fit, or a feature we don't have.
  """
  path = Path(folder).expanduser()
  layout = find_layout(path)
  if layout is None:
    raise UserError(
      f"folder '{folder}' holds no drafter in a known layout; known: {', '.join(LAYOUTS)}"
    )
  opened = _open(path, folders.read_json(path / "config.json"), _files(path), layout)
  drafter = layout.read(opened, target, options)
  table = layout.stored(drafter)
  shapes = parameter_shapes(drafter, target)
  if set(shapes) != set(table):
    odd = sorted(set(shapes) ^ set(table))
    raise opened.wrong(f"layout {layout.name!r} has no place for {folders.listed(odd)}")
  check_tensors(opened, layout, table, shapes)
  if params is not None:
    _check_copies(opened, layout, params)
  ids = stored_ids(opened)
  order = None if ids is None else np.argsort(ids)
  return drafter, _unflatten({key: _leaf(opened, s, order) for key, s in table.items()})


def write_drafter(
  folder: str | os.PathLike,
  drafter: Any,
  params: Any,
  *,
  layout: str,
  target: Any,
  verifier: str | None = None,
  dtype: str = "float32",
  overwrite: bool = False,
) -> Path:
  """Writes a drafter for other programs to serve; ``read_drafter`` gives back the same bits.

  Args:
    layout: a name of ``LAYOUTS``; ``speculators`` is the speculators layout of the drafter's kind.
    target: the ``DecoderConfig`` of its target.
    verifier: name or path of the target, for layouts that hold it.
    dtype: of the stored parameters; bfloat16 and float16 round float32 ones.

  Raises:
    UserError: an unknown layout, or a setting of the drafter that it can't express.
  """
  import ml_dtypes

  chosen = _layout(layout, drafter)
  kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
  if dtype not in kinds:
    raise UserError(f"dtype {dtype!r} is not supported{nearest(dtype, kinds)}; use float32, "
                    "bfloat16 or float16")  # fmt: skip
  where = folders.check_target(folder, overwrite)
  fields = {**chosen.fields(drafter, target, verifier), "torch_dtype": dtype}
  constants = chosen.constants(drafter)
  back = chosen.read(_described(fields, constants, drafter, chosen), target, {})
  chosen.check_lossless(drafter, back)
  table, flat = chosen.stored(drafter), _flatten(params)
  if set(table) != set(flat):
    odd = folders.listed(sorted(set(table) ^ set(flat)))
    raise UserError(f"layout {chosen.name!r} and these {drafter.name} parameters differ in {odd}")
  tensors = [_tensor(table[key], leaf, kinds[dtype]) for key, leaf in flat.items()]
  tensors += [
    safetensors.Tensor(name, x.shape, x.dtype, lambda x=x: x) for name, x in constants.items()
  ]
  with folders.replacing(where) as work:
    (work / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    safetensors.write(work / chosen.weights, tensors, {"format": "pt"})
  return where


def parameter_shapes(drafter: Any, target: Any) -> dict[str, tuple[int, ...]]:
  """Shapes of a drafter's parameters by path, without making any."""
  import flax.linen as nn
  import jax

  from jaxdec.drafting.base import Target
  from jaxdec.io.huggingface import abstract_params
  from jaxdec.models.decoder import Decoder

  def init(rng, weights):
    return drafter.init_params(rng, Target(Decoder(target), weights, None))

  made = jax.eval_shape(init, jax.random.key(0), nn.unbox(abstract_params(target)))
  return {key: tuple(leaf.shape) for key, leaf in _flatten(made).items()}


def _layout(name: str, drafter: Any) -> Layout:
  fit = [key for key, layout in LAYOUTS.items() if layout.kind == drafter.name]
  if not fit:
    kinds = dict.fromkeys(layout.kind for layout in LAYOUTS.values())
    raise UserError(
      f"no layout holds {drafter.name} drafters; those with one are {', '.join(kinds)}"
    )
  found = LAYOUTS.get(f"speculators_{drafter.name}" if name == "speculators" else name)
  if found is None:
    raise UserError(
      f"no layout {name!r} for {drafter.name} drafters{nearest(name, fit)}; give one of "
      f"{', '.join(fit)}"
    )
  if found.kind != drafter.name:
    raise UserError(
      f"layout {found.name!r} holds {found.kind} drafters and this one is {drafter.name!r}; "
      f"layouts for it: {', '.join(fit)}"
    )
  return found


def _files(path: Path) -> dict[str, safetensors.File]:
  if (path / ORIGINAL_FILE).is_file():
    file = safetensors.File(path / ORIGINAL_FILE)
    return dict.fromkeys(file.entries, file)
  return folders.weight_files(path)


def _open(path: Path, fields: dict, files: dict, layout: Layout) -> Opened:
  return Opened(path, fields, {layout.rename(name): (file, name) for name, file in files.items()})


class _Constants:
  """The few tensors ``Layout.read`` looks at, in memory, as a file."""

  def __init__(self, tensors: dict[str, np.ndarray], names: list[str]):
    self.tensors = {**dict.fromkeys(names), **tensors}

  def view(self, name: str) -> np.ndarray:
    return self.tensors[name]


def _described(fields: dict, constants: dict, drafter: Any, layout: Layout) -> Opened:
  """What would be written, as a folder to read back."""
  file = _Constants(constants, [s.name for s in layout.stored(drafter).values()])
  return Opened(Path("."), fields, {name: (file, name) for name in file.tensors})


def _leaf(opened: Opened, stored: Any, order: np.ndarray | None) -> Any:
  import jax.numpy as jnp

  view = opened.view(stored.name)
  if view.dtype.kind in "iub":
    raise opened.wrong(f"{stored.name} is {view.dtype.name}, expected a floating type")
  view = view[order] if stored.drafted and order is not None else view
  view = view.T if stored.transpose else view
  return jnp.asarray(np.array(view, dtype=np.float32, order="C", copy=True))


def _tensor(stored: Any, leaf: np.ndarray, dtype: Any) -> safetensors.Tensor:
  def make() -> np.ndarray:
    return np.ascontiguousarray((leaf.T if stored.transpose else leaf).astype(dtype))

  shape = leaf.shape[::-1] if stored.transpose else leaf.shape
  return safetensors.Tensor(stored.name, shape, np.dtype(dtype), make)


def _check_copies(opened: Opened, layout: Layout, params: Any) -> None:
  """A head trained on embeddings of its own drafts nonsense with the target's."""
  flat = _flatten(params)
  table = flat.get("embed", flat.get("embed/embedding"))
  ours = {"embed": table, "norm": flat["final_norm/scale"], "head": table}
  if "head/kernel" in flat:
    ours["head"] = flat["head/kernel"].T
  for name, kind in layout.optional.items():
    if name not in opened.files:
      continue
    theirs, own = opened.view(name), ours[kind]
    rows = np.linspace(0, len(theirs) - 1, _COMPARED).astype(int)
    same = theirs.shape == own.shape and np.allclose(
      theirs[rows].astype(np.float32), own[rows].astype(np.float32), rtol=2**-6, atol=1e-4
    )
    if not same:
      raise opened.wrong(f"its {name} differs from the target's, which our drafters share")


def _flatten(tree: Any) -> dict[str, np.ndarray]:
  import flax.linen as nn
  from flax.traverse_util import flatten_dict

  leaves = flatten_dict(nn.unbox(tree), sep="/").items()
  return {k: x if not hasattr(x, "__array__") else np.asarray(x) for k, x in leaves}


def _unflatten(flat: dict[str, Any]) -> dict:
  from flax.traverse_util import unflatten_dict

  return unflatten_dict(flat, sep="/")
