# SPDX-License-Identifier: Apache-2.0
"""Every way a model folder can be wrong has one clear sentence."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxdec
from jaxdec.errors import UserError
from jaxdec.io import folders, safetensors
from jaxdec.io.huggingface import save_checkpoint
from jaxdec.models import Decoder, tiny_llama

TINY = tiny_llama(vocab_size=64, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
                  hidden_dim=24, tie_embeddings=False)  # fmt: skip


@pytest.fixture(scope="module")
def params():
  return nn.unbox(Decoder(TINY).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])


@pytest.fixture
def folder(params, tmp_path):
  save_checkpoint(tmp_path / "m", TINY, params)
  write_tokenizer(tmp_path / "m", 60)
  return tmp_path / "m"


def write_tokenizer(folder, size: int):
  from tokenizers import Tokenizer, models, pre_tokenizers

  backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.save(str(folder / "tokenizer.json"))


def error_of(folder) -> str:
  with pytest.raises(UserError) as error:
    jaxdec.load(folder)
  return str(error.value)


def edit(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
  """Writes the weights again with ``change`` applied to the dict of arrays."""
  path = folder / "model.safetensors"
  file = safetensors.File(path)
  arrays = {n: np.array(file.view(n)) for n in file.entries}
  change(arrays)
  tensors = [safetensors.Tensor(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()]
  safetensors.write(path, tensors, {"format": "pt"})


def test_the_folder_is_fine(folder):
  lm = jaxdec.load(folder)
  assert lm([[1, 2, 3]]).shape == (1, 3, 64)
  assert lm.tokenizer.encode("w5 w7") == [5, 7]


def test_missing_folder():
  assert "folder 'no/such/folder' does not exist" in error_of("no/such/folder")


def test_a_file_instead_of_a_folder(folder):
  assert "is a file" in error_of(folder / "config.json")


def test_no_config(folder):
  (folder / "config.json").unlink()
  assert "has no config.json" in error_of(folder)


@pytest.mark.parametrize(
  "text, words", [("{\n  'a': 1}", "line 2"), ("[1]", "JSON object"), ("", "line 1")]
)
def test_bad_json(folder, text, words):
  (folder / "config.json").write_text(text)
  assert words in error_of(folder) and "config.json" in error_of(folder)


def test_unknown_family_and_field(folder):
  edit(folder, model_type="llamma")
  assert "'llamma' is not supported (did you mean 'llama'?)" in error_of(folder)
  edit(folder, model_type="llama", sparsity=3)
  assert "'sparsity'" in error_of(folder)


def test_no_weights(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  message = error_of(folder)
  assert "has no weights" in message and "pytorch_model.bin" in message


def test_truncated_weights_name_the_tensors(folder):
  path = folder / "model.safetensors"
  file = safetensors.File(path)
  last = max(file.entries, key=lambda n: file.entries[n].stop)
  path.write_bytes(path.read_bytes()[:-1])
  message = error_of(folder)
  assert "is truncated" in message and last in message
  assert "model.norm.weight" not in message or last == "model.norm.weight"


@pytest.mark.parametrize("size", [0, 5, 60])
def test_truncated_header(folder, size):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:size])
  message = error_of(folder)
  assert ("model.safetensors" in message and f"{size} bytes" in message) or f"has {size}" in message


@pytest.mark.parametrize("content", [b"\x80" * 100, struct.pack("<Q", 4) + b"nope" + b"\0" * 50])
def test_not_safetensors(folder, content):
  (folder / "model.safetensors").write_bytes(content)
  assert "is not a safetensors file" in error_of(folder)


def test_missing_unexpected_and_misshaped_tensors_in_one_error(folder):
  def change(arrays):
    del arrays["model.layers.1.mlp.up_proj.weight"]
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    arrays["lm_head.weight"] = np.zeros((65, 16), np.float32)

  rewrite(folder, change)
  message = error_of(folder)
  assert "missing: model.layers.1.mlp.up_proj.weight" in message
  assert "unexpected: model.layers.0.self_attn.q_proj.bias" in message
  assert "mis-shaped: lm_head.weight is (65, 16), expected (64, 16)" in message


def test_rotary_buffers_are_no_surprise(folder):
  rewrite(folder, lambda a: a.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)}))
  jaxdec.load(folder)


def test_a_tied_head_that_differs(folder):
  edit(folder, tie_word_embeddings=True)
  assert "lm_head.weight differs" in error_of(folder)
  rewrite(folder, lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"]}))
  assert "head" not in jaxdec.load(folder).params


def test_missing_shard(params, tmp_path):
  folder = tmp_path / "m"
  save_checkpoint(folder, TINY, params, max_shard_bytes=4000)
  write_tokenizer(folder, 60)
  shards = sorted(folder.glob("model-*.safetensors"))
  shards[1].unlink()
  message = error_of(folder)
  assert f"lacks 1 of {len(shards)} weight files: {shards[1].name}" in message


def test_an_index_that_names_what_is_not_there(params, tmp_path):
  folder = tmp_path / "m"
  save_checkpoint(folder, TINY, params, max_shard_bytes=4000)
  index = json.loads((folder / folders.INDEX).read_text())
  index["weight_map"]["ghost"] = sorted(index["weight_map"].values())[0]
  (folder / folders.INDEX).write_text(json.dumps(index))
  assert "no file holds: ghost" in error_of(folder)


def test_missing_tokenizer(folder):
  (folder / "tokenizer.json").unlink()
  (folder / "tokenizer.model").write_text("")
  message = error_of(folder)
  assert "has no tokenizer.json" in message and "tokenizer.model alone" in message
  assert jaxdec.load(folder, need_tokenizer=False).tokenizer is None


def test_wrong_tokenizer_gives_both_sizes(folder):
  write_tokenizer(folder, 65)
  message = error_of(folder)
  assert "65 tokens" in message and "vocabulary 64" in message


def test_damaged_tokenizer(folder):
  (folder / "tokenizer.json").write_text("{}")
  assert "is not a tokenizer" in error_of(folder)


def test_errors_come_before_jax_and_touch_no_network(folder):
  """In a fresh process whose sockets are cut: the sentence comes, and jax was never imported."""
  edit(folder, model_type="llamma")
  code = """
import socket, sys
def refuse(*a, **k): raise AssertionError("network")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
import jaxdec
for path in sys.argv[1:]:
  try: jaxdec.load(path)
  except jaxdec.errors.UserError as e: print(e)
assert not {"jax", "flax", "torch", "transformers"} & set(sys.modules)
"""
  out = subprocess.run([sys.executable, "-c", code, "meta-llama/nope", str(folder)],
                       capture_output=True, text=True, check=False)  # fmt: skip
  assert out.returncode == 0, out.stderr
  first, second = out.stdout.splitlines()
  assert first.startswith("folder 'meta-llama/nope' does not exist")
  assert "'llamma' is not supported" in second


@pytest.mark.parametrize(
  "tokens, words",
  [
    ([1, 2], "shape (2,)"),
    ([[0.5]], "float64"),
    ([[64]], "token id 64"),
    ([[-1]], "token id -1"),
    ([[]], "shape (1, 0)"),
    (np.zeros((1, 2049), np.int32), "2049 tokens"),
  ],
)
def test_calling_with_wrong_tokens(folder, tokens, words):
  lm = jaxdec.load(folder)
  with pytest.raises(UserError) as error:
    lm(tokens)
  assert words in str(error.value)
