# SPDX-License-Identifier: Apache-2.0
"""Heads in the ``speculators`` format, which vLLM serves as they are.

Names and fields as read in ``src/speculators/models/{eagle3,dflash}/{config,core}.py``,
``src/speculators/models/eagle.py`` and ``src/speculators/convert/`` (vllm-project/speculators) and
``vllm/transformers_utils/configs/speculators/`` (vllm-project/vllm).

``config.json`` names the algorithm (``speculators_model_type``), how many tokens to draft
(``speculators_config.proposal_methods``) and the target (``speculators_config.verifier``); the
layer is a nested configuration that leaves out what its class defaults to. Captured layers are
layer *inputs* in every algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdec.io.drafters import dflash, eagle, eagle3
from jaxdec.io.drafters.layout import Layout, Opened, only, sizes, vocabulary_tensors
from jaxdec.io.hf_families import FAMILIES

# What an absent field means: the defaults of transformers' LlamaConfig and Qwen3Config.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
  ),
  "qwen3": dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=32768,
  ),
}


def _layer(opened: Opened, target: Any, families: tuple[str, ...]) -> dict[str, Any]:
  """The nested configuration, of one of these families, complete and checked against the target."""
  given = opened.fields.get("transformer_layer_config")
  if not isinstance(given, Mapping):
    raise opened.wrong("config.json has no transformer_layer_config")
  found = given.get("model_type", "llama")
  if found not in families:
    raise opened.wrong(f"its layer is a {found!r} layer; only {families[0]!r} is supported here")
  layer = {**_DEFAULTS[found], **given}
  sizes(opened, layer, target)
  return layer


def _options(opened: Opened, options: dict[str, Any]) -> dict[str, Any]:
  """The depth drafted, unless the caller says another."""
  methods = (opened.fields.get("speculators_config") or {}).get("proposal_methods") or [{}]
  tokens = methods[0].get("speculative_tokens")
  return options if tokens is None else {"num_heads": tokens, **options}


def _common(algorithm: str, name: str, tokens: int, target: Any, verifier: str | None) -> dict:
  family = FAMILIES.get(target.family)
  proposal = {
    "proposal_type": "greedy",
    "speculative_tokens": tokens,
    "verifier_accept_k": 1,
    "accept_tolerance": 0.0,
  }
  return {
    "architectures": [name],
    "speculators_model_type": algorithm,
    "speculators_config": {
      "algorithm": algorithm,
      "default_proposal_method": "greedy",
      "proposal_methods": [proposal],
      "verifier": {
        "name_or_path": verifier,
        "architectures": [] if family is None else [family.architecture],
      },
    },
    "tie_word_embeddings": False,
  }


def _nested(layer: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in layer.items() if k != "architectures"}


def _is(algorithm: str):
  return lambda fields, names: fields.get("speculators_model_type") == algorithm


# EAGLE-3.


def _read_eagle3(opened: Opened, target: Any, options: dict[str, Any]) -> Any:
  # The format's own default is False, vLLM's is True: a head that doesn't say can't be trusted.
  if "norm_before_residual" not in opened.fields:
    raise opened.wrong("config.json doesn't say norm_before_residual; add what it was trained with")
  layer = _layer(opened, target, ("llama",))
  return eagle3.head(opened, opened.fields, layer, target, _options(opened, options))


def _eagle3_fields(drafter: Any, target: Any, verifier: str | None) -> dict[str, Any]:
  own, layer = eagle3.head_fields(EAGLE3, drafter, target)
  tokens = drafter.max_depth
  return {
    **_common("eagle3", "Eagle3Speculator", tokens, target, verifier),
    **own,
    "transformer_layer_config": _nested(layer),
  }


EAGLE3 = Layout(
  name="speculators_eagle3",
  kind="eagle3",
  served_by="vLLM",
  recognises=_is("eagle3"),
  read=_read_eagle3,
  fields=_eagle3_fields,
  stored=eagle3.stored("layers.0."),
  constants=vocabulary_tensors,
  optional={"embed_tokens.weight": "embed"},
)


# EAGLE-1. The format's option layernorms adds norms our head doesn't have.


def _read_eagle(opened: Opened, target: Any, options: dict[str, Any]) -> Any:
  if opened.fields.get("layernorms"):
    raise opened.wrong("has additional norms (layernorms is true), which our heads don't have")
  layer = _layer(opened, target, ("llama",))
  bias = bool(opened.fields.get("fusion_bias", False))
  return eagle.head(opened, layer, bias, target, _options(opened, options))


def _eagle_fields(drafter: Any, target: Any, verifier: str | None) -> dict[str, Any]:
  if drafter.num_layers != 1:
    raise EAGLE.refuse(f"num_layers={drafter.num_layers}", drafter)
  fields = _common("eagle", "EagleSpeculator", drafter.max_depth, target, verifier)
  return {
    **fields,
    "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
    "transformer_layer_architecture": "LlamaDecoderLayer",
    "layernorms": False,
    "fusion_bias": drafter.fuse_bias,
    "transformer_layer_config": _nested(eagle.layer_fields(EAGLE, drafter, target)),
  }


EAGLE = Layout(
  name="speculators_eagle",
  kind="eagle",
  served_by="speculators",
  recognises=_is("eagle"),
  read=_read_eagle,
  fields=_eagle_fields,
  stored=eagle.stored("transformer.", "fusion_fc."),
  optional=eagle.COPIES,
)

# DFlash. The format saves copies of the target's head and norm beside the drafter.

_VARIANTS: dict[str, tuple[Any, ...]] = {
  "projector_type": ("dflash",),
  "shift_label": (False,),
  "sample_from_anchor": (False,),
}


def _dflash_layer(opened: Opened, target: Any) -> dict[str, Any]:
  """The layers are Qwen3's, whatever class their configuration has and takes absent fields from."""
  layer = _layer(opened, target, ("qwen3", "llama"))
  if layer.get("model_type", "llama") == "qwen3":
    return layer
  only(opened, layer, {"mlp_bias": (False,)})
  layer.setdefault("head_dim", layer["hidden_size"] // layer["num_attention_heads"])
  if layer.get("rope_parameters") is None:
    layer.setdefault("rope_theta", 10000.0)
  # The window's length is there even where ``layer_types`` give no layer a window.
  return {k: v for k, v in layer.items() if k not in ("mlp_bias", "sliding_window")}


def _read_dflash(opened: Opened, target: Any, options: dict[str, Any]) -> Any:
  fields = opened.fields
  only(opened, fields, _VARIANTS)
  if fields.get("draft_vocab_size") not in (None, target.vocab_size):
    raise opened.wrong(
      f"has an LM head of its own over {fields['draft_vocab_size']} tokens; DFlash drafters use "
      "the target's here"
    )
  return dflash.head(
    opened,
    _dflash_layer(opened, target),
    target,
    options,
    captured=fields.get("aux_hidden_state_layer_ids") or eagle3.default_captures(target),
    block_size=fields.get("block_size", 8),
    mask_token=fields.get("mask_token_id"),
  )


def _dflash_fields(drafter: Any, target: Any, verifier: str | None) -> dict[str, Any]:
  return {
    **_common("dflash", "DFlashSpeculator", drafter.num_heads, target, verifier),
    "draft_vocab_size": target.vocab_size,
    "block_size": drafter.block_size,
    "aux_hidden_state_layer_ids": list(drafter.capture_layers),
    "mask_token_id": drafter.mask_token,
    "sample_from_anchor": False,
    "transformer_layer_config": _nested(dflash.layer_fields(DFLASH, drafter, target)),
  }


DFLASH = Layout(
  name="speculators_dflash",
  kind="dflash",
  served_by="vLLM",
  recognises=_is("dflash"),
  read=_read_dflash,
  fields=_dflash_fields,
  stored=dflash.stored,
  optional={
    "embed_tokens.weight": "embed",
    "lm_head.weight": "head",
    "verifier_lm_head.weight": "head",
    "verifier_norm.weight": "norm",
  },
)

SPECULATORS: tuple[Layout, ...] = (EAGLE3, EAGLE, DFLASH)
