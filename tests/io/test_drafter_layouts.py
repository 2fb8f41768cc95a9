# SPDX-License-Identifier: Apache-2.0
"""Draft heads in the layouts of servers: bits, logits, names, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdec.drafting import KINDS, DraftVocabulary, StaticTree, Target, TargetOutput
from jaxdec.errors import UserError
from jaxdec.io import safetensors
from jaxdec.io.drafters import LAYOUTS, find_layout, parameter_shapes, read_drafter, write_drafter
from jaxdec.mixers import AttentionConfig, NormConfig
from jaxdec.mixers.norms import rms_norm
from jaxdec.models import Decoder, tiny_llama

VOCAB, DIM = 29, 16
KEPT = (0, 2, 3, 7, 11, 20, 28)
CONFIG = tiny_llama(
  vocab_size=VOCAB, dim=DIM, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=6, hidden_dim=24,
  max_length=64, tie_embeddings=True, eos_ids=(3,), bos_id=1,
)  # fmt: skip
TREE = StaticTree.from_paths([(0,), (1,), (0, 0)])
# Small drafters of each layout, as options of their kind.
CASES: dict[str, dict] = {
  "medusa": {"num_heads": 2, "num_blocks": 2},
  "medusa_original": {"num_heads": 3},
  "eagle3": {"vocabulary": DraftVocabulary(KEPT, VOCAB), "num_heads": 3},
  "speculators_eagle3": {"fc_norm": True, "norm_output": True, "norm_before_residual": True},
  "eagle": {"num_layers": 2, "fuse_bias": False},
  "speculators_eagle": {},
  "dflash": {"num_heads": 3, "num_layers": 2, "capture_layers": (1, 2, 4), "mask_token": 4},
  "speculators_dflash": {"num_heads": 2, "num_layers": 1, "capture_layers": (2,), "mask_token": 0},
}


@functools.cache
def target() -> Target:
  model = Decoder(CONFIG)
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
  return Target(model, params, None)


@functools.cache
def made(layout: str, **options):
  """A drafter for the layout with random bfloat16-exact float32 parameters."""
  kind = KINDS[LAYOUTS[layout].kind]
  drafter = kind.for_target(CONFIG, tree=TREE, **{**CASES[layout], **options})
  rng, params = np.random.default_rng(0), {}
  for path, shape in parameter_shapes(drafter, CONFIG).items():
    *parents, last = path.split("/")
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    values = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
    node[last] = jnp.asarray(values.astype(np.float32))
  return drafter, params


def write(folder, layout, drafter=None, params=None, **options):
  drafter, params = made(layout) if drafter is None else (drafter, params)
  return write_drafter(folder, drafter, params, layout=layout, target=CONFIG, **options)


def edit(folder, **changes):
  """Changes fields of config.json; ``None`` removes one."""
  path = folder / "config.json"
  fields = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def tensors(folder, name="model.safetensors"):
  file = safetensors.File(folder / name)
  return {name: np.array(file.view(name)) for name in file.entries}


def store(folder, arrays):
  made = [safetensors.Tensor(n, x.shape, x.dtype, lambda x=x: x) for n, x in arrays.items()]
  safetensors.write(folder / "model.safetensors", made, {"format": "pt"})


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype == jnp.float32
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", CASES)
def test_round_trip_is_bit_exact(layout, dtype, tmp_path):
  """Both ways: the same drafter and parameters, and the same bytes when written again."""
  drafter, params = made(layout)
  write(tmp_path / "a", layout, dtype=dtype)
  assert find_layout(tmp_path / "a") is LAYOUTS[layout]
  back, read = read_drafter(tmp_path / "a", CONFIG, params=target().params, tree=TREE)
  options = {"num_heads": back.num_heads}  # EAGLE's own layout holds no depth
  assert back == dataclasses.replace(drafter, **options)
  assert_same(read, params)
  write(tmp_path / "b", layout, back, read, dtype=dtype)
  for path in (tmp_path / "a").iterdir():
    assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_every_layout_is_tested():
  assert set(CASES) == set(LAYOUTS)


# Layouts that hold the same drafter.
FAMILIES = [
  ("medusa", "medusa_original"),
  ("eagle3", "speculators_eagle3"),
  ("speculators_eagle3", "eagle3"),
  ("speculators_eagle", "eagle"),
  ("dflash", "speculators_dflash"),
]


@functools.cache
def teacher(capture):
  """The target over a text, and the batch."""
  t, tokens = target(), jax.random.randint(jax.random.key(1), (1, 8), 0, VOCAB)
  ones = jnp.ones_like(tokens)
  batch = {
    "tokens": tokens, "segment_ids": ones, "positions": jnp.cumsum(ones, 1) - 1,
    "loss_mask": ones.astype(jnp.float32),
  }  # fmt: skip
  run = jax.jit(lambda params: t.model.apply({"params": params}, tokens, capture=capture))
  out = run(t.params)
  return TargetOutput(out.hidden, out.features, out.logits), batch


@functools.partial(jax.jit, static_argnums=0)
def logits(drafter, params, output, batch):
  t = target()
  examples = drafter.examples(params, t, output, batch)
  return [drafter.head(params, t, e.depth, e.states) for e in examples]


@pytest.mark.parametrize(("source", "other"), FAMILIES)
def test_converted_drafter_gives_the_same_logits(source, other, tmp_path):
  drafter, params = made(source)
  write(tmp_path / "a", source)
  write(tmp_path / "b", other, *read_drafter(tmp_path / "a", CONFIG))
  back, read = read_drafter(tmp_path / "b", CONFIG)
  same = {"num_heads": drafter.num_heads, "tree": None}
  first, second = (dataclasses.replace(d, **same) for d in (drafter, back))
  taught = teacher(drafter.capture)
  for a, b in zip(logits(first, params, *taught), logits(second, read, *taught), strict=True):
    assert a.shape[-1] == drafter.draft_size
    np.testing.assert_array_equal(a, b)


def test_names_and_offsets_of_eagle3(tmp_path):
  """Names, orientations and the vocabulary as servers read them, written out."""
  write(tmp_path / "m", "eagle3", dtype="bfloat16")
  params, stored = made("eagle3")[1], tensors(tmp_path / "m")
  assert stored["fc.weight"].shape == (DIM, 3 * DIM)
  assert stored["fc.weight"].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(
    stored["midlayer.self_attn.q_proj.weight"], params["attention"]["q"]["kernel"].T
  )
  np.testing.assert_array_equal(
    stored["midlayer.input_layernorm.weight"], params["embed_norm"]["scale"]
  )
  np.testing.assert_array_equal(
    stored["midlayer.hidden_norm.weight"], params["state_norm"]["scale"]
  )
  assert stored["midlayer.self_attn.k_proj.weight"].shape == (12, 2 * DIM)
  assert stored["lm_head.weight"].shape == (len(KEPT), DIM)
  assert stored["d2t"].dtype == np.int64 and stored["t2d"].dtype == bool
  np.testing.assert_array_equal(stored["d2t"] + np.arange(len(KEPT)), KEPT)
  np.testing.assert_array_equal(np.flatnonzero(stored["t2d"]), KEPT)
  fields = json.loads((tmp_path / "m" / "config.json").read_text())
  assert fields["architectures"] == ["LlamaForCausalLMEagle3"]
  assert (fields["model_type"], fields["num_hidden_layers"], fields["head_dim"]) == ("llama", 1, 6)
  assert (fields["vocab_size"], fields["draft_vocab_size"]) == (VOCAB, len(KEPT))
  captured = list(made("eagle3")[0].capture_layers)  # inputs; SGLang counts outputs
  assert fields["eagle_aux_hidden_state_layer_ids"] == captured
  nested = fields["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
  assert nested == [i - 1 for i in captured]


def test_names_of_speculators(tmp_path):
  write(tmp_path / "m", "speculators_eagle3", verifier="some/target")
  stored = tensors(tmp_path / "m")
  assert "layers.0.hidden_norm.weight" in stored and "layers.0.mlp.down_proj.weight" in stored
  fields = json.loads((tmp_path / "m" / "config.json").read_text())
  inner = fields["speculators_config"]
  assert fields["speculators_model_type"] == inner["algorithm"] == "eagle3"
  assert inner["proposal_methods"][0]["speculative_tokens"] == TREE.max_depth
  assert inner["verifier"] == {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
  assert fields["norm_before_residual"] is fields["fc_norm"] is True
  assert "fc_norm.2.weight" in stored
  layer = fields["transformer_layer_config"]
  assert (layer["model_type"], layer["hidden_size"], layer["vocab_size"]) == ("llama", DIM, VOCAB)


def test_names_of_dflash(tmp_path):
  """Layers are counted by their outputs in DFlash's own fields, by their inputs in speculators."""
  write(tmp_path / "m", "dflash")
  params, stored = made("dflash")[1]["model"], tensors(tmp_path / "m")
  np.testing.assert_array_equal(stored["hidden_norm.weight"], params["context_norm"]["scale"])
  np.testing.assert_array_equal(
    stored["layers.1.self_attn.k_norm.weight"], params["layers_1"]["mixer"]["k_norm"]["scale"]
  )
  assert stored["fc.weight"].shape == (DIM, 3 * DIM)
  fields = json.loads((tmp_path / "m" / "config.json").read_text())
  assert fields["architectures"] == ["DFlashDraftModel"] and fields["model_type"] == "qwen3"
  assert fields["dflash_config"] == {
    "block_size": 4, "mask_token_id": 4, "target_layer_ids": [0, 1, 3]
  }  # fmt: skip
  write(tmp_path / "s", "speculators_dflash", *read_drafter(tmp_path / "m", CONFIG))
  fields = json.loads((tmp_path / "s" / "config.json").read_text())
  assert fields["aux_hidden_state_layer_ids"] == [1, 2, 4]
  assert (fields["block_size"], fields["mask_token_id"]) == (4, 4)


def test_names_of_eagle(tmp_path):
  write(tmp_path / "e", "eagle")
  stored, params = tensors(tmp_path / "e"), made("eagle")[1]
  np.testing.assert_array_equal(stored["fc.weight"], params["fc"]["kernel"].T)
  assert "layers.0.input_layernorm.weight" not in stored and "fc.bias" not in stored
  assert "layers.1.input_layernorm.weight" in stored
  assert json.loads((tmp_path / "e" / "config.json").read_text())["bias"] is False
  write(tmp_path / "s", "speculators_eagle")
  stored = tensors(tmp_path / "s")
  assert {"fusion_fc.bias", "transformer.post_attention_layernorm.weight"} <= set(stored)
  assert json.loads((tmp_path / "s" / "config.json").read_text())["fusion_bias"] is True


def test_names_of_medusa(tmp_path):
  write(tmp_path / "v", "medusa")
  stored = tensors(tmp_path / "v")
  assert {"blocks.1.layers.1.weight", "blocks.0.layers.0.bias", "lm_heads.1.weight"} <= set(stored)
  write(tmp_path / "o", "medusa_original")
  stored = tensors(tmp_path / "o", "medusa_lm_head.safetensors")
  assert {"2.0.linear.weight", "2.0.linear.bias", "2.1.weight"} <= set(stored)


def test_a_vocabulary_in_another_order_is_sorted(tmp_path):
  """Rows of the LM head follow the file's map, whatever its order."""
  drafter, params = made("eagle3")
  write(tmp_path / "m", "eagle3")
  arrays, order = tensors(tmp_path / "m"), np.random.default_rng(2).permutation(len(KEPT))
  arrays["d2t"] = (np.asarray(KEPT)[order] - np.arange(len(KEPT))).astype(np.int64)
  arrays["lm_head.weight"] = arrays["lm_head.weight"][order]
  store(tmp_path / "m", arrays)
  back, read = read_drafter(tmp_path / "m", CONFIG, tree=TREE)
  assert back.vocabulary == drafter.vocabulary
  assert_same(read, params)


def test_speculators_layer_fields_left_out_have_their_class_defaults(tmp_path):
  """Fields equal to LlamaConfig's defaults are absent from published files."""
  write(tmp_path / "m", "speculators_eagle3")
  layer = json.loads((tmp_path / "m" / "config.json").read_text())["transformer_layer_config"]
  for name in ("rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "mlp_bias"):
    layer.pop(name)
  edit(tmp_path / "m", transformer_layer_config=layer)
  assert_same(read_drafter(tmp_path / "m", CONFIG)[1], made("speculators_eagle3")[1])
  del layer["hidden_size"]
  edit(tmp_path / "m", transformer_layer_config=layer)
  with pytest.raises(UserError, match="width 4096 against 16"):
    read_drafter(tmp_path / "m", CONFIG)


@pytest.mark.parametrize(
  ("layout", "changes", "message"),
  [
    ("eagle3", {"hidden_size": 32}, "width 32 against 16"),
    ("eagle3", {"vocab_size": 64}, "vocabulary 64 against 29"),
    ("eagle3", {"draft_vocab_size": 5}, "draft_vocab_size 5, but its map has 7"),
    ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]},
                "eagle_aux_hidden_state_layer_ids": None}, "layer 10"),
    ("eagle3", {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, "contradicts itself"),
    ("eagle3", {"num_hidden_layers": 2}, "has 2 layers"),
    ("eagle3", {"attention_bias": True}, "biases"),
    ("eagle3", {"norm_before_fc": True}, "norm_before_fc=True is not supported"),
    ("eagle3", {"fc_norm": True}, "missing: fc_norm.0.weight"),
    ("eagle3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("eagle3", {"surprise": 1}, "'surprise'"),
    ("eagle3", {"num_key_value_heads": 4}, r"mis-shaped: midlayer.self_attn.k_proj.weight"),
    ("speculators_eagle3", {"norm_before_residual": None}, "norm_before_residual"),
    ("speculators_eagle3", {"speculators_model_type": "peagle"}, "'peagle', which is"),
    ("medusa", {"num_heads": 3}, "missing: blocks.2.layers.0.bias"),
    ("medusa", {"num_heads": 1}, "unexpected: blocks.1.layers.0.bias"),
    ("medusa", {"original_lm_head": True}, "original_lm_head"),
    ("medusa", {"medusa_fc_bias": False}, "no bias"),
    ("medusa_original", {"medusa_num_heads": 4}, "has 3 heads"),
    ("eagle", {"hidden_size": 32}, "width 32 against 16"),
    ("eagle", {"num_hidden_layers": 1}, "unexpected: layers.1.input_layernorm.weight"),
    ("speculators_eagle", {"layernorms": True}, "additional norms"),
    ("speculators_eagle", {"fusion_bias": False}, "unexpected: fusion_fc.bias"),
    ("dflash", {"num_target_layers": 36}, "layers 36 against 5"),
    ("dflash", {"dflash_config": {"mask_token_id": 29}}, "mask_token_id must be a token"),
    ("dflash", {"dflash_config": {"mask_token_id": 4, "target_layer_ids": [0, 1, 4]}}, "layer 5"),
    ("dflash", {"dflash_config": {"mask_token_id": 4}}, "mis-shaped: fc.weight"),
    ("dflash", {"is_causal": True}, "is_causal=True is not supported"),
    ("speculators_dflash", {"draft_vocab_size": 8}, "LM head of its own over 8 tokens"),
    ("speculators_dflash", {"sample_from_anchor": True}, "sample_from_anchor=True"),
  ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused(layout, changes, message, tmp_path):
  write(tmp_path / "m", layout)
  edit(tmp_path / "m", **changes)
  with pytest.raises(UserError, match=message) as error:
    read_drafter(tmp_path / "m", CONFIG)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("layout", "fields", "message"),
  [
    ("medusa", {"share_head": True}, "can't express share_head=True"),
    ("medusa", {"logit_cap": 30.0}, "can't express logit_cap=30.0"),
    ("eagle3", {"logit_cap": 30.0}, "can't express logit_cap=30.0"),
    ("eagle3", {"attention": AttentionConfig(4, 2, 6, qk_norm=True)}, "qk_norm=True"),
    ("eagle3", {"attention": AttentionConfig(4, 2, 6, rope=None)}, "rotary embedding None"),
    ("eagle3", {"capture_layers": (1, 2, 5)}, "capture_layers"),
    ("speculators_eagle3", {"capture_layers": (1, 2)}, "capture_layers"),
    ("eagle", {"attention": AttentionConfig(4, 2, 6, window=8)}, "window=8"),
    ("speculators_eagle", {"num_layers": 2}, "num_layers=2"),
    ("dflash", {"labels": "from_anchor"}, "labels='from_anchor'"),
    ("dflash", {"mask_token": None}, "a learned mask embedding"),
    ("dflash", {"capture_layers": (1, 2, 5)}, "capture_layers"),
    ("speculators_dflash", {"attention": AttentionConfig(4, 2, 6)}, "qk_norm=False"),
  ],
)
def test_what_a_layout_has_no_field_for_is_refused(layout, fields, message, tmp_path):
  drafter, params = made(layout)
  with pytest.raises(UserError, match=message):
    write(tmp_path / "m", layout, dataclasses.replace(drafter, **fields), params)
  assert not (tmp_path / "m").exists()


def test_wrong_layout_names_the_right_ones(tmp_path):
  drafter, params = made("medusa")
  with pytest.raises(UserError, match="layouts for it: medusa, medusa_original"):
    write(tmp_path / "m", "eagle3", drafter, params)
  with pytest.raises(UserError, match="did you mean 'medusa'"):
    write(tmp_path / "m", "medussa", drafter, params)
  with pytest.raises(UserError, match="no layout 'speculators' for medusa"):
    write(tmp_path / "m", "speculators", drafter, params)


def test_scaled_embeddings_are_refused(tmp_path):
  drafter, params = made("eagle3")
  scaled = dataclasses.replace(CONFIG, embed_scale=4.0)
  with pytest.raises(UserError, match="multiplies its embeddings by 4"):
    write_drafter(tmp_path / "m", drafter, params, layout="eagle3", target=scaled)


def test_embeddings_of_its_own_are_refused(tmp_path):
  """A copy of the target's embeddings beside the head is accepted, another table is not."""
  write(tmp_path / "m", "eagle3")
  arrays = tensors(tmp_path / "m")
  embed = np.asarray(jax.tree.leaves(target().params["embed"])[0])
  store(tmp_path / "m", {**arrays, "embed_tokens.weight": embed.astype(ml_dtypes.bfloat16)})
  assert_same(read_drafter(tmp_path / "m", CONFIG, params=target().params)[1], made("eagle3")[1])
  store(tmp_path / "m", {**arrays, "embed_tokens.weight": embed[::-1]})
  with pytest.raises(UserError, match=r"embed_tokens.weight differs from the target's"):
    read_drafter(tmp_path / "m", CONFIG, params=target().params)


def test_a_decoder_is_no_drafter(tmp_path):
  from jaxdec.io import save_checkpoint

  save_checkpoint(tmp_path / "m", CONFIG, target().params)
  assert find_layout(tmp_path / "m") is None
  with pytest.raises(UserError, match="holds no drafter in a known layout; known: "):
    read_drafter(tmp_path / "m", CONFIG)


def test_a_model_takes_a_folder_as_drafter(tmp_path):
  """``LM.generate(drafter=folder)`` reads such folders, checked against its own target."""
  from jaxdec.lm import LM

  t = target()
  write(tmp_path / "m", "eagle3", dtype="bfloat16")
  drafter, params = LM(t.model, t.params).drafter(str(tmp_path / "m"))
  assert drafter == dataclasses.replace(made("eagle3")[0], tree=None, num_heads=5)
  assert_same(params, made("eagle3")[1])
  other = Decoder(dataclasses.replace(CONFIG, vocab_size=VOCAB + 1))
  with pytest.raises(UserError, match="vocabulary 29 against 30"):
    LM(other, None).drafter(tmp_path / "m")


def test_convert_command(tmp_path, capsys):
  """Any layout to any other of its kind, and to our own, for the model that comes with us."""
  import jaxdec
  from jaxdec.cli import main
  from jaxdec.drafting import Medusa
  from jaxdec.drafting.checkpoint import load_drafter

  lm = jaxdec.tiny()
  drafter = Medusa.for_target(lm.config, num_heads=1)
  params = drafter.init_params(jax.random.key(0), Target(lm.model, lm.params, None))
  write_drafter(tmp_path / "a", drafter, params, layout="medusa", target=lm.config)
  other, ours = str(tmp_path / "b"), str(tmp_path / "c")
  assert main(["convert", other, "--drafter", str(tmp_path / "a"), "--to", "medusa_original"]) == 0
  assert main(["convert", ours, "--drafter", other, "--to", "jaxdec"]) == 0
  assert main(["convert", ours, "--drafter", other, "--to", "jaxdec"]) == 2  # nothing overwritten
  assert "wrote the medusa drafter" in capsys.readouterr().out
  back, read = load_drafter(ours, Target(lm.model, lm.params, None))
  assert back == drafter
  assert_same(read, params)
  assert main(["convert", ours, "--drafter", other, "--to", "vlm"]) == 2
  assert "no layout 'vlm'" in capsys.readouterr().err


def test_norm_before_residual_by_hand():
  """The layer's residual stream is the normed state: with no attention and no MLP it comes out."""
  drafter, params = made("speculators_eagle3", fc_norm=False, norm_output=False)
  zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
  params = {
    **params,
    "attention": {**params["attention"], "o": zero(params["attention"]["o"])},
    "mlp": {**params["mlp"], "down": zero(params["mlp"]["down"])},
  }
  output, batch = teacher(drafter.capture)
  g = jnp.concatenate(output.features, axis=-1) @ params["fuse"]["kernel"]
  g = rms_norm(g, params["state_norm"]["scale"], NormConfig(drafter.eps))
  g = rms_norm(g, params["out_norm"]["scale"], NormConfig(drafter.eps))
  expected = (g @ params["lm_head"]["kernel"])[:, :-2]
  one = dataclasses.replace(drafter, num_heads=1, tree=None)
  np.testing.assert_allclose(logits(one, params, output, batch)[0], expected, rtol=1e-4, atol=1e-4)
