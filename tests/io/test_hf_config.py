# SPDX-License-Identifier: Apache-2.0
"""config.json: a field is understood, bookkeeping, or an error that names it; and the way back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.io import hf_config
from jaxdec.mixers.attention import AttentionConfig
from jaxdec.mixers.linear_attention import LinearAttentionConfig
from jaxdec.mixers.rope import RopeConfig
from jaxdec.models import DecoderConfig, LayerConfig, MLPConfig, tiny_llama
from jaxdec.models.families import SUPPORTED, config_from_hf, config_to_hf

RECORDED = sorted((Path(__file__).parents[1] / "data" / "parity").glob("*.npz"))
LLAMA = dict(
  model_type="llama", vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
  num_attention_heads=4)  # fmt: skip


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_written_and_read_back_is_the_same_decoder(path):
  config = config_from_hf(json.loads(str(np.load(path)["config"])))
  assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
  assert config_from_hf(json.loads(json.dumps(config_to_hf(config, "jaxdec")))) == config


def test_hybrids_round_trip_as_jaxdec():
  mixers = (
    LinearAttentionConfig(num_heads=4, head_dim=6, decay="fixed", rope=RopeConfig(theta=5.0)),
    AttentionConfig(4, 2, 6, rope=None, window=3),
  )
  config = DecoderConfig(
    vocab_size=50,
    dim=24,
    layers=tuple(LayerConfig(m, MLPConfig(31)) for m in mixers),
    eos_ids=(1, 2),
  )
  fields = json.loads(json.dumps(config_to_hf(config, "jaxdec")))
  assert [x["mixer"]["kind"] for x in fields["layers"]] == ["linear_attention", "attention"]
  assert config_from_hf(fields) == config
  fields["layers"][0]["mixer"]["kind"] = "linear_atention"
  with pytest.raises(UserError, match=r"'linear_atention'.*did you mean 'linear_attention'"):
    config_from_hf(fields)
  fields["layers"][0]["mixer"] = {"kind": "attention", "num_heads": 4, "head_dim": 6, "windw": 3}
  with pytest.raises(UserError, match=r"layers\[0\] mixer: 'windw'.*'window'"):
    config_from_hf(fields)


def test_a_family_that_cannot_express_it_says_what():
  layer = LayerConfig(AttentionConfig(4, 2, 6, window=3), MLPConfig(31))
  config = DecoderConfig(vocab_size=50, dim=24, layers=(layer,))
  with pytest.raises(UserError, match=r"family 'llama' can't express .*window=3.*'jaxdec'"):
    config_to_hf(config)
  assert config_to_hf(dataclasses.replace(config, family="mistral"))["sliding_window"] == 3


def test_the_embedded_shape_is_a_llama():
  fields = config_to_hf(tiny_llama(eos_ids=(0,)))
  assert (fields["model_type"], fields["head_dim"], fields["eos_token_id"]) == ("llama", 64, 0)
  assert config_from_hf(fields) == tiny_llama(eos_ids=(0,))


def test_defaults_of_absent_fields_are_the_familys():
  config = config_from_hf(LLAMA)
  mixer = config.layers[0].mixer
  assert (mixer.num_kv_heads, mixer.head_dim, mixer.rope.theta) == (4, 6, 10_000.0)
  assert (config.max_length, config.eos_ids, config.bos_id) == (2048, (2,), 1)
  gemma = {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7}
  windows = [x.mixer.window for x in config_from_hf(gemma).layers]
  assert windows == [4096] * 5 + [None, 4096]
  ropes = [x.mixer.rope.theta for x in config_from_hf(gemma).layers]
  assert ropes == [1e4] * 5 + [1e6, 1e4]
  assert config_from_hf(gemma).layers[0].mixer.scale == 256**-0.5
  qwen = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": False,
          "sliding_window": 8, "max_window_layers": 1}  # fmt: skip
  assert [x.mixer.window for x in config_from_hf(qwen).layers] == [None, None]
  assert [x.mixer.window for x in config_from_hf({**qwen, "use_sliding_window": True}).layers] == [
    None, 8]  # fmt: skip


@pytest.mark.parametrize(
  "change, words",
  [
    ({"model_type": "qwen4"}, ["'qwen4'", "did you mean 'qwen", *SUPPORTED]),
    ({"model_type": "gpt2"}, ["'gpt2' is not supported", *SUPPORTED]),
    ({"model_type": None}, ["no 'model_type'"]),
    ({"hiden_act": "silu"}, ["'hiden_act'", "did you mean 'hidden_act'"]),
    ({"num_experts": 8, "zeta": 1}, ["'num_experts'", "'zeta'"]),
    ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
    ({"attention_dropout": 0.1}, ["attention_dropout=0.1", "only 0"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config", "only None"]),
    ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ({"rope_scaling": {"type": "longrope"}}, ["'longrope'", "yarn"]),
    ({"rope_scaling": {"type": "linear"}}, ["lacks 'factor'"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "fctr": 1}}, ["rope_scaling.fctr"]),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}},
     ["lacks 'high_freq_factor'"]),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0},
      "rope_scaling": {"type": "linear", "factor": 3.0}}, ["contradict"]),
    ({"hidden_size": "24"}, ["hidden_size", "'24'"]),
    ({"hidden_size": 25}, ["hidden_size=25", "num_attention_heads=4"]),
    ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
    ({"vocab_size": None}, ["vocab_size"]),
    ({"layer_types": ["full_attention"] * 2}, ["'layer_types'"]),
    ({"model_type": "qwen2", "num_key_value_heads": 4, "layer_types": ["sliding_attention"] * 2},
     ["no sliding window"]),
    ({"model_type": "qwen3", "num_key_value_heads": 4, "layer_types": ["full_attention"]},
     ["1 entries", "num_hidden_layers=2"]),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0],
                                             "long_factor": [1.0]}}, ["'longrope'", "Phi3"]),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 30.0}, ["attn_logit_softcapping"]),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, ["bidirectional_attention"]),
    ({"model_type": "gemma2", "hidden_act": "silu"}, ["contradicts"]),
  ],
)  # fmt: skip
def test_errors_name_what_is_wrong(change, words):
  with pytest.raises(UserError) as error:
    hf_config.parse({**LLAMA, **change})
  for word in words:
    assert word in str(error.value)


def test_bookkeeping_is_ignored():
  extra = {"torch_dtype": "bfloat16", "transformers_version": "4.40", "use_cache": False,
           "initializer_range": 0.1, "_name_or_path": "x", "attention_dropout": 0.0,
           "id2label": {"0": "a"}, "transformers.js_config": {}}  # fmt: skip
  assert config_from_hf({**LLAMA, **extra}) == config_from_hf(LLAMA)
