# SPDX-License-Identifier: Apache-2.0
"""Checkpoint families: ``config.json`` to and from ``DecoderConfig``, and the map of tensor names.

A family is data: its fields are in ``jaxdec.io.hf_families``, its tensor names in ``_LAYER`` and
``_TOP``. Decoders that no family can express (hybrids, linear attention) are written as
``model_type`` ``jaxdec``: ``config.json`` then holds the configuration itself, and
tensors carry their own paths.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from jaxdec.errors import UserError, nearest
from jaxdec.io import hf_config, hf_families
from jaxdec.mixers.rope import RopeConfig
from jaxdec.models.config import (
  BlockFFNConfig,
  DecoderConfig,
  LayerConfig,
  MixerConfig,
  MLPConfig,
  NormConfig,
)

SUPPORTED = tuple(hf_families.FAMILIES)


def _kind(cls: type) -> str:
  """``LinearAttentionConfig`` -> ``linear_attention``."""
  return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__.removesuffix("Config")).lower()


_MIXERS = {_kind(cls): cls for cls in typing.get_args(MixerConfig) or (MixerConfig,)}
_NESTED = {"rope": RopeConfig, "norm": NormConfig}
_MLPS = {"gated": MLPConfig, "block_ffn": BlockFFNConfig}  # gated ones carry no tag


def config_from_hf(fields: Mapping[str, Any]) -> DecoderConfig:
  """The decoder that a ``config.json`` describes.

  Raises:
    UserError: unsupported family, a field that is not understood, or a value not implemented.
  """
  if hf_config.family_of(fields) == "jaxdec":
    skip = {"model_type", "architectures", "torch_dtype", "dtype"}
    return _decode(DecoderConfig, {k: v for k, v in fields.items() if k not in skip}, "config.json")
  return _decode(DecoderConfig, hf_config.parse(fields), "config.json")


def config_to_hf(config: DecoderConfig, family: str | None = None) -> dict[str, Any]:
  """``config.json`` for ``config``, written as ``family`` (None: ``config.family``; or ``jaxdec``).

  What is written is read back and compared, so a feature that the family has no field for is an
  error, never lost. The older field names are used, which every transformers version reads, except
  where only ``rope_parameters`` can say it.

  Raises:
    UserError: the family is unknown or can't express the configuration.
  """
  family = family or config.family
  if family == "jaxdec":
    return {"model_type": "jaxdec", "architectures": ["JaxdecForCausalLM"], **_encode(config)}
  hf_config.family_of({"model_type": family})
  odd = [m for m in (layer.mixer for layer in config.layers) if _kind(type(m)) != "attention"]
  if odd:
    raise UserError(
      f"family {family!r} has no {_kind(type(odd[0]))} layers; write the decoder as "
      "family 'jaxdec'."
    )
  if any(not isinstance(layer.mlp, MLPConfig) for layer in config.layers):
    raise UserError(
      f"family {family!r} has no block_ffn layers; write the decoder as family 'jaxdec'."
    )
  fields = _write(config, family)
  back = dataclasses.replace(config_from_hf(fields), family=config.family)
  if back != config:
    raise UserError(
      f"family {family!r} can't express this decoder: {_difference(config, back)}; "
      "write it as family 'jaxdec'."
    )
  return fields


def _encode(value: Any) -> Any:
  """Dataclasses to JSON, mixers (and unusual MLPs) tagged with their kind."""
  if dataclasses.is_dataclass(value):
    out = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, BlockFFNConfig):
      return {"kind": "block_ffn", **out}
    return {"kind": _kind(type(value)), **out} if type(value) in _MIXERS.values() else out
  return [_encode(v) for v in value] if isinstance(value, tuple) else value


def _decode(cls: type, fields: Mapping[str, Any], where: str) -> Any:
  """The inverse of ``_encode``; unknown fields and unknown mixers are errors that name them."""
  fields = dict(fields)
  known = {f.name for f in dataclasses.fields(cls)}
  unknown = sorted(set(fields) - known)
  if unknown:
    raise UserError(f"{where}: {unknown[0]!r} is not understood{nearest(unknown[0], known)}.")
  for name, value in fields.items():
    if name == "layers":
      fields[name] = tuple(
        _decode(LayerConfig, v, f"{where} layers[{i}]") for i, v in enumerate(value)
      )
    elif name == "mixer":
      kind = value.get("kind")
      if kind not in _MIXERS:
        raise UserError(
          f"{where}: mixer {kind!r} is not supported{nearest(str(kind), _MIXERS)}; "
          f"supported: {', '.join(_MIXERS)}."
        )
      rest = {k: v for k, v in value.items() if k != "kind"}
      fields[name] = _decode(_MIXERS[kind], rest, f"{where} mixer")
    elif name == "mlp":
      kind = value.get("kind", "gated")
      if kind not in _MLPS:
        raise UserError(
          f"{where}: mlp {kind!r} is not supported{nearest(str(kind), _MLPS)}; "
          f"supported: {', '.join(_MLPS)}."
        )
      rest = {k: v for k, v in value.items() if k != "kind"}
      fields[name] = _decode(_MLPS[kind], rest, f"{where} mlp")
    elif name in _NESTED and value is not None:
      fields[name] = _decode(_NESTED[name], value, f"{where} {name}")
    elif isinstance(value, list):
      fields[name] = tuple(value)
  try:
    return cls(**fields)
  except TypeError as error:  # a field without a default is absent
    raise UserError(f"{where}: {str(error).split('__init__() ')[-1]}.") from None


def _difference(a: DecoderConfig, b: DecoderConfig) -> str:
  for f in dataclasses.fields(a):
    x, y = getattr(a, f.name), getattr(b, f.name)
    if x != y and f.name == "layers":
      i = next(i for i in range(len(x)) if x[i] != y[i])
      return f"layer {i} is {x[i]}, which would read back as {y[i]}"
    if x != y:
      return f"{f.name}={x!r} would read back as {y!r}"
  return "it differs"


def _write(config: DecoderConfig, family: str) -> dict[str, Any]:
  """The fields of a Hugging Face family, from the first layer and what varies between layers."""
  info = hf_families.FAMILIES[family]
  first = config.layers[0]
  mixer = first.mixer
  mixers = [layer.mixer for layer in config.layers]
  out: dict[str, Any] = dict(
    architectures=[info.architecture],
    model_type=family,
    vocab_size=config.vocab_size,
    hidden_size=config.dim,
    intermediate_size=first.mlp.hidden_dim,
    num_hidden_layers=config.num_layers,
    num_attention_heads=mixer.num_heads,
    num_key_value_heads=mixer.num_kv_heads,
    head_dim=mixer.head_dim,
    max_position_embeddings=config.max_length,
    rms_norm_eps=config.norm.eps,
    tie_word_embeddings=config.tie_embeddings,
    pad_token_id=None,
    bos_token_id=config.bos_id,
    eos_token_id=(
      list(config.eos_ids)
      if len(config.eos_ids) > 1
      else config.eos_ids[0]
      if config.eos_ids
      else None
    ),
  )
  activation = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[first.mlp.activation]
  out["hidden_activation" if info.gemma else "hidden_act"] = activation
  has = info.defaults
  if "attention_bias" in has:
    out["attention_bias"] = mixer.out_bias or mixer.qkv_bias
  if "mlp_bias" in has:
    out["mlp_bias"] = first.mlp.use_bias
  if info.gemma:
    scale = mixer.scale if mixer.scale is not None else mixer.head_dim**-0.5
    exact = round(scale**-2)  # the field is an integer; reading back checks that nothing is lost
    out["query_pre_attn_scalar"] = exact if exact**-0.5 == scale else scale**-2
    out["final_logit_softcapping"] = config.logit_cap
    out["attn_logit_softcapping"] = mixer.logit_cap
  windows = [m.window for m in mixers]
  if "sliding_window" in has:
    given = sorted({w for w in windows if w is not None})
    out["sliding_window"] = (
      given[0] if given else (4096 if "layer_types" in has and info.gemma else None)
    )
    if "use_sliding_window" in has:
      out["use_sliding_window"] = bool(given)
    if "layer_types" in has:
      out["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
  if family == "smollm3":
    out["no_rope_layers"] = [int(m.rope is not None) for m in mixers]
  out.update(_write_ropes(mixers, family, config.max_length))
  return out


def _write_ropes(mixers: list, family: str, max_length: int) -> dict[str, Any]:
  if family == "gemma3_text":
    ropes = {"full_attention": RopeConfig(theta=1e6), "sliding_attention": RopeConfig()}
    for m in mixers:
      if m.rope is not None:
        ropes["full_attention" if m.window is None else "sliding_attention"] = m.rope
    return {
      "rope_parameters": {
        k: {"rope_theta": r.theta, **_rope_fields(r, nested=True)} for k, r in ropes.items()
      }
    }
  rope = next((m.rope for m in mixers if m.rope is not None), RopeConfig())
  scaling = _rope_fields(rope)
  out = {"rope_theta": rope.theta, "rope_scaling": scaling or None}
  if rope.rotary_fraction != 1.0:
    out["partial_rotary_factor"] = rope.rotary_fraction
  return out


def _rope_fields(rope: RopeConfig, nested: bool = False) -> dict[str, Any]:
  """The dict of one rope; empty for the plain kind in the older layout."""
  out: dict[str, Any] = {"rope_type": rope.kind}
  if nested and rope.rotary_fraction != 1.0:
    out["partial_rotary_factor"] = rope.rotary_fraction
  if rope.kind == "default":
    return out if nested else {}
  out["factor"] = rope.factor
  defaults = RopeConfig()
  names = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
  }
  for name in names.get(rope.kind, ()):
    value = getattr(rope, name)
    if value is not None and (rope.kind == "llama3" or value != getattr(defaults, name)):
      out[name] = value
  if rope.kind in ("llama3", "yarn"):
    out["original_max_position_embeddings"] = rope.original_max_length
  return out


@dataclasses.dataclass(frozen=True)
class Source:
  """Where one of our tensors lies in a checkpoint.

  Attributes:
    name: the checkpoint's tensor name.
    transpose: stored ``[out, in]`` where ours is ``[in, out]``.
    rows: (start, stop) along the stored tensor's first axis, of fused tensors; None: all.
  """

  name: str
  transpose: bool = False
  rows: tuple[int, int] | None = None


_LINEAR = {
  "mixer/{}/kernel": ("self_attn.{}_proj.weight", True),
  "mixer/{}/bias": ("self_attn.{}_proj.bias", False),
}
# Our path below ``layers_i`` -> (name below ``model.layers.i``, transpose), for all families.
_LAYER = {
  **{
    ours.format(p): (theirs.format(p), t) for p in "qkvo" for ours, (theirs, t) in _LINEAR.items()
  },
  **{
    f"mlp/{p}/{leaf}": (f"mlp.{p}_proj.{name}", leaf == "kernel")
    for p in ("gate", "up", "down")
    for leaf, name in (("kernel", "weight"), ("bias", "bias"))
  },
  "mixer/q_norm/scale": ("self_attn.q_norm.weight", False),
  "mixer/k_norm/scale": ("self_attn.k_norm.weight", False),
  "mixer_norm/scale": ("input_layernorm.weight", False),
  "mlp_norm/scale": ("post_attention_layernorm.weight", False),
}
_GEMMA_LAYER = {
  **_LAYER,
  "post_mixer_norm/scale": ("post_attention_layernorm.weight", False),
  "mlp_norm/scale": ("pre_feedforward_layernorm.weight", False),
  "post_mlp_norm/scale": ("post_feedforward_layernorm.weight", False),
}
_TOP = {
  "embed": ("model.embed_tokens.weight", False),
  "embed/embedding": ("model.embed_tokens.weight", False),
  "final_norm/scale": ("model.norm.weight", False),
  "head/kernel": ("lm_head.weight", True),
}
# Buffers and copies that carry no information of their own.
IGNORED = re.compile(r".*rotary_emb\.inv_freq$|.*\.attn\.(masked_)?bias$")


def source(path: str, config: DecoderConfig, family: str | None = None) -> Source:
  """Where our parameter ``path`` (slash-separated, unrolled layout) lies in a checkpoint."""
  family = family or config.family
  if family == "jaxdec":
    return Source(path.replace("/", "."))
  if path in _TOP:
    return Source(*_TOP[path])
  info = hf_families.FAMILIES[family]
  index, _, rest = path.removeprefix("layers_").partition("/")
  table = _GEMMA_LAYER if info.gemma else _LAYER
  if not path.startswith("layers_") or rest not in table:
    raise UserError(
      f"family {family!r} has no place for the parameter {path!r}; write the decoder as "
      "family 'jaxdec'."
    )
  layer = config.layers[int(index)]
  prefix = f"model.layers.{index}."
  if info.fused:
    m = layer.mixer
    q, kv, f = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, layer.mlp.hidden_dim
    fused = {
      "mixer/q/kernel": ("self_attn.qkv_proj.weight", 0, q),
      "mixer/k/kernel": ("self_attn.qkv_proj.weight", q, q + kv),
      "mixer/v/kernel": ("self_attn.qkv_proj.weight", q + kv, q + 2 * kv),
      "mlp/gate/kernel": ("mlp.gate_up_proj.weight", 0, f),
      "mlp/up/kernel": ("mlp.gate_up_proj.weight", f, 2 * f),
    }
    if rest in fused:
      name, start, stop = fused[rest]
      return Source(prefix + name, True, (start, stop))
  name, transpose = table[rest]
  return Source(prefix + name, transpose)
