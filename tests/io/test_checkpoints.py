# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: bit-exact, sharded files, other types, meshes, atomic replacement."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdec.errors import UserError
from jaxdec.io import folders, safetensors
from jaxdec.io.huggingface import load_checkpoint, save_checkpoint
from jaxdec.mixers.linear_attention import LinearAttentionConfig
from jaxdec.models import Decoder, DecoderConfig, LayerConfig, MLPConfig, tiny_llama
from jaxdec.parallel import make_mesh

TINY = tiny_llama(vocab_size=64, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
                  hidden_dim=24, eos_ids=(3, 5), bos_id=1)  # fmt: skip


def make_params(config: DecoderConfig, dtype=jnp.float32, layout="unrolled"):
  model = Decoder(config, param_dtype=dtype, layout=layout)
  return nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_is_bit_exact(dtype, tmp_path):
  params = make_params(TINY, dtype)
  save_checkpoint(tmp_path / "a", TINY, params)
  config, back = load_checkpoint(tmp_path / "a")
  assert config == TINY
  assert_same(back, params)
  save_checkpoint(tmp_path / "b", config, back)
  first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
  assert first == second


def test_files_are_read_by_the_safetensors_package(tmp_path):
  from safetensors.numpy import load_file

  params = make_params(TINY)
  save_checkpoint(tmp_path / "m", TINY, params)
  tensors = load_file(tmp_path / "m" / "model.safetensors")
  np.testing.assert_array_equal(
    tensors["model.layers.1.self_attn.q_proj.weight"], params["layers_1"]["mixer"]["q"]["kernel"].T
  )


def test_requested_type(tmp_path):
  params = make_params(TINY, jnp.bfloat16)
  save_checkpoint(tmp_path / "m", TINY, params)
  _, back = load_checkpoint(tmp_path / "m", dtype="float32")
  assert_same(back, jax.tree.map(lambda x: x.astype(jnp.float32), params))
  with pytest.raises(UserError, match=r"'float31' is not supported.*did you mean 'float32'"):
    load_checkpoint(tmp_path / "m", dtype="float31")


def test_sharded_files(tmp_path):
  params = make_params(TINY)
  save_checkpoint(tmp_path / "m", TINY, params, max_shard_bytes=5000)
  names = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
  assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
  index = json.loads((tmp_path / "m" / folders.INDEX).read_text())
  assert set(index["weight_map"].values()) == set(names)
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
  assert_same(load_checkpoint(tmp_path / "m")[1], params)


def test_scanned_and_boxed_parameters_are_saved_alike(tmp_path):
  from jaxdec.models import stack_layers

  params = make_params(TINY)
  save_checkpoint(tmp_path / "m", TINY, stack_layers(params, TINY))
  assert_same(load_checkpoint(tmp_path / "m")[1], params)


def test_hybrid_falls_back_to_our_own_type_and_says_so(tmp_path):
  linear = LayerConfig(LinearAttentionConfig(num_heads=2, head_dim=8), MLPConfig(24))
  config = DecoderConfig(vocab_size=64, dim=16, layers=(linear, *TINY.layers))
  params = make_params(config)
  with pytest.warns(UserWarning, match="linear_attention.*'jaxdec'"):
    save_checkpoint(tmp_path / "m", config, params)
  back, loaded = load_checkpoint(tmp_path / "m")
  assert back == config
  assert_same(loaded, params)
  with pytest.raises(UserError, match="no linear_attention layers"):
    save_checkpoint(tmp_path / "n", config, params, family="llama")
  assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("shape", [dict(fsdp=2, tensor=2), dict(tensor=2, data=4), dict(fsdp=8)])
def test_straight_into_a_mesh(shape, tmp_path):
  params = make_params(TINY)
  save_checkpoint(tmp_path / "m", TINY, params)
  mesh = make_mesh(**shape)
  _, back = load_checkpoint(tmp_path / "m", mesh=mesh)
  assert_same(back, params)
  table = back["embed"]
  assert table.sharding.mesh == mesh
  split = shape.get("tensor", 1) * shape.get("fsdp", 1)
  assert table.addressable_shards[0].data.size == table.size // split


def test_a_mesh_that_does_not_divide_is_named(tmp_path):
  save_checkpoint(tmp_path / "m", TINY, make_params(TINY))
  with pytest.raises(UserError, match="does not divide"):
    load_checkpoint(tmp_path / "m", mesh=make_mesh(tensor=5))


def test_loaded_parameters_do_not_alias_the_file(tmp_path):
  params = make_params(TINY)
  save_checkpoint(tmp_path / "m", TINY, params)
  _, back = load_checkpoint(tmp_path / "m")
  file = tmp_path / "m" / "model.safetensors"
  size = file.stat().st_size
  with open(file, "r+b") as f:
    f.seek(size // 2)
    f.write(b"\0" * (size - size // 2))
  assert_same(back, params)


def test_an_existing_model_is_kept_unless_told(tmp_path):
  target = tmp_path / "m"
  save_checkpoint(target, TINY, make_params(TINY))
  before = (target / "model.safetensors").read_bytes()
  other = jax.tree.map(lambda x: x + 1, make_params(TINY))
  with pytest.raises(UserError, match="already holds a model"):
    save_checkpoint(target, TINY, other)
  assert (target / "model.safetensors").read_bytes() == before
  save_checkpoint(target, TINY, other, overwrite=True)
  assert_same(load_checkpoint(target)[1], other)
  assert sorted(os.listdir(tmp_path)) == ["m"]  # nothing temporary is left


def test_a_folder_with_something_else_is_never_replaced(tmp_path):
  (tmp_path / "thesis.txt").write_text("years of work")
  for overwrite in (False, True):
    with pytest.raises(UserError, match=r"something else \(thesis.txt\)"):
      save_checkpoint(tmp_path, TINY, make_params(TINY), overwrite=overwrite)
  assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_failed_save_leaves_the_previous_one(when, tmp_path, monkeypatch):
  target = tmp_path / "m"
  params = make_params(TINY)
  save_checkpoint(target, TINY, params)

  def full(*_, **__):
    raise OSError("no space left on device")

  if when == "writing":
    monkeypatch.setattr(safetensors, "write", full)
  else:
    replace, calls = os.replace, []

    # The first move (old aside) works, the second fails, the third puts the old one back.
    def second_fails(a, b):
      calls.append(b)
      return full() if len(calls) == 2 else replace(a, b)

    monkeypatch.setattr(os, "replace", second_fails)
  with pytest.raises(OSError, match="no space"):
    save_checkpoint(target, TINY, jax.tree.map(lambda x: x * 0, params), overwrite=True)
  monkeypatch.undo()
  assert_same(load_checkpoint(target)[1], params)
  assert [n for n in os.listdir(tmp_path) if n.endswith(".tmp")] == []


def test_parameters_of_another_shape_are_refused(tmp_path):
  params = make_params(TINY)
  params["layers_0"]["mlp"]["up"]["kernel"] = jnp.zeros((16, 23))
  del params["layers_1"]["mixer_norm"]
  with pytest.raises(UserError, match=r"up/kernel is \(16, 23\), expected \(16, 24\)") as error:
    save_checkpoint(tmp_path / "m", TINY, params)
  assert "layers_1/mixer_norm/scale is missing" in str(error.value)
  assert not (tmp_path / "m").exists()
