# SPDX-License-Identifier: Apache-2.0
"""The tokenizer wrapper: special ids, streaming without broken characters, saving."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from jaxdec.errors import UserError
from jaxdec.io.tokenizers import load_tokenizer

TEXT = "naïve 日本語 🙂‍↔️ def f(x):\n\treturn x  # ok"


def write(folder, *, bos: bool = False, config: dict | None = None, extra=()):
  """A byte-level tokenizer: 256 bytes, then <s> (256) and </s> (257)."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", *extra)])
  if bos:
    backend.post_processor = processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 256)]
    )
  backend.save(str(folder / "tokenizer.json"))
  if config is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def test_round_trip_and_sizes(tmp_path):
  tokenizer = load_tokenizer(write(tmp_path), eos_ids=[257])
  ids = tokenizer.encode(TEXT)
  assert len(ids) == len(TEXT.encode()) and tokenizer.decode(ids) == TEXT
  assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.bos_id) == (256, (257,), None)
  assert tokenizer.decode([*ids, 257]) == TEXT
  assert tokenizer.decode([*ids, 257], skip_special=False) == TEXT + "</s>"
  assert tokenizer.token_id("</s>") == 257 and tokenizer.token_id("?!") is None


@pytest.mark.parametrize(
  "bos, config, expected",
  [
    (True, {"bos_token": "<s>"}, 256),
    (True, None, 256),  # the id the model's own files name
    (False, {"bos_token": "<s>"}, None),  # named, but put nowhere
    (False, {"bos_token": {"content": "<s>"}, "add_bos_token": True}, 256),
  ],
)
def test_what_is_put_in_front(tmp_path, bos, config, expected):
  tokenizer = load_tokenizer(write(tmp_path, bos=bos, config=config), bos_id=256)
  assert tokenizer.bos_id == expected
  front = [256] if expected else []
  assert tokenizer.encode("ab") == front + tokenizer.encode("ab", add_special=False)


def test_eos_of_the_model_wins_over_the_tokenizers(tmp_path):
  write(tmp_path, config={"eos_token": "</s>"})
  assert load_tokenizer(tmp_path).eos_ids == (257,)
  assert load_tokenizer(tmp_path, eos_ids=[5, 6]).eos_ids == (5, 6)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_streaming_gives_the_text_and_no_broken_character(tmp_path, step):
  tokenizer = load_tokenizer(write(tmp_path))
  ids = tokenizer.encode(TEXT)
  stream = tokenizer.stream()
  pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
  assert not any("\ufffd" in p for p in pieces)
  assert sum(map(bool, pieces)) > 5
  assert "".join(pieces) + stream.finish() == TEXT


def test_streaming_an_unfinished_character_ends_with_a_replacement(tmp_path):
  tokenizer = load_tokenizer(write(tmp_path))
  ids = tokenizer.encode("a日")[:-1]
  stream = tokenizer.stream()
  assert stream.push(ids) == ""
  assert stream.finish() == tokenizer.decode(ids) == "a\ufffd"
  assert stream.finish() == ""


def test_added_tokens_beyond_the_model_are_refused_when_used(tmp_path):
  """Gemma 3's tokenizer names an image token that the text model has no embedding for."""
  tokenizer = load_tokenizer(write(tmp_path, extra=["<image>"]), model_vocab_size=258)
  assert tokenizer.encode("ab")
  with pytest.raises(UserError, match=r"'<image>' \(id 258\).*258 embeddings"):
    tokenizer.encode("a<image>")


def test_saved_with_the_files_that_came_with_it(tmp_path):
  config = {"bos_token": "<s>", "add_bos_token": True, "eos_token": "</s>", "x": 1}
  write(tmp_path, config=config)
  (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
  (tmp_path / "out").mkdir()
  tokenizer = load_tokenizer(tmp_path)
  tokenizer.save(tmp_path / "out")
  again = load_tokenizer(tmp_path / "out")
  assert again.encode(TEXT) == tokenizer.encode(TEXT)
  assert (again.bos_id, again.eos_ids) == (256, (257,))
  assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == config
  assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_saved_alone_it_keeps_its_special_ids(tmp_path):
  write(tmp_path, bos=True)
  (tmp_path / "out").mkdir()
  load_tokenizer(tmp_path, bos_id=256, eos_ids=[257]).save(tmp_path / "out")
  again = load_tokenizer(tmp_path / "out")
  assert (again.bos_id, again.eos_ids) == (256, (257,))
