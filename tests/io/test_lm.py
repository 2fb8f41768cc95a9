# SPDX-License-Identifier: Apache-2.0
"""The facade: load, call, generate with every kind of drafter argument, save."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_tokenizers import write

import jaxdec
from jaxdec.errors import UserError
from jaxdec.models import Decoder, tiny_llama

CONFIG = tiny_llama(vocab_size=258, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
                    hidden_dim=24, max_length=256, eos_ids=(257,))  # fmt: skip


def init(config, seed=0):
  model = Decoder(config)
  return nn.unbox(model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("lm")
  tokenizer = jaxdec.io.load_tokenizer(write(path), model_vocab_size=258, eos_ids=[257])
  jaxdec.save(jaxdec.LM(Decoder(CONFIG), init(CONFIG), tokenizer), path / "m")
  return path / "m"


@pytest.fixture(scope="module")
def lm(folder):
  return jaxdec.load(folder, dtype="float32")


def test_loaded_as_saved(lm):
  assert lm.config == CONFIG
  tokens = [[1, 2, 3], [4, 5, 6]]
  out = lm(tokens)
  expected = lm.model.apply({"params": init(CONFIG)}, jnp.asarray(tokens)).logits
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_compute_type_follows_the_request_and_the_file(lm, folder, tmp_path):
  half = jaxdec.load(folder, dtype="bfloat16")
  assert half.model.dtype == jnp.bfloat16 and half([[1]]).dtype == jnp.float32
  jaxdec.save(half, tmp_path / "half")
  assert jaxdec.load(tmp_path / "half").model.dtype == jnp.bfloat16


def test_generate_text_and_ids_agree_with_calling(lm):
  out = lm.generate(["ab"], max_new_tokens=6, stop=None)
  ids = lm.tokenizer.encode("ab")
  for token in out.tokens[0]:
    assert token == int(np.argmax(lm([ids])[0, -1]))
    ids.append(token)
  assert out.text == [lm.tokenizer.decode(out.tokens[0])]
  assert lm.generate([lm.tokenizer.encode("ab")], max_new_tokens=6, stop=None).tokens == out.tokens


def test_every_way_to_name_a_drafter(lm, folder):
  plain = lm.generate(["abc"], max_new_tokens=8, stop=None).tokens
  for drafter in (None, "none", "prompt_lookup", lm, folder, str(folder)):
    out = lm.generate(["abc"], max_new_tokens=8, stop=None, drafter=drafter)
    assert out.tokens == plain, drafter
  # A decoder that drafts for itself is always right.
  assert lm.generate(["abc"], max_new_tokens=8, stop=None, drafter=lm).stats.tokens_per_step > 2


def test_a_distilled_folder(lm, tmp_path):
  from jaxdec.drafting import Target
  from jaxdec.drafting.checkpoint import save_drafter
  from jaxdec.drafting.medusa import Medusa

  target = Target(lm.model, lm.params, None)
  drafter = Medusa.for_target(lm.config, num_heads=2)
  save_drafter(tmp_path / "d", drafter, drafter.init_params(jax.random.key(1), target), target)
  out = lm.generate(["abc"], max_new_tokens=8, stop=None, drafter=tmp_path / "d")
  assert out.tokens == lm.generate(["abc"], max_new_tokens=8, stop=None).tokens
  other = jaxdec.LM(lm.model, init(CONFIG, seed=9), lm.tokenizer)
  with pytest.raises(UserError, match="made for a target of the same sizes but other weights"):
    other.generate(["abc"], drafter=tmp_path / "d")


def test_drafter_errors(lm, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r"'prompt_lokup'.*did you mean 'prompt_lookup'"):
    lm.drafter("prompt_lokup")
  with pytest.raises(UserError, match="'runs/nothing' does not exist"):
    lm.drafter("runs/nothing")
  with pytest.raises(UserError, match="no drafter"):
    lm.drafter(tmp_path)
  monkeypatch.setattr("jaxdec.lm.TINY", tmp_path)
  with pytest.raises(UserError, match=r"no trained 'hydra' drafter.*jaxdec distill"):
    lm.drafter("hydra")
  with pytest.raises(UserError, match="lacks the embedded model"):
    jaxdec.tiny()


def test_sampling_arguments_reach_the_law(lm):
  with pytest.raises(UserError, match="temperature must be"):
    lm.generate(["a"], temperature=-1.0)
  greedy = lm.generate(["abc"], max_new_tokens=12, stop=None).tokens
  same = lm.generate(["abc"], max_new_tokens=12, stop=None, temperature=5.0, top_k=1).tokens
  hot = lm.generate(["abc"], max_new_tokens=12, stop=None, temperature=5.0, seed=3).tokens
  assert same == greedy and hot != greedy


def test_streaming_pieces_are_the_result(lm):
  pieces = []
  out = lm.generate(["abc"], max_new_tokens=9, stop=None, stream=pieces.append)
  assert [t for p in pieces for t in p.tokens] == out.tokens[0]
  assert "".join(p.text for p in pieces) == out.text[0]
  assert pieces[-1].done
