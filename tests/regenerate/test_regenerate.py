# SPDX-License-Identifier: Apache-2.0
"""The target's own answers: exact, resumable to the byte, shared out over processes."""

from __future__ import annotations

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxdec.data.chat import ChatTemplate, Conversation
from jaxdec.data.regenerated import read_records, regenerated_corpus
from jaxdec.decoding import Sampler, generate
from jaxdec.errors import UserError
from jaxdec.io.tokenizers import Tokenizer
from jaxdec.lm import LM, TINY
from jaxdec.models import Decoder, tiny_llama
from jaxdec.regenerate import RegenerateConfig, _seed, regenerate

CHATML = """{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
NEW = 6


@functools.cache
def lm(template=CHATML, seed=0, max_length=256):
  backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
  backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  size = backend.get_vocab_size()
  end = backend.token_to_id("<|im_end|>")
  config = tiny_llama(
    vocab_size=size, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=16,
    max_length=max_length,
  )  # fmt: skip
  model = Decoder(dataclasses.replace(config, eos_ids=(end,)))
  params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
  extras = {"tokenizer_config.json": json.dumps({"chat_template": template})}
  return LM(model, nn.unbox(params), Tokenizer(backend, eos_ids=[end], extras=extras))


def write(path, records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
  return str(path)


def questions(tmp_path, count=7):
  return write(
    tmp_path / "questions.jsonl", [{"prompt": "def f" + "(x)" * i} for i in range(count)]
  )


def settings(tmp_path, data, output="out", **options):
  options = {"max_new_tokens": NEW, "temperature": 1.0, "batch_size": 2, "shards": 2, **options}
  return RegenerateConfig(data=data, output=str(tmp_path / output), **options)


def run(config, model=None, after=None):
  """The bytes of every file; ``after`` so many batches it is interrupted."""
  lines = []

  def say(text):
    lines.append(text)
    if len(lines) == after:
      raise KeyboardInterrupt

  regenerate(model or lm(), config, say)
  return content(config)


def content(config):
  from pathlib import Path

  return {p.name: p.read_bytes() for p in sorted(Path(config.output).iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  data = questions(folder)
  return data, run(settings(folder, data))


def test_each_answer_is_what_the_target_says_alone(whole, tmp_path):
  data, _ = whole
  config = settings(tmp_path, data)
  run(config)
  records = sorted(read_records(config.output), key=lambda r: r["index"])
  assert [r["index"] for r in records] == list(range(7))
  for record in records:
    (document,) = record["documents"]
    ((begin, end),) = document["answers"]
    prompt = document["tokens"][:begin]
    assert prompt == lm().tokenizer.encode("def f" + "(x)" * record["index"])
    alone = generate(
      lm().model, lm().params, [prompt], max_new_tokens=NEW, sampler=Sampler(1.0),
      seed=[_seed(0, record["index"], 0)],
    )  # fmt: skip
    assert document["tokens"][begin:end] == alone.tokens[0] and end == len(document["tokens"])
    assert record["answer"] == lm().tokenizer.decode(alone.tokens[0])


@pytest.mark.parametrize("after", [1, 2, 3])
def test_interrupted_between_batches_then_resumed_to_the_byte(whole, tmp_path, after):
  data, expected = whole
  config = settings(tmp_path, data)
  with pytest.raises(KeyboardInterrupt):
    run(config, after=after)
  assert content(config) != expected
  assert run(config) == expected


def test_killed_while_writing_then_resumed_to_the_byte(whole, tmp_path):
  """A file cut anywhere: in a line, between the lines of a batch, between batches."""
  data, expected = whole
  config = settings(tmp_path, data)
  name = "shard-00001-of-00002.jsonl"
  ends = [i + 1 for i, byte in enumerate(expected[name]) if byte == 10]
  run(config)
  for cut in (0, 9, ends[0], ends[0] + 5, ends[1], ends[1] + 1, ends[-1] - 1):
    path = tmp_path / "out" / name
    path.write_bytes(expected[name][:cut])
    assert run(config) == expected
  done = regenerate(lm(), config, lambda line: None)
  assert (done.found, done.rows, done.tokens) == (7, 0, 0)


def test_a_drafter_changes_no_byte(whole, tmp_path):
  data, expected = whole
  assert run(settings(tmp_path, data, drafter="prompt_lookup")) == expected
  half = settings(tmp_path, data, "half")
  with pytest.raises(KeyboardInterrupt):
    run(half, after=1)
  assert run(dataclasses.replace(half, drafter="token_recycling")) == expected


def test_processes_share_the_files(whole, tmp_path):
  data, expected = whole
  config = settings(tmp_path, data, num_processes=2)
  assert set(run(config)) == {"regenerated.json", "shard-00000-of-00002.jsonl"}
  with pytest.raises(UserError, match=r"shard-00001-of-00002\.jsonl is missing"):
    regenerated_corpus(config.output, lm().tokenizer)
  assert run(dataclasses.replace(config, process_id=1)) == expected


def test_only_answers_are_labels(whole, tmp_path):
  data, _ = whole
  config = settings(tmp_path, data)
  run(config)
  corpus = regenerated_corpus(config.output, lm().tokenizer)
  records = list(read_records(config.output))
  assert len(corpus) == len(records) == 7
  for i, record in enumerate(records):
    (document,) = record["documents"]
    ((begin, end),) = document["answers"]
    where = slice(corpus.offsets[i], corpus.offsets[i + 1])
    assert corpus[i].tolist() == document["tokens"]
    assert np.flatnonzero(corpus.labels[where]).tolist() == list(range(begin, end))


def talk(*turns):
  return [{"role": role, "content": text} for role, text in turns]


def test_conversations_are_answered_turn_by_turn(tmp_path):
  asked = talk(
    ("system", "Be brief."), ("user", "Hello"), ("assistant", "thrown away"), ("user", "And?")
  )
  short = talk(("user", "Sort x"))
  greeting = talk(("assistant", "Welcome."), ("user", "x"), ("assistant", "thrown away"))
  records = [{"messages": m} for m in (asked, short, greeting)]
  data = write(tmp_path / "chats.jsonl", records)
  config = settings(tmp_path, data, shards=1)
  run(config)
  found = {r["index"]: r for r in read_records(config.output)}
  assert [m["role"] for m in found[0]["messages"]] == [
    "system", "user", "assistant", "user", "assistant",
  ]  # fmt: skip
  assert found[0]["messages"][0]["content"] == "Be brief."
  assert [m["role"] for m in found[1]["messages"]] == ["user", "assistant"]
  assert found[2]["messages"][0]["content"] == "Welcome."
  assert "thrown away" not in json.dumps(list(found.values()))
  template, tokenizer = ChatTemplate.of(lm().tokenizer), lm().tokenizer
  for record in found.values():
    answers = [(document, span) for document in record["documents"] for span in document["answers"]]
    said = [m["content"] for m in record["messages"] if m["role"] == "assistant"][-len(answers) :]
    turns = [i for i, m in enumerate(record["messages"]) if m["role"] == "assistant"]
    for turn, ((document, (begin, end)), text, at) in enumerate(
      zip(answers, said, turns[-len(answers) :])
    ):
      prompt = template.render(Conversation(record["messages"]), at, ask=True)
      ids = tokenizer.backend.encode(prompt, add_special_tokens=False).ids
      assert document["tokens"][:begin] == ids
      alone = generate(
        lm().model, lm().params, [ids], max_new_tokens=NEW, sampler=Sampler(1.0),
        seed=[_seed(0, record["index"], turn)],
      )  # fmt: skip
      assert document["tokens"][begin:end] == alone.tokens[0]
      assert text == tokenizer.decode(alone.tokens[0])


def test_prompts_without_room_are_left_out(tmp_path):
  data = write(tmp_path / "p.jsonl", [{"prompt": "x"}, {"prompt": "x(" * 300}])
  done = regenerate(lm(), settings(tmp_path, data, shards=1), lambda line: None)
  assert (done.rows, done.left_out) == (2, 1)
  assert len(regenerated_corpus(tmp_path / "out", lm().tokenizer)) == 1


def test_prompts_cut_from_a_source(tmp_path):
  config = settings(tmp_path, "python_stdlib", num_prompts=2, prompt_tokens=5, shards=1)
  run(config)
  assert [len(r["documents"][0]["tokens"]) - 5 for r in read_records(config.output)] == [NEW] * 2
  with pytest.raises(UserError, match="how many prompts"):
    run(settings(tmp_path, "python_stdlib", "other"))


def test_another_run_is_refused(whole, tmp_path):
  data, _ = whole
  config = settings(tmp_path, data)
  run(config)
  with pytest.raises(UserError, match=r"temperature is 1\.0 there and 0.5 here"):
    run(dataclasses.replace(config, temperature=0.5))
  with pytest.raises(UserError, match="target is"):
    run(config, lm(seed=1))
  other = questions(tmp_path, 6)
  with pytest.raises(UserError, match="prompts is"):
    run(dataclasses.replace(config, data=other))
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").write_text("x")
  with pytest.raises(UserError, match="holds something else"):
    run(settings(tmp_path, data, "full"))
  path = tmp_path / "out" / "shard-00000-of-00002.jsonl"
  with open(path, "a") as file:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="being written by another process"):
      run(config)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(UserError, match=r"holds 2 of 3 prompts|not valid JSON"):
    regenerated_corpus(config.output, lm().tokenizer)


@pytest.mark.parametrize(
  ("line", "complaint"),
  [
    ("{", r"p\.jsonl, line 2: not valid JSON"),
    ('{"text": "x"}', "line 2: expected"),
    ('{"prompt": ""}', "line 2: expected"),
    ('{"messages": [{"role": "system", "content": "x"}]}', "line 2: no message has the role"),
  ],
)
def test_mistakes_in_the_prompts(tmp_path, line, complaint):
  (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n' + line + "\n")
  with pytest.raises(UserError, match=complaint):
    run(settings(tmp_path, str(tmp_path / "p.jsonl")))
  assert not (tmp_path / "out").exists()


def test_other_mistakes(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    run(settings(tmp_path, str(tmp_path / "none.jsonl")))
  data = write(tmp_path / "p.jsonl", [{"messages": talk(("user", "x"))}])
  bare = LM(lm().model, lm().params, Tokenizer(lm().tokenizer.backend))
  with pytest.raises(UserError, match="has no chat template"):
    run(settings(tmp_path, data), bare)
  for options, complaint in (
    ({"process_id": 2}, r"process_id must be in 0\.\.0"),
    ({"num_processes": 3}, "3 processes need as many files"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
  ):
    with pytest.raises(UserError, match=complaint):
      settings(tmp_path, data, **options)
