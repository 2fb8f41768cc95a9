# SPDX-License-Identifier: Apache-2.0
"""DFlash drafters as their authors and SpecForge store them.

Names and fields as read in ``dflash/model.py`` and ``tests/fixtures/`` (z-lab/dflash),
``configs/qwen3-8b-dflash.json`` (sgl-project/SpecForge), ``python/sglang/srt/models/dflash.py``
(sgl-project/sglang), ``vllm/model_executor/models/qwen3_dflash.py`` (vllm-project/vllm) and
``tpu_inference/models/jax/qwen3_dflash.py`` (vllm-project/tpu-inference).

The layers are Qwen3's (norms on queries and keys). ``dflash_config.target_layer_ids`` names layer
*outputs*, one less than our layer inputs; the last layer's is not used, since the reference takes
it after the final norm and servers before. ``block_size`` counts the anchor. Embeddings and LM head
are the target's.
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
  sizes,
  write_layer,
)

# Options of variants: field -> the values that leave a plain DFlash.
_FIXED: dict[str, tuple[Any, ...]] = {
  "is_causal": (False,),
  "causal": (False,),
  "use_swa": (False,),
  "output_multiplier": (1.0,),
  "input_embedding_scale": (1.0,),
  "attention_sink_bias": (False,),
  "attention_mode": ("gqa",),
}
_OWN = ("dflash_config", "block_size", "num_target_layers", "mask_token_id", *_FIXED)


def stored(drafter: Any) -> dict[str, Stored]:
  table = {
    "fuse/kernel": Stored("fc.weight", True),
    "context_norm/scale": Stored("hidden_norm.weight"),
    "out_norm/scale": Stored("norm.weight"),
  }
  layer = {
    **below("mixer/", "", ATTENTION),
    "mixer/q_norm/scale": Stored("self_attn.q_norm.weight"),
    "mixer/k_norm/scale": Stored("self_attn.k_norm.weight"),
    **below("mlp/", "", MLP),
    "mixer_norm/scale": Stored("input_layernorm.weight"),
    "mlp_norm/scale": Stored("post_attention_layernorm.weight"),
  }
  for i in range(drafter.num_layers):
    table |= below(f"layers_{i}/", f"layers.{i}.", layer)
  return below("model/", "", table)


def head(opened: Opened, layer: Mapping[str, Any], target: Any, options: dict[str, Any], *,
         captured: list[int], block_size: int, mask_token: int) -> Any:  # fmt: skip
  """The drafter whose layers have the fields ``layer``; ``captured``: layer inputs."""
  from jaxdec.drafting.dflash import DFlash

  plain_embeddings(target, "DFlash")
  config = read_layer(opened, layer, "qwen3")
  if not isinstance(block_size, int) or block_size < 2:
    raise opened.wrong(f"block_size must be an integer of at least 2, got {block_size!r}")
  if not isinstance(mask_token, int) or not 0 <= mask_token < target.vocab_size:
    raise opened.wrong(
      f"mask_token_id must be a token of the target's {target.vocab_size}, got {mask_token!r}"
    )
  return DFlash(
    dim=target.dim,
    vocab_size=target.vocab_size,
    logit_cap=target.logit_cap,  # the target's own head makes the logits
    num_heads=block_size - 1,
    capture_layers=layer_ids(opened, captured, target),
    num_layers=config.num_layers,
    attention=config.layers[0].mixer,
    hidden_dim=config.layers[0].mlp.hidden_dim,
    eps=config.norm.eps,
    mask_token=mask_token,
    **options,
  )


def _read(opened: Opened, target: Any, options: dict[str, Any]) -> Any:
  fields = opened.fields
  sizes(opened, fields, target)
  nested = fields.get("dflash_config") or {}
  own = {**{k: fields[k] for k in _OWN if k in fields}, **nested}
  only(opened, own, _FIXED)
  cap = own.get("final_logit_softcapping")
  if cap not in (None, target.logit_cap):
    raise opened.wrong(f"caps its logits at {cap}, the target's head at {target.logit_cap}")
  layers = fields.get("num_hidden_layers")
  outputs = own.get("target_layer_ids") or _default_outputs(target.num_layers, layers)
  return head(
    opened,
    {k: v for k, v in fields.items() if k not in _OWN},
    target,
    options,
    captured=[i + 1 for i in outputs],
    block_size=own.get("block_size", 16),
    mask_token=own.get("mask_token_id"),
  )


def _default_outputs(num_target_layers: int, num_layers: int) -> list[int]:
  """Layers that servers capture where the file doesn't say."""
  if num_layers == 1:
    return [num_target_layers // 2]
  return [round(1 + i * (num_target_layers - 4) / (num_layers - 1)) for i in range(num_layers)]


def layer_fields(layout: Layout, drafter: Any, target: Any) -> dict[str, Any]:
  plain_embeddings(target, "DFlash")
  if drafter.mask_token is None:
    raise layout.refuse("mask_token=None (a learned mask embedding)", drafter)
  check_captures(layout, drafter, target)
  return write_layer(layout, drafter, drafter.attention, target, "qwen3", drafter.num_layers)


def _fields(drafter: Any, target: Any, verifier: str | None) -> dict[str, Any]:
  return {
    **layer_fields(DFLASH, drafter, target),
    "architectures": ["DFlashDraftModel"],
    "block_size": drafter.block_size,
    "num_target_layers": target.num_layers,
    "dflash_config": {
      "block_size": drafter.block_size,
      "mask_token_id": drafter.mask_token,
      "target_layer_ids": [i - 1 for i in drafter.capture_layers],
    },
  }


DFLASH = Layout(
  name="dflash",
  kind="dflash",
  served_by="SGLang, vLLM, tpu-inference",
  recognises=lambda fields, names: (
    {"fc.weight", "hidden_norm.weight", "layers.0.self_attn.q_norm.weight"} <= names
  ),
  read=_read,
  fields=_fields,
  stored=stored,
  rename=lambda name: name.removeprefix("model."),
  optional={"embed_tokens.weight": "embed", "lm_head.weight": "head"},
)
