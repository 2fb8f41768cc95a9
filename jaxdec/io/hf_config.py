# SPDX-License-Identifier: Apache-2.0
"""Hugging Face ``config.json``, read strictly: every field is understood, bookkeeping, or an error.

Plain Python on plain data, so that a wrong configuration is refused before JAX is imported. The
result is a nested dict with the fields of ``jaxdec.models.config.DecoderConfig``, which
``jaxdec.models.families`` turns into the dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdec.errors import UserError, nearest
from jaxdec.io.hf_families import FAMILIES, Family

# Fields that don't change what the model computes.
_BOOKKEEPING = """
  _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
  auto_map cache_implementation dtype id2label initializer_range is_decoder is_llama_config
  keys_to_ignore_at_inference label2id model_type name_or_path num_labels output_attentions
  output_hidden_states pad_token_id pretraining_tp problem_type return_dict tokenizer_class
  torch_dtype transformers.js_config transformers_version unk_token_id unsloth_fixed
  unsloth_version use_cache use_return_dict bad_words_ids begin_suppress_tokens
  decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
  exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
  length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups
  num_beams num_return_sequences output_scores prefix prune_heads pruned_heads
  remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
  task_specific_params temperature tf_legacy_loss tie_encoder_decoder top_k top_p torchscript
  typical_p use_bfloat16
"""
BOOKKEEPING = frozenset(_BOOKKEEPING.split())

# Fields with one meaning we implement; any other value is refused.
_MUST_BE: dict[str, tuple[Any, ...]] = {
  "attention_dropout": (0, None),
  "resid_pdrop": (0, None),
  "embd_pdrop": (0, None),
  "hidden_dropout": (0, None),
  "rope_interleaved": (False, None),
  "use_bidirectional_attention": (False, None),
  "is_encoder_decoder": (False, None),
  "add_cross_attention": (False, None),
  "cross_attention_hidden_size": (None,),
  "chunk_size_feed_forward": (0, None),
  "quantization_config": (None,),
  "per_layer_config": (None,),
}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def family_of(fields: Mapping[str, Any]) -> str:
  """The ``model_type``; raises UserError where it is absent or unsupported."""
  name = fields.get("model_type")
  if name is None:
    raise UserError(
      "config.json has no 'model_type'; it must name one of the supported families: "
      f"{', '.join(FAMILIES)}."
    )
  if name != "jaxdec" and name not in FAMILIES:
    raise UserError(
      f"model family {name!r} is not supported{nearest(str(name), FAMILIES)}; supported: "
      f"{', '.join(FAMILIES)}."
    )
  return name


def parse(fields: Mapping[str, Any]) -> dict[str, Any]:
  """``config.json`` of a Hugging Face family to the fields of ``DecoderConfig``, as plain data.

  Raises:
    UserError: unsupported family, unknown field, or a value outside what is implemented.
  """
  name = family_of(fields)
  family = FAMILIES[name]
  _refuse_unknown(name, family, fields)
  get = _Reader(name, family, fields)
  dim, num_layers = get.integer("hidden_size"), get.integer("num_hidden_layers")
  num_heads = get.integer("num_attention_heads")
  num_kv_heads = get.integer("num_key_value_heads", num_heads)
  if get("head_dim") is None and dim % num_heads:
    raise UserError(
      f"config.json: hidden_size={dim} is not a multiple of num_attention_heads="
      f"{num_heads} and there is no head_dim; give head_dim."
    )
  head_dim = get.integer("head_dim", dim // num_heads)
  if num_heads % num_kv_heads:
    raise UserError(
      f"config.json: num_attention_heads={num_heads} is not a multiple of "
      f"num_key_value_heads={num_kv_heads}."
    )
  max_length = get.integer("max_position_embeddings")
  windows = _windows(name, get, num_layers)
  ropes = _ropes(name, family, get, num_layers, windows, max_length)
  bias = bool(get("attention_bias")) if "attention_bias" in family.defaults else False
  query_scale = get("query_pre_attn_scalar") if family.gemma else None
  attention = dict(
    kind="attention",
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    qk_norm=family.qk_norm,
    qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
    out_bias=bias if family.out_bias is None else family.out_bias,
    logit_cap=_number(get("attn_logit_softcapping")) if name == "gemma2" else None,
    scale=None if query_scale is None else float(query_scale) ** -0.5,
  )
  if name == "gemma3_text" and get("attn_logit_softcapping") is not None:
    raise UserError(
      "config.json: attn_logit_softcapping is not part of Gemma 3 attention; set it to null."
    )
  mlp = dict(
    hidden_dim=get.integer("intermediate_size"),
    activation=_activation(family, get),
    use_bias=bool(get("mlp_bias")) if "mlp_bias" in family.defaults else False,
  )
  eos = get("eos_token_id")
  return dict(
    vocab_size=get.integer("vocab_size"),
    dim=dim,
    layers=[
      dict(mixer=dict(attention, window=w, rope=r), mlp=mlp, post_norms=family.gemma)
      for w, r in zip(windows, ropes)
    ],
    norm=dict(eps=float(get("rms_norm_eps")), unit_offset=family.gemma),
    tie_embeddings=bool(get("tie_word_embeddings")),
    embed_scale=dim**0.5 if family.gemma else None,
    logit_cap=_number(get("final_logit_softcapping")) if family.gemma else None,
    max_length=max_length,
    eos_ids=[] if eos is None else list(eos) if isinstance(eos, list) else [eos],
    bos_id=get("bos_token_id"),
    family=name,
  )


class _Reader:
  """Field access with the family's defaults."""

  def __init__(self, name: str, family: Family, fields: Mapping[str, Any]):
    self.name, self.family, self.fields = name, family, fields

  def __call__(self, field: str) -> Any:
    return self.fields.get(field, self.family.defaults.get(field))

  def integer(self, field: str, default: int | None = None) -> int:
    value = self(field)
    value = default if value is None else value
    if value is None:
      raise UserError(f"config.json has no {field!r}, which family {self.name!r} needs.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise UserError(f"config.json: {field} must be a positive integer, got {value!r}.")
    return value


_REQUIRED = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
)


def _refuse_unknown(name: str, family: Family, fields: Mapping[str, Any]) -> None:
  known = {*_REQUIRED, *family.defaults, *_MUST_BE, *BOOKKEEPING}
  unknown = sorted(set(fields) - known)
  if unknown:
    hints = ", ".join(f"{u!r}{nearest(u, known - BOOKKEEPING)}" for u in unknown)
    raise UserError(
      f"config.json of family {name!r} has fields that are not understood: {hints}; "
      "remove them only if they don't change the model."
    )
  for field, allowed in _MUST_BE.items():
    if field in fields and fields[field] not in allowed:
      raise UserError(
        f"config.json: {field}={fields[field]!r} is not supported; only {allowed[0]!r} is."
      )
  wrong = [a for a in fields.get("architectures") or [] if a != family.architecture]
  if wrong:
    raise UserError(
      f"config.json: architecture {wrong[0]!r} is not supported for family {name!r}; "
      f"only {family.architecture!r} is."
    )


def _number(value: Any) -> float | None:
  return None if value is None else float(value)


def _activation(family: Family, get: _Reader) -> str:
  field = "hidden_activation" if family.gemma else "hidden_act"
  value = get(field)
  if value is None and family.gemma:
    value = family.defaults[field]
  if value not in _ACTIVATIONS:
    raise UserError(
      f"config.json: {field}={value!r} is not supported; supported: {', '.join(_ACTIVATIONS)}."
    )
  alias = get("hidden_act")
  # Old Gemma files carry a second field that transformers doesn't read.
  if family.gemma and alias is not None and _ACTIVATIONS.get(alias) != _ACTIVATIONS[value]:
    raise UserError(f"config.json: hidden_act={alias!r} contradicts hidden_activation={value!r}.")
  return _ACTIVATIONS[value]


def _windows(name: str, get: _Reader, num_layers: int) -> list[int | None]:
  """Sliding window of each layer, None for full attention."""
  window = get("sliding_window")
  if window is not None:
    window = get.integer("sliding_window")
  alias = get("sliding_window_size")
  if alias is not None and alias != window:
    raise UserError(
      f"config.json: sliding_window_size={alias!r} contradicts sliding_window={window!r}."
    )
  if name in ("mistral", "phi3"):
    return [window] * num_layers
  if "layer_types" not in get.family.defaults:
    return [None] * num_layers
  if "use_sliding_window" in get.family.defaults and not get("use_sliding_window"):
    window = None
  types = get("layer_types")
  if types is None:
    types = _default_layer_types(name, get, num_layers, window)
  if len(types) != num_layers:
    raise UserError(
      f"config.json: layer_types has {len(types)} entries for num_hidden_layers={num_layers}."
    )
  for kind in types:
    if kind not in ("full_attention", "sliding_attention"):
      raise UserError(
        f"config.json: layer type {kind!r} is not supported; supported: full_attention, "
        "sliding_attention."
      )
    if kind == "sliding_attention" and window is None:
      raise UserError(
        "config.json: layer_types asks for sliding_attention, but there is no sliding "
        "window (sliding_window, use_sliding_window)."
      )
  return [window if kind == "sliding_attention" else None for kind in types]


def _default_layer_types(name: str, get: _Reader, num_layers: int, window: int | None) -> list[str]:
  if name == "gemma2":
    sliding = [i % 2 == 0 for i in range(num_layers)]
  elif name == "gemma3_text":
    pattern = get.integer("sliding_window_pattern")
    if get("_sliding_window_pattern") not in (None, pattern):
      raise UserError(
        "config.json: _sliding_window_pattern without layer_types is not understood; give "
        "layer_types."
      )
    sliding = [(i + 1) % pattern != 0 for i in range(num_layers)]
  elif name == "smollm3":
    sliding = [window is not None and not r for r in _has_rope(get, num_layers)]
  else:
    first = get("max_window_layers")
    sliding = [window is not None and i >= first for i in range(num_layers)]
  return ["sliding_attention" if s else "full_attention" for s in sliding]


def _has_rope(get: _Reader, num_layers: int) -> list[bool]:
  """SmolLM3: which layers rotate (1) and which don't (0)."""
  flags = get("no_rope_layers")
  if flags is None:
    interval = get.integer("no_rope_layer_interval")
    return [(i + 1) % interval != 0 for i in range(num_layers)]
  if len(flags) < num_layers:
    raise UserError(
      f"config.json: no_rope_layers has {len(flags)} entries for num_hidden_layers={num_layers}."
    )
  return [bool(f) for f in flags[:num_layers]]


def _ropes(
  name: str,
  family: Family,
  get: _Reader,
  num_layers: int,
  windows: list[int | None],
  max_length: int,
) -> list[dict[str, Any] | None]:
  """Rotary embedding of each layer, from the older or the newer fields."""
  theta, fraction = float(get("rope_theta")), get("partial_rotary_factor")
  old, new = get("rope_scaling") or None, get("rope_parameters") or None

  def read(source: Mapping[str, Any] | None, theta: float, where: str) -> dict[str, Any]:
    return _rope(family, source or {}, theta, fraction, max_length, where)

  if name == "gemma3_text":
    nested = dict(new or {})
    extra = sorted(set(nested) - {"full_attention", "sliding_attention"})
    if extra:
      raise UserError(
        f"config.json: rope_parameters of gemma3_text holds {extra[0]!r}; expected "
        "'full_attention' and 'sliding_attention'."
      )
    full = {**(nested.get("full_attention") or {}), **(old or {})}
    local = nested.get("sliding_attention") or {}
    both = (
      read(full, theta, "rope_parameters.full_attention"),
      read(local, float(get("rope_local_base_freq")), "rope_parameters.sliding_attention"),
    )
    return [both[0] if w is None else both[1] for w in windows]
  rope = read(old or new, theta, "rope_scaling" if old else "rope_parameters")
  if old and new and read(new, theta, "rope_parameters") != rope:
    raise UserError(
      "config.json: rope_scaling and rope_parameters contradict each other; keep one."
    )
  flags = _has_rope(get, num_layers) if name == "smollm3" else [True] * num_layers
  return [rope if flag else None for flag in flags]


_ROPE_REQUIRED = {
  "linear": ("factor",),
  "dynamic": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_YARN = (
  "factor",
  "beta_fast",
  "beta_slow",
  "attention_factor",
  "mscale",
  "mscale_all_dim",
  "truncate",
)


def _rope(
  family: Family,
  source: Mapping[str, Any],
  theta: float,
  fraction: float | None,
  max_length: int,
  where: str,
) -> dict[str, Any]:
  """One rope dict to the fields of ``RopeConfig``."""
  kind = source.get("rope_type", source.get("type", "default"))
  if kind not in family.rope_kinds:
    raise UserError(
      f"config.json: {where} asks for rope type {kind!r}, which is not supported for "
      f"{family.architecture}{nearest(str(kind), family.rope_kinds)}; supported: "
      f"{', '.join(family.rope_kinds)}."
    )
  allowed = _YARN if kind == "yarn" else _ROPE_REQUIRED.get(kind, ())
  common = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
  }
  unknown = sorted(set(source) - {*allowed, *common})
  if unknown:
    raise UserError(
      f"config.json: {where}.{unknown[0]} is not understood for rope type {kind!r}"
      f"{nearest(unknown[0], allowed)}."
    )
  missing = [k for k in _ROPE_REQUIRED.get(kind, ()) if source.get(k) is None]
  if missing:
    raise UserError(f"config.json: {where} of rope type {kind!r} lacks {missing[0]!r}.")
  fraction = source.get("partial_rotary_factor", fraction)
  if fraction not in (None, 1.0) and "partial_rotary_factor" not in family.defaults:
    raise UserError(
      f"config.json: partial_rotary_factor={fraction} is not part of {family.architecture}."
    )
  rope = dict(
    theta=float(source.get("rope_theta") or theta),
    kind=kind,
    rotary_fraction=1.0 if fraction is None else float(fraction),
  )
  for key in allowed:
    if source.get(key) is not None:
      rope[key] = source[key] if key == "truncate" else float(source[key])
  if kind in ("llama3", "yarn"):
    rope["original_max_length"] = int(source.get("original_max_position_embeddings") or max_length)
  elif kind == "dynamic":
    rope["original_max_length"] = max_length
  if kind == "yarn" and "factor" not in rope:
    rope["factor"] = max_length / rope["original_max_length"]
  return rope
