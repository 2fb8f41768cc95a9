# SPDX-License-Identifier: Apache-2.0
"""``jaxdec datastore``: a folder from a user's files that drafts for models with that tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.cli import main
from jaxdec.drafting import Datastore
from jaxdec.errors import UserError
from jaxdec.io.datastore import build_datastore, load_datastore, save_datastore
from jaxdec.io.tokenizers import load_tokenizer
from jaxdec.lm import LM, TINY
from jaxdec.models import Decoder, tiny_llama
from tests.cli.command import assert_sentence, run_jaxdec


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for i in range(6):
    (folder / f"{i}.py").write_text(f"def number_{i}(x):\n  return x + {i}\n\n" * 10)
  return str(folder)


@pytest.fixture(scope="module")
def store(text, tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("stores") / "mine")
  assert main(["datastore", folder, "--data", text]) == 0
  return folder


def test_all_files_are_indexed(store, text):
  drafter, params = load_datastore(store, load_tokenizer(TINY), 4096)
  assert drafter == Datastore()
  tokenizer = load_tokenizer(TINY)
  ids = np.asarray(tokenizer.encode("def number_3(x):\n  return x + 3", add_special=False))
  tokens = np.asarray(params["tokens"])
  windows = np.lib.stride_tricks.sliding_window_view(tokens, len(ids))
  assert (windows == ids).all(axis=1).sum() == 10
  config = json.loads((Path(store) / "datastore.json").read_text())
  assert config["documents"] == 6 and config["split"] == "all" and config["data"] == text
  assert config["tokens"] == len(params["order"]) == (tokens >= 0).sum()


def test_generate_drafts_from_the_folder(store):
  config = tiny_llama(
    dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=32, max_length=256,
  )  # fmt: skip
  model = Decoder(config)
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
  lm = LM(model, params, load_tokenizer(TINY))
  prompts, options = ["def number_1(x):", "a"], dict(max_new_tokens=8, temperature=1.0, stop=None)
  plain = lm.generate(prompts, **options)
  out = lm.generate(prompts, **options, drafter=store)
  assert out.tokens == plain.tokens
  drafter, arrays = lm.drafter(store)
  assert isinstance(drafter, Datastore) and set(arrays) == {"tokens", "order"}


def test_one_model_of_another_tokenizer_is_refused(store, tmp_path):
  other = load_tokenizer(TINY)
  other.backend.add_tokens(["another token"])
  with pytest.raises(UserError, match="built with another tokenizer"):
    load_datastore(store, other)
  with pytest.raises(UserError, match="holds token id"):
    load_datastore(store, None, 5)
  save_datastore(tmp_path / "a", build_datastore([np.arange(9)]), other)
  drafter, _ = load_datastore(tmp_path / "a", other, 9)
  assert drafter == Datastore()


def test_damage_is_named(store, tmp_path):
  with pytest.raises(UserError, match=r"holds no datastore\.json"):
    load_datastore(tmp_path)
  tokenizer = load_tokenizer(TINY)
  for name, n in (("a", 9), ("b", 10)):
    save_datastore(tmp_path / name, build_datastore([np.arange(n)]), tokenizer)
  arrays = tmp_path / "a" / "datastore.safetensors"
  whole = arrays.read_bytes()
  arrays.write_bytes((tmp_path / "b" / "datastore.safetensors").read_bytes())
  with pytest.raises(UserError, match=r"does not belong to its datastore\.json"):
    load_datastore(tmp_path / "a")
  arrays.write_bytes(whole[:-5])
  with pytest.raises(UserError, match="damaged"):
    load_datastore(tmp_path / "a")
  with pytest.raises(UserError, match="holds something else"):
    save_datastore(tmp_path / "a", build_datastore([np.arange(3)]), tokenizer)


def test_the_corpus_can_be_cut(text, tmp_path, capsys):
  folder = str(tmp_path / "small")
  assert main(["datastore", folder, "--data", text, "--max-tokens", "50"]) == 0
  assert "indexed 50 tokens of 1 documents (cut at --max-tokens 50)" in capsys.readouterr().out
  assert len(load_datastore(folder)[1]["order"]) == 50


@pytest.mark.parametrize(("args", "parts"), [
  (["{store}"], ["holds something else", "left as it is"]),
  (["new", "--data", "no/such"], ["data 'no/such' does not exist"]),
  (["new", "--data", "0.5*python_stdlib + 0.5*python_stdlib"], ["built from one source"]),
  (["new", "--max-tokens", "0"], ["--max-tokens must be at least 1"]),
  (["new", "--model", "tinny"], ["did you mean 'tiny'?"]),
])  # fmt: skip
def test_mistakes_take_no_heavy_import(args, parts, store, tmp_path):
  outcome = run_jaxdec("datastore", *(a.format(store=store) for a in args), cwd=tmp_path)
  assert_sentence(outcome, *parts)
  assert outcome.heavy == [] and list(tmp_path.iterdir()) == []
