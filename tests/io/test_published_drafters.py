# SPDX-License-Identifier: Apache-2.0
"""Configurations of published draft heads, as they are: what we read in them, and write like them.

Only facts are recorded: fields and values of ``config.json``, tensor names and shapes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.io.drafters import LAYOUTS, find_layout, parameter_shapes
from jaxdec.io.drafters.layout import Opened
from jaxdec.lm import LM
from jaxdec.models import Decoder, tiny_llama


class Held:
  """A file whose tensors are in memory."""

  def __init__(self, tensors):
    self.tensors = tensors

  def view(self, name):
    return self.tensors[name]


def read(layout, fields, target, **tensors):
  file = Held(tensors)
  opened = Opened(Path("published"), fields, {name: (file, name) for name in tensors})
  return LAYOUTS[layout].read(opened, target, {})


def sized(fields, num_layers):
  """A target of the sizes that a head's fields name."""
  return tiny_llama(
    vocab_size=fields["vocab_size"], dim=fields["hidden_size"], num_layers=num_layers,
    num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=16,
    max_length=fields["max_position_embeddings"],
  )  # fmt: skip


def head(**fields):
  """Fields that all the LLaMA-like heads below have."""
  return {
    "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama", "num_hidden_layers": 1,
    "tie_word_embeddings": False, "use_cache": True, **fields,
  }  # fmt: skip


def qwen(count, **fields):
  """Fields that the DFlash drafters below have; ``count`` layers of full attention."""
  return {
    "architectures": ["DFlashDraftModel"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "dtype": "bfloat16", "head_dim": 128,
    "hidden_act": "silu", "initializer_range": 0.02, "layer_types": ["full_attention"] * count,
    "max_window_layers": count, "model_type": "qwen3", "num_attention_heads": 32,
    "num_hidden_layers": count, "rms_norm_eps": 1e-6, "sliding_window": None,
    "use_sliding_window": False, **fields,
  }  # fmt: skip


# EAGLE-3 for LLaMA-3.1-8B-Instruct (SafeAILab; SpecForge's llama3-8B-eagle3.json names the class).
EAGLE3_8B = head(
  architectures=["LlamaForCausalLMEagle3"], bos_token_id=128000, eos_token_id=128001,
  hidden_size=4096, intermediate_size=14336, max_position_embeddings=2048, num_attention_heads=32,
  num_key_value_heads=8, pad_token_id=0, rms_norm_eps=1e-5, torch_dtype="float16",
  transformers_version="4.28.1", vocab_size=128256, draft_vocab_size=32000,
)  # fmt: skip
EAGLE3_8B_SHAPES = {
  "fc.weight": (4096, 12288),
  "midlayer.input_layernorm.weight": (4096,),
  "midlayer.hidden_norm.weight": (4096,),
  "midlayer.post_attention_layernorm.weight": (4096,),
  "midlayer.self_attn.q_proj.weight": (4096, 8192),
  "midlayer.self_attn.k_proj.weight": (1024, 8192),
  "midlayer.self_attn.v_proj.weight": (1024, 8192),
  "midlayer.self_attn.o_proj.weight": (4096, 4096),
  "midlayer.mlp.gate_proj.weight": (14336, 4096),
  "midlayer.mlp.up_proj.weight": (14336, 4096),
  "midlayer.mlp.down_proj.weight": (4096, 14336),
  "norm.weight": (4096,),
  "lm_head.weight": (32000, 4096),
}
D2T = np.zeros(32000, np.int64)
# Of the target here, or of the file.
WRITTEN_OTHERWISE = {
  "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype",
}  # fmt: skip


def test_eagle3_of_llama_8b():
  """Names and shapes of every tensor, and each field that we write too."""
  target = sized(EAGLE3_8B, 32)
  drafter = read("eagle3", EAGLE3_8B, target, d2t=D2T)
  assert drafter.capture_layers == (2, 16, 29)  # not named: the servers' choice
  assert (drafter.draft_size, drafter.eps, drafter.attention.rope.theta) == (32000, 1e-5, 1e4)
  stored, shapes = LAYOUTS["eagle3"].stored(drafter), parameter_shapes(drafter, target)
  ours = {s.name: shapes[p][::-1] if s.transpose else shapes[p] for p, s in stored.items()}
  assert ours == EAGLE3_8B_SHAPES
  written = LAYOUTS["eagle3"].fields(drafter, target, None)
  both = set(written) & set(EAGLE3_8B) - WRITTEN_OTHERWISE
  assert {k: written[k] for k in both} == {k: EAGLE3_8B[k] for k in both}
  assert {"draft_vocab_size", "hidden_size", "num_key_value_heads", "model_type"} <= both


@pytest.mark.parametrize(
  ("fields", "layers", "captured"),
  [
    # SpecForge: qwen3-32b-eagle3.json, gpt-oss-120B-eagle3.json; AQ-MedAI/Kimi-K25-eagle3.
    (
      head(
        attention_bias=False, attention_dropout=0.0, head_dim=128, hidden_size=5120,
        intermediate_size=25600, max_position_embeddings=40960, max_window_layers=64,
        num_attention_heads=64, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, use_sliding_window=False, vocab_size=151936,
        draft_vocab_size=32000,
      ),
      64, (2, 32, 61),
    ),
    (
      head(
        eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 17, 33]}, head_dim=64,
        hidden_size=2880, intermediate_size=17280, max_position_embeddings=4096,
        num_attention_heads=64, num_key_value_heads=8, pad_token_id=0, rms_norm_eps=1e-5,
        vocab_size=201088, draft_vocab_size=32000,
      ),
      36, (2, 18, 34),
    ),
    (
      head(
        attention_bias=False, dtype="bfloat16", head_dim=128, hidden_size=7168,
        eagle_config={
          "eagle_aux_hidden_state_layer_ids": [2, 30, 58], "use_aux_hidden_state": True,
        },
        intermediate_size=18432, max_position_embeddings=262144, max_window_layers=48,
        mlp_bias=False, num_attention_heads=64, num_key_value_heads=64, pretraining_tp=1,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1e6, sliding_window=None,
        use_sliding_window=False, vocab_size=163840, draft_vocab_size=32000,
      ),
      61, (3, 31, 59),
    ),
  ],
)  # fmt: skip
def test_eagle3_as_specforge_writes_it(fields, layers, captured):
  drafter = read("eagle3", fields, sized(fields, layers), d2t=D2T)
  assert drafter.capture_layers == captured
  assert drafter.attention.head_dim == fields["head_dim"]
  assert drafter.attention.num_kv_heads == fields["num_key_value_heads"]


def speculators(kind, tokens, layer, **fields):
  """What every configuration of the speculators library has around its layer."""
  proposal = {
    "accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": tokens,
    "verifier_accept_k": 1,
  }  # fmt: skip
  return {
    "speculators_model_type": kind, "target_hidden_size": None, "transformer_layer_config": layer,
    "speculators_config": {
      "algorithm": kind, "default_proposal_method": "greedy", "proposal_methods": [proposal],
      "verifier": {"architectures": [], "name_or_path": "meta-llama/Llama-3.1-8B-Instruct"},
    }, **fields,
  }  # fmt: skip


LLAMA_LAYER = dict(
  attention_bias=False, attention_dropout=0.0, head_dim=128, hidden_act="silu", hidden_size=4096,
  initializer_range=0.02, intermediate_size=14336, max_position_embeddings=2048, mlp_bias=False,
  model_type="llama", num_attention_heads=32, num_hidden_layers=1, num_key_value_heads=8,
  pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, use_cache=True,
  vocab_size=128256,
)  # fmt: skip


@pytest.mark.parametrize(
  "fields",
  [
    # nm-testing/EAGLE3-LLaMA3.1-Instruct-8B-converted (0.1) and the fields of version 0.5.
    dict(architectures=["Eagle3Speculator"], auto_map={"": "eagle3.Eagle3SpeculatorConfig"},
         norm_before_residual=False, has_no_defaults_at_init=False, torch_dtype="float32"),
    dict(architectures=["Eagle3DraftModel"], auto_map={"": "config.Eagle3SpeculatorConfig"},
         norm_before_residual=True, norm_before_fc=False, embed_requires_grad=False,
         eagle_aux_hidden_state_layer_ids=None, base_model_ep_plan=None,
         tie_word_embeddings=False),
  ],
)  # fmt: skip
def test_eagle3_as_speculators_writes_it(fields):
  fields = speculators("eagle3", 5, LLAMA_LAYER, draft_vocab_size=32000, **fields)
  target = sized(LLAMA_LAYER, 32)
  drafter = read("speculators_eagle3", fields, target, d2t=D2T)
  assert (drafter.capture_layers, drafter.num_heads) == ((2, 16, 29), 5)
  assert drafter.norm_before_residual is fields["norm_before_residual"]
  written = LAYOUTS["speculators_eagle3"].fields(drafter, target, "some/model")
  for name in ("speculators_model_type", "draft_vocab_size", "norm_before_residual"):
    assert written[name] == fields[name], name
  theirs, ours = (x["speculators_config"] for x in (fields, written))
  assert set(ours) == set(theirs) and ours["proposal_methods"] == theirs["proposal_methods"]
  assert set(ours["verifier"]) == set(theirs["verifier"])
  layer = written["transformer_layer_config"]
  both = set(layer) & set(LLAMA_LAYER)
  assert {k: layer[k] for k in both} == {k: LLAMA_LAYER[k] for k in both}


YARN = {
  "beta_fast": 32.0, "beta_slow": 1.0, "factor": 64.0, "original_max_position_embeddings": 4096,
  "rope_type": "yarn", "type": "yarn",
}  # fmt: skip


@pytest.mark.parametrize(
  ("fields", "captured", "mask"),
  [
    # z-lab: Qwen3-4B-DFlash-b16, and Qwen3.6-35B-A3B-DFlash with its stretched rotation.
    (
      qwen(
        5, block_size=16, bos_token_id=151643, eos_token_id=151645, hidden_size=2560,
        dflash_config={"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
        intermediate_size=9728, max_position_embeddings=40960, num_key_value_heads=8,
        num_target_layers=36, rope_scaling=None, rope_theta=1000000, tie_word_embeddings=True,
        transformers_version="4.57.3", use_cache=True, vocab_size=151936,
      ),
      (2, 10, 18, 26, 34), 151669,
    ),
    (
      qwen(
        8, block_size=16, eos_token_id=248046, hidden_size=2048,
        dflash_config={"mask_token_id": 248070, "target_layer_ids": [1, 10, 19, 28, 37]},
        intermediate_size=6144, max_position_embeddings=262144, num_key_value_heads=4,
        num_target_layers=40, pad_token_id=248044, rope_scaling=YARN, rope_theta=10000000,
        tie_word_embeddings=False, use_cache=False, vocab_size=248320,
      ),
      (2, 11, 20, 29, 38), 248070,
    ),
  ],
)  # fmt: skip
def test_dflash_as_its_authors_write_it(fields, captured, mask):
  target = sized(fields, fields["num_target_layers"])
  drafter = read("dflash", fields, target)
  assert (drafter.capture_layers, drafter.mask_token, drafter.num_heads) == (captured, mask, 15)
  assert drafter.num_layers == fields["num_hidden_layers"]
  written = LAYOUTS["dflash"].fields(drafter, target, None)
  assert written["dflash_config"] == {"block_size": 16, **fields["dflash_config"]}
  same = ("block_size", "num_target_layers", "num_key_value_heads", "model_type", "architectures")
  assert [written[name] for name in same] == [fields[name] for name in same]


def test_dflash_as_speculators_writes_it():
  """The same drafter converted by the library: layer ids are one more there."""
  layer = qwen(
    8, bos_token_id=None, eos_token_id=248046, hidden_size=2048, intermediate_size=6144,
    max_position_embeddings=262144, num_key_value_heads=4, pad_token_id=248044,
    rope_parameters={**YARN, "rope_theta": 10000000}, tie_word_embeddings=False, use_cache=False,
    vocab_size=248320,
  )  # fmt: skip
  del layer["architectures"], layer["auto_map"]
  own = dict(
    aux_hidden_state_layer_ids=[2, 11, 20, 29, 38], block_size=16, draft_vocab_size=248320,
    mask_token_id=248070, max_anchors=256, sliding_window_non_causal=False,
  )  # fmt: skip
  target = sized(layer, 40)
  drafter = read("speculators_dflash", speculators("dflash", 15, layer, **own), target)
  assert (drafter.capture_layers, drafter.num_heads) == ((2, 11, 20, 29, 38), 15)
  written = LAYOUTS["speculators_dflash"].fields(drafter, target, "some/model")
  shared = set(own) - {"max_anchors", "sliding_window_non_causal"}
  assert {k: written[k] for k in shared} == {k: own[k] for k in shared}


def test_dflash_with_a_llama_configuration():
  """Earlier versions of the library describe Qwen3's layers by LlamaConfig, and name no layers."""
  layer = {
    **LLAMA_LAYER, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8,
    "layer_types": ["full_attention"] * 8, "sliding_window": 2048, "rms_norm_eps": 1e-6,
  }  # fmt: skip
  del layer["head_dim"], layer["rope_theta"]
  own = dict(draft_vocab_size=128256, mask_token_id=7, aux_hidden_state_layer_ids=None)
  drafter = read("speculators_dflash", speculators("dflash", 7, layer, **own), sized(layer, 40))
  assert drafter.capture_layers == (2, 20, 37)
  assert (drafter.attention.head_dim, drafter.attention.qk_norm) == (64, True)
  assert drafter.attention.rope.theta == 1e4


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    # z-lab/Qwen3.5-4B-DFlash, and the fixture of DFlash2.
    (
      qwen(
        6, layer_types=["sliding_attention"] * 5 + ["full_attention"], hidden_size=2560,
        dflash_config={
          "block_size": 16, "mask_token_id": 248077,
          "target_layer_ids": [1, 5, 9, 13, 17, 21, 25, 29],
        },
        intermediate_size=9216, max_position_embeddings=262144, num_key_value_heads=8,
        num_target_layers=32, rope_parameters={"rope_theta": 10000000, "rope_type": "default"},
        sliding_window=4096, use_sliding_window=True, vocab_size=248320,
      ),
      "only full_attention",
    ),
    (
      qwen(
        5, architectures=["DFlash2DraftModel"], hidden_size=6656, is_causal=False,
        dflash_config={
          "block_size": 16, "conv_group_size": 16, "conv_kernel_size": 2,
          "final_logit_softcapping": 20.0, "mask_token_id": 201818,
          "output_multiplier": 0.19611613513818404, "selector_rank": 256, "selector_top_k": 16,
          "target_layer_ids": [1, 13, 25, 37, 49],
        },
        intermediate_size=19968, max_position_embeddings=131072, num_key_value_heads=8,
        num_target_layers=52, vocab_size=202048,
      ),
      "output_multiplier=0.196",
    ),
  ],
)  # fmt: skip
def test_dflash_variants_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    read("dflash", fields, sized(fields, fields["num_target_layers"]))


@pytest.mark.parametrize("bias", [True, False])
def test_eagle_of_llama2(bias):
  """yuhuili/EAGLE-llama2-chat-7B doesn't say whether W_fc has a bias; its tensors do."""
  fields = head(
    architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_size=4096,
    intermediate_size=11008, max_position_embeddings=4096, num_attention_heads=32,
    num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-6, rope_scaling=None,
    torch_dtype="float16", transformers_version="4.32.0.dev0", vocab_size=32000,
  )  # fmt: skip
  tensors = {"fc.bias": np.zeros(4096)} if bias else {}
  drafter = read("eagle", fields, sized(fields, 32), **tensors)
  assert (drafter.fuse_bias, drafter.num_layers, drafter.hidden_dim) == (bias, 1, 11008)


VICUNA = {
  "base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "medusa_num_heads": 2, "medusa_num_layers": 1,
  "transformers_version": "4.31.0",
}  # fmt: skip


def test_medusa_of_vicuna():
  """FasterDecoding/medusa-vicuna-7b-v1.3 says 2 heads and holds 5."""
  names = [f"{k}.{rest}" for k in range(5) for rest in ("0.linear.weight", "0.linear.bias")]
  names += [f"{k}.1.weight" for k in range(5)]
  target = sized({"vocab_size": 32000, "hidden_size": 4096, "max_position_embeddings": 2048}, 32)
  drafter = read("medusa_original", VICUNA, target, **dict.fromkeys(names))
  assert (drafter.num_heads, drafter.num_blocks) == (5, 1)
  stored = LAYOUTS["medusa_original"].stored(drafter)
  assert {s.name for s in stored.values()} == set(names)
  written = LAYOUTS["medusa_original"].fields(drafter, target, "lmsys/vicuna-7b-v1.3")
  assert set(VICUNA) - {"transformers_version"} <= set(written)


@pytest.mark.parametrize(
  ("fields", "file"), [(VICUNA, "medusa_lm_head.pt"), (EAGLE3_8B, "pytorch_model.bin")]
)
def test_published_weights_in_other_formats_are_named(fields, file, tmp_path):
  """Most older heads are pickles: the file is named, and what to do."""
  (tmp_path / "config.json").write_text(json.dumps(fields))
  (tmp_path / file).write_bytes(b"")
  with pytest.raises(UserError, match=f"found {file}: convert it to safetensors"):
    find_layout(tmp_path)
  with pytest.raises(UserError, match=f"found {file}"):
    LM(Decoder(tiny_llama(dim=8, num_layers=1)), None).drafter(tmp_path)
