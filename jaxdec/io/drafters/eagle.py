# SPDX-License-Identifier: Apache-2.0
"""EAGLE-1 heads (EAGLE-2 and HASS share their shape) as their authors store them.

Names and fields as read in ``eagle/model/cnets1.py`` and ``eagle/train/*.json``
(SafeAILab/EAGLE), ``vllm/model_executor/models/llama_eagle.py`` (vllm-project/vllm) and
``python/sglang/srt/models/llama_eagle.py`` (sgl-project/sglang).

``fc`` reads ``[embedding ; feature]``; the first layer has no input norm. Whether ``fc`` has a bias
is told by the tensors: the authors' field ``bias`` means it, absent it is true, but vLLM takes that
field for a bias of the attention and reads ``fc`` without one.
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
  plain_embeddings,
  read_layer,
  sizes,
  write_layer,
)

COPIES = {"embed_tokens.weight": "embed", "lm_head.weight": "head"}


def stored(layer: str, fuse: str) -> Any:
  """The table, with the names of layer i below ``layer.format(i)`` and of W_fc below ``fuse``."""

  def table(drafter: Any) -> dict[str, Stored]:
    out = {"fc/kernel": Stored(f"{fuse}weight", True)}
    if drafter.fuse_bias:
      out["fc/bias"] = Stored(f"{fuse}bias")
    for i in range(drafter.num_layers):
      names = {
        **below("mixer/", "", ATTENTION),
        **below("mlp/", "", MLP),
        "mlp_norm/scale": Stored("post_attention_layernorm.weight"),
      }
      if i:
        names["mixer_norm/scale"] = Stored("input_layernorm.weight")
      out |= below(f"blocks_{i}/", layer.format(i), names)
    return out

  return table


def head(opened: Opened, layer: Mapping[str, Any], bias: bool, target: Any,
         options: dict[str, Any]) -> Any:  # fmt: skip
  """The drafter of an EAGLE-1 head whose layers have the fields ``layer``."""
  from jaxdec.drafting.eagle import Eagle

  plain_embeddings(target, "EAGLE")
  config = read_layer(opened, layer, "llama")
  return Eagle(
    dim=target.dim,
    vocab_size=target.vocab_size,
    logit_cap=target.logit_cap,  # the target's own head makes the logits
    attention=config.layers[0].mixer,
    hidden_dim=config.layers[0].mlp.hidden_dim,
    eps=config.norm.eps,
    num_layers=config.num_layers,
    fuse_bias=bias,
    **options,
  )


def _read(opened: Opened, target: Any, options: dict[str, Any]) -> Any:
  sizes(opened, opened.fields, target)
  layer = {k: v for k, v in opened.fields.items() if k != "bias"}
  return head(opened, layer, "fc.bias" in opened.files, target, options)


def layer_fields(layout: Layout, drafter: Any, target: Any) -> dict[str, Any]:
  plain_embeddings(target, "EAGLE")
  return write_layer(layout, drafter, drafter.attention, target, "llama", drafter.num_layers)


def _fields(drafter: Any, target: Any, verifier: str | None) -> dict[str, Any]:
  fields = {**layer_fields(EAGLE, drafter, target), "architectures": ["LlamaForCausalLMEagle"]}
  return fields if drafter.fuse_bias else {**fields, "bias": False}


EAGLE = Layout(
  name="eagle",
  kind="eagle",
  served_by="SGLang, and vLLM where fuse_bias is False",
  recognises=lambda fields, names: (
    {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= names and "hidden_norm.weight" not in names
  ),
  read=_read,
  fields=_fields,
  stored=stored("layers.{}.", "fc."),
  rename=lambda name: name.removeprefix("model."),
  optional=COPIES,
)
