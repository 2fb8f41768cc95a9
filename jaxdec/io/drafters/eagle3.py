# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 heads as their authors and SpecForge store them, for vLLM, SGLang and tpu-inference.

Names and fields as read in ``eagle/traineagle3/cnets.py`` and its ``config.json``
(SafeAILab/EAGLE), ``vllm/model_executor/models/llama_eagle3.py`` (vllm-project/vllm),
``python/sglang/srt/models/llama_eagle3.py`` (sgl-project/sglang),
``tpu_inference/models/jax/llama_eagle3.py`` (vllm-project/tpu-inference) and ``configs/*.json``
(sgl-project/SpecForge).

The captured layers have two fields: ``eagle_aux_hidden_state_layer_ids`` names layer *inputs*
(vLLM); the field of that name inside ``eagle_config`` names layer *outputs*, one less (SGLang,
which adds one). Without either, servers read the inputs of layers 2, L//2 and L-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdec.io.drafters.layout import (
  ATTENTION,
  MLP,
  Layout,
  Opened,
  Stored,
  below,
  check_captures,
  layer_ids,
  only,
  plain_embeddings,
  read_layer,
  read_vocabulary,
  sizes,
  vocabulary_tensors,
  write_layer,
)

INPUTS = "eagle_aux_hidden_state_layer_ids"
_NUM_CAPTURED = 3
# Options of the head, off where a file doesn't name them; those of ours, and those we don't have.
_OPTIONS = ("norm_before_residual", "fc_norm", "norm_output")
_NEVER = dict.fromkeys(("norm_before_fc", "bias", "parallel_drafting"), (False,))
_OWN = ("draft_vocab_size", "target_hidden_size", "eagle_config", INPUTS, *_OPTIONS, *_NEVER)


def stored(prefix: str) -> Any:
  """The table with the layer's tensors below ``prefix``."""

  def table(drafter: Any) -> dict[str, Stored]:
    layer = {
      **below("attention/", "", ATTENTION),
      **below("mlp/", "", MLP),
      "embed_norm/scale": Stored("input_layernorm.weight"),
      "state_norm/scale": Stored("hidden_norm.weight"),
      "mlp_norm/scale": Stored("post_attention_layernorm.weight"),
    }
    norms = range(len(drafter.capture_layers) if drafter.fc_norm else 0)
    return {
      **below("", prefix, layer),
      **{f"fc_norms_{i}/scale": Stored(f"fc_norm.{i}.weight") for i in norms},
      "fuse/kernel": Stored("fc.weight", True),
      "out_norm/scale": Stored("norm.weight"),
      "lm_head/kernel": Stored("lm_head.weight", True, True),
    }

  return table


def head(opened: Opened, own: Mapping[str, Any], layer: Mapping[str, Any], target: Any,
         options: dict[str, Any]) -> Any:  # fmt: skip
  """The drafter of an EAGLE-3 head: ``own`` are its fields, ``layer`` those of its layer."""
  from jaxdec.drafting.eagle3 import Eagle3

  plain_embeddings(target, "EAGLE-3")
  sizes(opened, own, target)
  only(opened, own, _NEVER)
  config = read_layer(opened, layer, "llama")
  if config.num_layers != 1:
    raise opened.wrong(f"has {config.num_layers} layers; EAGLE-3 heads have one here")
  size = own.get("draft_vocab_size")
  return Eagle3(
    dim=target.dim,
    vocab_size=target.vocab_size,
    capture_layers=_captured(opened, own, target),
    attention=config.layers[0].mixer,
    hidden_dim=config.layers[0].mlp.hidden_dim,
    eps=config.norm.eps,
    vocabulary=read_vocabulary(opened, target, size),
    **{name: bool(own.get(name)) for name in _OPTIONS},
    **options,
  )


def _captured(opened: Opened, own: Mapping[str, Any], target: Any) -> tuple[int, ...]:
  nested = own.get("eagle_config") or {}
  if not nested.get("use_aux_hidden_state", True):
    raise opened.wrong("reads the target's last state alone (use_aux_hidden_state is false)")
  outputs = nested.get(INPUTS)
  after = None if not outputs else [i + 1 for i in outputs]
  given = own.get(INPUTS) or after
  if own.get(INPUTS) and after and list(own[INPUTS]) != after:
    raise opened.wrong(
      f"contradicts itself: {INPUTS} names the inputs of layers {own[INPUTS]}, eagle_config the "
      f"outputs of {outputs}, which are the inputs of {after}"
    )
  given = list(given) if given else default_captures(target)
  if len(given) != _NUM_CAPTURED:
    raise opened.wrong(f"captures {len(given)} layers; EAGLE-3 heads read {_NUM_CAPTURED}")
  return layer_ids(opened, given, target)


def default_captures(target: Any) -> list[int]:
  """Layer inputs that servers read where the file doesn't say."""
  return [2, target.num_layers // 2, target.num_layers - 3]


def head_fields(layout: Layout, drafter: Any, target: Any) -> tuple[dict, dict]:
  """The head's own fields, and those of its layer."""
  plain_embeddings(target, "EAGLE-3")
  check_captures(layout, drafter, target, _NUM_CAPTURED)
  own = {
    "draft_vocab_size": drafter.draft_size,
    "target_hidden_size": drafter.dim,
    INPUTS: list(drafter.capture_layers),
    **{name: getattr(drafter, name) for name in _OPTIONS},
    "norm_before_fc": False,
  }
  return own, write_layer(layout, drafter, drafter.attention, target, "llama")


def _read(opened: Opened, target: Any, options: dict[str, Any]) -> Any:
  layer = {k: v for k, v in opened.fields.items() if k not in _OWN}
  return head(opened, opened.fields, layer, target, options)


def _fields(drafter: Any, target: Any, verifier: str | None) -> dict[str, Any]:
  own, layer = head_fields(EAGLE3, drafter, target)
  outputs = {INPUTS: [i - 1 for i in own[INPUTS]], "use_aux_hidden_state": True}
  return {**layer, **own, "architectures": ["LlamaForCausalLMEagle3"], "eagle_config": outputs}


def _rename(name: str) -> str:
  name = name.removeprefix("model.")
  return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name


EAGLE3 = Layout(
  name="eagle3",
  kind="eagle3",
  served_by="vLLM, SGLang, tpu-inference",
  recognises=lambda fields, names: "midlayer.hidden_norm.weight" in names,
  read=_read,
  fields=_fields,
  stored=stored("midlayer."),
  constants=vocabulary_tensors,
  rename=_rename,
  optional={"embed_tokens.weight": "embed"},
)
