# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxdec
from jaxdec.data.tokenizer_training import END_OF_TEXT, save_tokenizer, train_tokenizer
from jaxdec.errors import UserError

ASSETS = Path(jaxdec.__file__).parent / "assets" / "tiny_python"
ODD = [
  "",
  " ",
  "\n\n\n   \t\n",
  "def f():\r\n\treturn 1\r\n",
  "\x00\x01\x7f\x85\xa0\u2028\ufeff",
  "".join(map(chr, range(256))),
  "naïve Ωμέγα 中文 🧑‍🚀 e\u0301",
  "trailing  \n  spaces \t",
  "x" * 1000 + "1234567890" * 20,
  f"text with {END_OF_TEXT} inside",
]


@functools.cache
def _shipped():
  return tokenizers.Tokenizer.from_file(str(ASSETS / "tokenizer.json"))


@pytest.fixture
def shipped():
  return _shipped()


@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back_exactly(tokenizer, shipped, text):
  for t in (tokenizer, shipped):
    assert t.decode(t.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_exactly(text):
  t = _shipped()
  assert t.decode(t.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_is_an_entry(shipped):
  assert all(
    shipped.token_to_id(c) is not None for c in tokenizers.pre_tokenizers.ByteLevel.alphabet()
  )


def test_the_shipped_tokenizer_is_made_for_python(shipped):
  assert shipped.get_vocab_size() == 4096
  assert shipped.token_to_id(END_OF_TEXT) == 0
  code = "class A:\n  def f(self):\n    return self.x\n\n\nif __name__ == '__main__':\n"
  pieces = [shipped.decode([i]) for i in shipped.encode(code).ids]
  assert {"\n  ", "\n    ", "def", " self", "class", "return"} & set(pieces) >= {"\n    ", "def"}
  assert len(code.encode()) / len(pieces) > 2.5


def test_training_is_reproducible(tokenizer, stdlib_documents):
  again = train_tokenizer((d.text for d in stdlib_documents), vocab_size=600)
  assert again.to_str() == tokenizer.to_str()
  assert tokenizer.get_vocab_size() == 600


def test_saved_files_load_again(tokenizer, tmp_path):
  save_tokenizer(tokenizer, tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
  loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  assert loaded.to_str() == tokenizer.to_str()
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert config["eos_token"] == END_OF_TEXT and not config["clean_up_tokenization_spaces"]


@pytest.mark.compare
@pytest.mark.parametrize("text", ODD)
def test_transformers_reads_the_shipped_tokenizer_alike(shipped, text):
  transformers = pytest.importorskip("transformers", reason="needs the compare extra")
  theirs = transformers.AutoTokenizer.from_pretrained(str(ASSETS))
  ids = theirs.encode(text, add_special_tokens=False)
  assert ids == shipped.encode(text).ids
  assert theirs.decode(ids) == text
  assert theirs.eos_token_id == 0 and len(theirs) == 4096


def test_errors():
  with pytest.raises(UserError, match="at least 257"):
    train_tokenizer(["x"], vocab_size=100)
  with pytest.raises(UserError, match="too few for vocab_size=1000"):
    train_tokenizer(["short text"], vocab_size=1000)
