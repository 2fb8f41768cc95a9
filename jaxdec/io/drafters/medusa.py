# SPDX-License-Identifier: Apache-2.0
"""Medusa heads as vLLM serves them, and as their authors store them.

Names and fields as read in ``vllm/model_executor/models/medusa.py`` and
``vllm/transformers_utils/configs/medusa.py`` (vllm-project/vllm), and in the reference
implementation, ``medusa/model/medusa_model.py`` (FasterDecoding/Medusa), whose file
``medusa_lm_head.safetensors`` text-generation-inference and TensorRT-LLM read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdec.io.drafters.layout import Layout, Opened, Stored, only, read_vocabulary, sizes

ORIGINAL_FILE = "medusa_lm_head.safetensors"


def _stored(drafter: Any, linear: str, head: str) -> dict[str, Stored]:
  table = {}
  for k in range(drafter.num_heads):
    for i in range(drafter.num_blocks):
      name = linear.format(k, i)
      table[f"head_{k}/block_{i}/kernel"] = Stored(f"{name}.weight", True)
      table[f"head_{k}/block_{i}/bias"] = Stored(f"{name}.bias")
    table[f"head_{k}/lm_head/kernel"] = Stored(head.format(k, drafter.num_blocks), True, True)
  return table


def _drafter(opened: Opened, target: Any, options: dict[str, Any], heads: int, blocks: int) -> Any:
  from jaxdec.drafting.medusa import Medusa

  size = opened.fields.get("truncated_vocab_size")
  return Medusa(
    dim=target.dim,
    vocab_size=target.vocab_size,
    num_heads=heads,
    num_blocks=blocks,
    vocabulary=read_vocabulary(opened, target, size),
    **options,
  )


def _read(opened: Opened, target: Any, options: dict[str, Any]) -> Any:
  fields = opened.fields
  sizes(opened, fields, target)
  if fields.get("original_lm_head"):
    raise opened.wrong("has one LM head for all its heads (original_lm_head); ours need one each")
  only(opened, fields, {"logit_scale": (1.0,)})
  if not fields.get("medusa_fc_bias", False):
    raise opened.wrong("its blocks have no bias (medusa_fc_bias is not true), and ours have one")
  heads = fields.get("num_heads", fields.get("medusa_num_heads", 5))
  blocks = fields.get("num_hidden_layers", fields.get("medusa_num_layers", 1))
  return _drafter(opened, target, options, heads, blocks)


def _fields(drafter: Any, target: Any, verifier: str | None) -> dict[str, Any]:
  fields = {
    "architectures": ["MedusaModel"],
    "model_type": "medusa",
    "hidden_size": drafter.dim,
    "vocab_size": drafter.vocab_size,
    "num_heads": drafter.num_heads,
    "num_hidden_layers": drafter.num_blocks,
    "medusa_fc_bias": True,
    "original_lm_head": False,
  }
  if drafter.vocabulary is not None:
    fields["truncated_vocab_size"] = len(drafter.vocabulary.ids)
  return fields


def _token_map(drafter: Any) -> dict[str, np.ndarray]:
  if drafter.vocabulary is None:
    return {}
  return {"token_map": drafter.vocabulary.ids.astype(np.int64)}


MEDUSA = Layout(
  name="medusa",
  kind="medusa",
  served_by="vLLM",
  recognises=lambda fields, names: (
    fields.get("model_type") == "medusa" and "blocks.0.layers.0.weight" in names
  ),
  read=_read,
  fields=_fields,
  stored=lambda drafter: _stored(drafter, "blocks.{}.layers.{}", "lm_heads.{}.weight"),
  constants=_token_map,
  rename=lambda name: name.removeprefix("medusa_heads."),
)


def _read_original(opened: Opened, target: Any, options: dict[str, Any]) -> Any:
  fields = opened.fields
  blocks = fields.get("medusa_num_layers", 1)
  heads = 1 + max(int(name.split(".")[0]) for name in opened.files if name[0].isdigit())
  stated = fields.get("medusa_num_heads", heads)
  if stated > heads:
    raise opened.wrong(f"has {heads} heads and says medusa_num_heads={stated}")
  # The authors' own configurations say 2 where the file holds 5: the tensors count.
  return _drafter(opened, target, options, heads, blocks)


def _original_fields(drafter: Any, target: Any, verifier: str | None) -> dict[str, Any]:
  return {
    "model_type": "medusa",
    "medusa_num_heads": drafter.num_heads,
    "medusa_num_layers": drafter.num_blocks,
    "base_model_name_or_path": verifier,
  }


def _is_original(fields: Mapping[str, Any], names: set[str]) -> bool:
  return "0.0.linear.weight" in names


MEDUSA_ORIGINAL = Layout(
  name="medusa_original",
  kind="medusa",
  served_by="the authors' code, text-generation-inference, TensorRT-LLM",
  recognises=_is_original,
  read=_read_original,
  fields=_original_fields,
  stored=lambda drafter: _stored(drafter, "{}.{}.linear", "{}.{}.weight"),
  weights=ORIGINAL_FILE,
)
