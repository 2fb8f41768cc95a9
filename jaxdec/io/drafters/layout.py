# SPDX-License-Identifier: Apache-2.0
"""What the layouts of served draft heads share: a table of names, fields of a layer, checks.

A layout is data: how its folders are recognised, the fields of its ``config.json`` in both
directions, and where each parameter lies. Whatever it has no field for is found by reading back
what would be written, so nothing is ever lost in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdec.errors import UserError
from jaxdec.io.folders import listed
from jaxdec.io.safetensors import File

# Settings of training and of the tree: they change no logits and no layout holds them.
_FREE = {
  "num_heads", "tree", "objective", "depth_decay", "weighting", "normalize", "loss_fraction",
  "coupled", "dtype", "dropout", "noise", "rollouts", "num_anchors", "anchor_group",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where one of our parameters lies.

  Attributes:
    name: the file's tensor name.
    transpose: stored ``[out, in]`` where ours is ``[in, out]``.
    drafted: its rows are the tokens of the draft vocabulary.
  """

  name: str
  transpose: bool = False
  drafted: bool = False


@dataclasses.dataclass(frozen=True)
class Opened:
  """A folder with the headers of its weights read; names as ``Layout.rename`` gives them."""

  path: Path
  fields: Mapping[str, Any]
  files: Mapping[str, tuple[File, str]]

  def shape(self, name: str) -> tuple[int, ...]:
    file, stored = self.files[name]
    return file.entries[stored].shape

  def view(self, name: str) -> np.ndarray:
    file, stored = self.files[name]
    return file.view(stored)

  def wrong(self, what: str) -> UserError:
    return UserError(f"drafter folder '{self.path}': {what}")


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way drafters lie on disk.

  Attributes:
    name: what ``write_drafter`` is given. kind: the drafter it holds (name in ``KINDS``).
    served_by: who reads it, for messages and documentation.
    recognises: of ``config.json`` and the set of tensor names.
    read: fields (and small tensors) to the drafter; raises UserError for what we don't implement.
    fields: the drafter to ``config.json``.
    stored: our parameter path (slash-separated) to its place.
    constants: tensors that are no parameters (draft vocabulary).
    rename: a stored tensor name to the one used in ``stored``.
    optional: tensors that may be there and are copies of the target's: our name of the target's
      parameter for each, to compare with.
    weights: file that holds the tensors.
  """

  name: str
  kind: str
  served_by: str
  recognises: Callable[[Mapping[str, Any], set[str]], bool]
  read: Callable[[Opened, Any, dict[str, Any]], Any]
  fields: Callable[[Any, Any, str | None], dict[str, Any]]
  stored: Callable[[Any], dict[str, Stored]]
  constants: Callable[[Any], dict[str, np.ndarray]] = lambda drafter: {}
  rename: Callable[[str], str] = lambda name: name
  optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
  weights: str = "model.safetensors"

  def refuse(self, what: str, drafter: Any) -> UserError:
    return UserError(
      f"layout {self.name!r} ({self.served_by}) can't express {what} of this {drafter.name} "
      "drafter; keep it in jaxdec's own format, or train one without"
    )

  def check_lossless(self, drafter: Any, back: Any) -> None:
    """Raises UserError for a setting of ``drafter`` that ``back``, read again, doesn't have."""
    if type(back) is not type(drafter):
      raise UserError(
        f"layout {self.name!r} holds {back.name} drafters, this one is {drafter.name!r}"
      )
    for f in dataclasses.fields(drafter):
      ours, theirs = getattr(drafter, f.name), getattr(back, f.name)
      if f.name not in _FREE and ours != theirs:
        raise self.refuse(f"{f.name}={ours!r} (it would read back as {theirs!r})", drafter)


def sizes(opened: Opened, fields: Mapping[str, Any], target: Any) -> None:
  """Raises UserError unless the sizes among ``fields`` are the target's; one not given fits any."""
  wanted = {
    "hidden_size": ("width", target.dim),
    "target_hidden_size": ("width", target.dim),
    "vocab_size": ("vocabulary", target.vocab_size),
    "num_target_layers": ("layers", target.num_layers),
  }
  wrong = [
    f"{word} {fields[field]} against {value}"
    for field, (word, value) in wanted.items()
    if fields.get(field) not in (None, value)
  ]
  if wrong:
    raise opened.wrong(f"was made for another target: {', '.join(wrong)} in this model")


def only(opened: Opened, fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
  """Raises UserError for a field with another value than these; ``...``: any. Absent ones fit."""
  for name, values in allowed.items():
    found = fields.get(name)
    if found is not None and ... not in values and found not in values:
      raise opened.wrong(f"{name}={found!r} is not supported; only {values[0]!r} is")


def check_captures(layout: Layout, drafter: Any, target: Any, count: int | None = None) -> None:
  """Raises UserError unless servers can capture what the drafter reads, ``count`` layers if given.

  Not the stream after the last layer: some take it before the final norm, others after.
  """
  captured, most = drafter.capture_layers, target.num_layers
  if len(captured) != (count or len(captured)) or min(captured) < 1 or max(captured) >= most:
    which = f"{count or 'any'} inputs of layers 1..L-1, L = {most}"
    raise layout.refuse(f"capture_layers={captured} ({which})", drafter)


def plain_embeddings(target: Any, kind: str) -> None:
  """Raises UserError where the target scales its embeddings, which no server does for a drafter."""
  if target.embed_scale is not None:
    raise UserError(
      f"this target multiplies its embeddings by {target.embed_scale:g} and servers feed {kind} "
      "heads plain ones; use jaxdec's own format for such targets"
    )


def layer_ids(opened: Opened, given: list[int], target: Any) -> tuple[int, ...]:
  """Layer inputs a drafter reads, checked against the target's depth."""
  bad = [i for i in given if isinstance(i, bool) or not isinstance(i, int)]
  bad += [i for i in given if i not in bad and not 0 <= i < target.num_layers]
  if bad:
    raise opened.wrong(
      f"reads the input of layer {bad[0]}, but the target's layers are 0..{target.num_layers - 1}"
    )
  return tuple(given)


def write_layer(
  layout: Layout, drafter: Any, attention: Any, target: Any, family: str, num_layers: int = 1
) -> dict[str, Any]:
  """Fields of ``num_layers`` equal layers, as those of a ``family`` decoder over the target's
  vocabulary and width."""
  from jaxdec.mixers import AttentionConfig
  from jaxdec.models.config import DecoderConfig, LayerConfig, MLPConfig, NormConfig
  from jaxdec.models.families import config_to_hf

  plain = AttentionConfig(
    attention.num_heads, attention.num_kv_heads, attention.head_dim, qk_norm=family == "qwen3"
  )
  for f in dataclasses.fields(plain):
    if f.name != "rope" and getattr(attention, f.name) != getattr(plain, f.name):
      raise layout.refuse(f"{f.name}={getattr(attention, f.name)!r} in the attention", drafter)
  config = DecoderConfig(
    vocab_size=target.vocab_size,
    dim=drafter.dim,
    layers=(LayerConfig(attention, MLPConfig(drafter.hidden_dim)),) * num_layers,
    norm=NormConfig(drafter.eps),
    max_length=target.max_length,
    eos_ids=target.eos_ids,
    bos_id=target.bos_id,
    family=family,
  )
  try:
    return config_to_hf(config, family)
  except UserError as error:
    raise layout.refuse(f"the rotary embedding {attention.rope}", drafter) from error


# Fields that draft heads inherit from their target's configuration and don't use, with the values
# that leave the head what it is; ``...``: any.
_INERT: dict[str, tuple[Any, ...]] = {
  "sliding_window": (None,),
  "use_sliding_window": (False,),
  "max_window_layers": (...,),
  "target_model_type": (...,),
  "speculative_algorithm": (...,),
}


def read_layer(opened: Opened, fields: Mapping[str, Any], family: str) -> Any:
  """The decoder (all layers alike, no biases, SiLU) that the fields of a drafter's layers give."""
  from jaxdec.models.families import config_from_hf

  rest = {k: v for k, v in fields.items() if k not in ("architectures", "auto_map")}
  types = rest.pop("layer_types", None) if family == "llama" else rest.get("layer_types")
  if types is not None and any(t != "full_attention" for t in types):
    raise opened.wrong(f"has layers of types {types}; only full_attention is supported")
  if family == "llama":
    only(opened, rest, _INERT)
    rest = {k: v for k, v in rest.items() if k not in _INERT}
  try:
    config = config_from_hf({**rest, "model_type": family})
  except UserError as error:
    raise opened.wrong(str(error)) from None
  layer = config.layers[0]
  if layer.mixer.qkv_bias or layer.mixer.out_bias or layer.mlp.use_bias:
    raise opened.wrong("has biases in its layer, which our heads don't have")
  if layer.mlp.activation != "silu":
    raise opened.wrong(f"has the activation {layer.mlp.activation!r}; only silu is supported")
  if layer.mixer.window is not None:
    raise opened.wrong("has sliding-window attention, which our heads don't have")
  return config


ATTENTION = {f"{p}/kernel": Stored(f"self_attn.{p}_proj.weight", True) for p in "qkvo"}
MLP = {f"{p}/kernel": Stored(f"mlp.{p}_proj.weight", True) for p in ("gate", "up", "down")}


def below(ours: str, theirs: str, table: Mapping[str, Stored]) -> dict[str, Stored]:
  """``table`` with both sides moved below a prefix."""
  return {ours + path: dataclasses.replace(s, name=theirs + s.name) for path, s in table.items()}


# Draft vocabulary: ``d2t[i] = ids[i] - i`` (EAGLE-3) or ``token_map[i] = ids[i]`` (vLLM's Medusa).


def stored_ids(opened: Opened) -> np.ndarray | None:
  """Token ids of the draft vocabulary in the file's own order; None: all tokens."""
  if "token_map" in opened.files:
    return opened.view("token_map").astype(np.int64)
  if "d2t" in opened.files:
    offsets = opened.view("d2t").astype(np.int64)
    return offsets + np.arange(len(offsets))
  return None


def read_vocabulary(opened: Opened, target: Any, size: int | None) -> Any:
  """The ``DraftVocabulary`` of a folder, or None where it is the target's; checks t2d and sizes."""
  from jaxdec.drafting.vocabulary import DraftVocabulary

  ids = stored_ids(opened)
  if ids is None:
    if size not in (None, target.vocab_size):
      raise opened.wrong(f"has draft_vocab_size {size} and no d2t that says which tokens these are")
    return None
  if size is not None and len(ids) != size:
    raise opened.wrong(f"has draft_vocab_size {size}, but its map has {len(ids)} tokens")
  if len(np.unique(ids)) != len(ids) or ids.min() < 0 or ids.max() >= target.vocab_size:
    raise opened.wrong(
      "its draft vocabulary names a token twice, or one outside the target's "
      f"{target.vocab_size}; d2t holds offsets (token - index)"
    )
  vocabulary = DraftVocabulary(ids, target.vocab_size)
  if "t2d" in opened.files and not np.array_equal(opened.view("t2d"), vocabulary.t2d):
    raise opened.wrong("t2d does not mark the tokens that d2t gives")
  return None if len(ids) == target.vocab_size else vocabulary


def vocabulary_tensors(drafter: Any) -> dict[str, np.ndarray]:
  """``d2t`` (int64 offsets) and ``t2d`` (mask); nothing where the vocabulary is the target's."""
  if drafter.vocabulary is None:
    return {}
  return {"d2t": drafter.vocabulary.d2t.astype(np.int64), "t2d": drafter.vocabulary.t2d}


def check_tensors(
  opened: Opened, layout: Layout, stored: Mapping[str, Stored], shapes: Mapping[str, tuple]
) -> None:
  """Raises UserError that lists missing, unexpected and mis-shaped tensors."""
  expected = {
    s.name: tuple(shapes[path])[::-1] if s.transpose else tuple(shapes[path])
    for path, s in stored.items()
  }
  found = set(opened.files)
  known = {*expected, *layout.optional, "d2t", "t2d", "token_map"}
  wrong = [
    f"{name} is {opened.shape(name)}, expected {shape}"
    for name, shape in sorted(expected.items())
    if name in found and opened.shape(name) != shape
  ]
  parts = {
    "missing": sorted(set(expected) - found),
    "unexpected": sorted(n for n in found - known if not n.endswith("rotary_emb.inv_freq")),
    "mis-shaped": wrong,
  }
  problems = [f"{word}: {listed(names)}" for word, names in parts.items() if names]
  if problems:
    raise opened.wrong(f"its tensors are no {layout.kind} of this target; {'; '.join(problems)}")
