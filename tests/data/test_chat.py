# SPDX-License-Identifier: Apache-2.0
"""Chat templates: exactly the assistant's tokens are learned, whatever the template looks like."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from jaxdec.data import Corpus, make_dataset
from jaxdec.data.chat import (
  ChatTemplate,
  Conversation,
  chat_corpus,
  conversation_files,
  encode,
  end_texts,
  read_conversations,
)
from jaxdec.data.mixture import load_data
from jaxdec.errors import UserError
from jaxdec.io.tokenizers import Tokenizer
from jaxdec.lm import TINY

SPECIAL = [
  "<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "<s>", "</s>",
  "<turn>", "</turn>",
]  # fmt: skip

CHATML = """{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HEADERS = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|header|>' + m.role + '<|/header|>\\n\\n' + m.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}"""

# No generation prompt at all: the answer follows its question.
BRACKETS = """{% for m in messages %}{% if m.role == 'user' %}
{{- '<s>[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}
{{- ' ' + m.content + ' </s>' }}{% else %}
{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""

# Reasoning of earlier turns is dropped once another question follows.
THINKING = """{% set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- set text = m.content %}
{%- if m.role == 'assistant' and loop.index0 < ns.last %}
{%- set text = text.split('</think>')[-1] %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MARKED = """{% for m in messages %}<turn>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</turn>{% endgeneration %}
{% else %}{{ m.content }}</turn>
{% endif %}{% endfor %}"""


@functools.cache
def tokenizer(template=CHATML, eos=("<|im_end|>", "<|eot|>", "</s>", "</turn>")):
  import tokenizers

  backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
  backend.add_special_tokens(SPECIAL)
  config = {"bos_token": "<|begin|>", "chat_template": template}
  ids = [backend.token_to_id(t) for t in eos]
  return Tokenizer(backend, eos_ids=ids, extras={"tokenizer_config.json": json.dumps(config)})


def talk(*contents, system=None):
  roles = ["user", "assistant"] * len(contents)
  messages = [{"role": r, "content": c} for r, c in zip(roles, contents)]
  if system:
    messages = [{"role": "system", "content": system}, *messages]
  return Conversation(messages)


def expected(*pieces):
  """Ids and mask of texts that are the assistant's where marked with True."""
  ids, mask = [], []
  for text, answer in pieces:
    piece = tokenizer().backend.encode(text, add_special_tokens=False).ids
    ids += piece
    mask += [answer] * len(piece)
  return ids, mask


def check(template, conversation, *documents):
  t = tokenizer(template)
  spans = ChatTemplate.of(t).spans(conversation, end_texts(t))
  assert len(spans) == len(documents)
  for span, pieces in zip(spans, documents):
    assert span.text == "".join(text for text, _ in pieces)
    ids, mask = encode(t, span)
    want_ids, want_mask = expected(*pieces)
    assert ids == want_ids
    assert mask.tolist() == want_mask


Q1, A1, Q2, A2 = "Sort x in Python?", "Use sorted(x).\n", "And reversed?", "sorted(x)[::-1] é"


def test_roles_between_marks():
  check(
    CHATML,
    talk(Q1, A1, Q2, A2, system="Be brief."),
    [
      ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + Q1 + "<|im_end|>\n"
       "<|im_start|>assistant\n", False),
      (A1 + "<|im_end|>", True),
      ("\n<|im_start|>user\n" + Q2 + "<|im_end|>\n<|im_start|>assistant\n", False),
      (A2 + "<|im_end|>", True),
    ],
  )  # fmt: skip


def test_a_question_after_the_last_answer_is_no_part_of_it():
  check(
    CHATML,
    Conversation([*talk(Q1, A1).messages, {"role": "user", "content": Q2}]),
    [
      ("<|im_start|>user\n" + Q1 + "<|im_end|>\n<|im_start|>assistant\n", False),
      (A1 + "<|im_end|>", True),
    ],
  )


def test_headers_and_trimmed_contents():
  head = "<|header|>user<|/header|>\n\n"
  check(
    HEADERS,
    talk(Q1, A1, Q2, A2),
    [
      ("<|begin|>" + head + Q1 + "<|eot|><|header|>assistant<|/header|>\n\n", False),
      (A1.strip() + "<|eot|>", True),
      (head + Q2 + "<|eot|><|header|>assistant<|/header|>\n\n", False),
      (A2 + "<|eot|>", True),
    ],
  )


def test_a_template_without_generation_prompts():
  t = tokenizer(BRACKETS)
  (span,) = ChatTemplate.of(t).spans(talk(Q1, A2, Q2, "No."), end_texts(t))
  assert span.text == f"<s>[INST] {Q1} [/INST] {A2} </s><s>[INST] {Q2} [/INST] No. </s>"
  assert [span.text[a:b] for a, b in span.answers] == [f" {A2} </s>", " No. </s>"]
  ids, mask = encode(t, span)
  learned = t.backend.decode([i for i, m in zip(ids, mask) if m], skip_special_tokens=False)
  assert learned == f" {A2} </s> No. </s>"
  with pytest.raises(UserError, match=r"the conversation: .*refuses.*only user and assistant"):
    ChatTemplate.of(t).spans(talk(Q1, A1, system="Be brief."))


def test_a_template_that_rewrites_the_past_gives_each_answer_its_own_prompt():
  think = "<think>hm</think>"
  ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
  check(
    THINKING,
    talk(Q1, think + A1, Q2, think + A2),
    [(ask.format(Q1), False), (think + A1 + "<|im_end|>", True)],
    [
      (ask.format(Q1) + A1 + "<|im_end|>\n" + ask.format(Q2), False),
      (think + A2 + "<|im_end|>", True),
    ],
  )


def test_a_header_that_no_prompt_shows_is_not_learned():
  check(
    CHATML.partition("{%- if add")[0],
    talk(Q1, A1),
    [
      ("<|im_start|>user\n" + Q1 + "<|im_end|>\n<|im_start|>assistant\n", False),
      (A1 + "<|im_end|>", True),
    ],
  )


def test_marked_blocks_decide():
  check(
    MARKED,
    talk(Q1, A1, Q2, A2),
    [
      ("<turn>user\n" + Q1 + "</turn>\n<turn>assistant\n", False),
      (A1 + "</turn>", True),
      ("<turn>user\n" + Q2 + "</turn>\n<turn>assistant\n", False),
      (A2 + "</turn>", True),
    ],
  )


def write(path, *records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
  return path


def conversations(tmp_path, count=12):
  records = [
    {"messages": list(talk(f"What is {i}?", f"It is {'very ' * i}{i}.", "Sure?", "Yes.").messages)}
    for i in range(count)
  ]
  return write(tmp_path / "chats.jsonl", *records)


@pytest.mark.parametrize("seq_len", [16, 33, 256])
def test_masks_survive_packing_and_cutting(tmp_path, seq_len):
  """Every token of every document is in one place, and counts there as it did in its document."""
  corpus = chat_corpus(read_conversations(conversations(tmp_path)), tokenizer())
  assert 0 < corpus.labels.sum() < len(corpus.tokens)
  # A document's index beside each token, so that a token's place is known.
  places = Corpus(
    np.arange(len(corpus.tokens), dtype=np.int32), corpus.offsets, labels=corpus.labels
  )
  settings = dict(batch_size=2, seq_len=seq_len, seed=3, num_epochs=1)
  seen = []
  for batch in make_dataset(places, **settings):
    real = batch["segment_ids"] > 0
    first = real & (batch["positions"] == 0)
    np.testing.assert_array_equal(
      batch["loss_mask"], real & ~first & corpus.labels[batch["tokens"]]
    )
    seen += batch["tokens"][real].tolist()
  assert sorted(seen) == list(range(len(corpus.tokens)))


def test_labels_are_part_of_the_fingerprint():
  docs = [[1, 2, 3, 4]]
  plain = Corpus.from_token_lists(docs)
  masks = [Corpus.from_token_lists(docs, labels=[m]) for m in ([0, 0, 1, 1], [0, 1, 1, 1])]
  assert len({plain.fingerprint, *(m.fingerprint for m in masks)}) == 3
  assert plain.fingerprint == Corpus.from_token_lists([np.array(docs[0])]).fingerprint


def test_splits_are_disjoint_and_complete(tmp_path):
  path = conversations(tmp_path, 80)
  sizes = [
    len(chat_corpus(read_conversations(path), tokenizer(), split))
    for split in ("train", "validation", "test", "all")
  ]
  assert sum(sizes[:3]) == sizes[3] == 80 and sizes[0] > 60


def test_todays_date_is_no_part_of_a_document():
  template = ChatTemplate("{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}-")
  assert template.render(talk(Q1)) == "-"


def test_templates_run_in_a_sandbox():
  for attack in ("''.__class__.__mro__[1].__subclasses__()", "messages.append(1)"):
    with pytest.raises(UserError, match="refuses these messages"):
      ChatTemplate("{{ " + attack + " }}").render(talk(Q1))


def test_the_files_of_a_model_folder(tmp_path):
  assert ChatTemplate.of(tokenizer()).source == CHATML
  both = Tokenizer(
    tokenizer().backend,
    extras={"tokenizer_config.json": '{"chat_template": "a"}', "chat_template.jinja": "b"},
  )
  assert ChatTemplate.of(both).source == "b"
  named = [{"name": "rag", "template": "c"}, {"name": "default", "template": "d"}]
  config = json.dumps({"chat_template": named, "eos_token": {"content": "<e>"}})
  several = ChatTemplate.of(
    Tokenizer(tokenizer().backend, extras={"tokenizer_config.json": config})
  )
  assert several.source == "d" and several.special == {"eos_token": "<e>"}


def test_which_files_hold_conversations(tmp_path):
  chats = conversations(tmp_path)
  (tmp_path / "a note.txt").write_text("x")
  assert conversation_files(chats) == conversation_files(tmp_path) == [chats]
  (tmp_path / "text").mkdir()
  text = write(tmp_path / "text" / "text.jsonl", {"text": "x"})
  assert conversation_files(text) == conversation_files(text.parent) == []
  assert conversation_files(tmp_path / "none.jsonl") == []
  more = write(tmp_path / "more.jsonl", {"messages": list(talk(Q1, A1).messages)})
  assert conversation_files(tmp_path) == [chats, more]
  assert len(load_data(str(tmp_path), "all", tokenizer())) == 13


@pytest.mark.parametrize(
  ("line", "complaint"),
  [
    ("{", r"chats\.jsonl, line 2: not valid JSON"),
    ("[1]", r"line 2: expected a JSON object, got list"),
    ('{"text": "x"}', "line 2: 'messages' must be a list"),
    ('{"messages": []}', "line 2: 'messages' must be a list with one message"),
    ('{"messages": ["hi"]}', "line 2: message 1 must be an object"),
    ('{"messages": [{"role": "user", "content": 3}]}', "line 2: .*must be text, got int"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: no message has the role"),
    (
      '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}',
      "line 2: an assistant message is empty",
    ),
    ('{"messages": [{"role": "user", "content": "\\ufdd0"}]}', "line 2: .*no characters"),
  ],
)
def test_mistakes_are_one_sentence_with_file_and_line(tmp_path, line, complaint):
  path = tmp_path / "chats.jsonl"
  path.write_text(json.dumps({"messages": list(talk(Q1, A1).messages)}) + "\n" + line + "\n")
  with pytest.raises(UserError, match=complaint) as caught:
    chat_corpus(read_conversations(path), tokenizer())
  assert "\n" not in str(caught.value)


def test_other_mistakes(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    next(read_conversations(tmp_path / "none.jsonl"))
  with pytest.raises(UserError, match="the model folder has no chat template"):
    ChatTemplate.of(Tokenizer(tokenizer().backend))
  with pytest.raises(UserError, match="line 2: not a valid template"):
    ChatTemplate("\n{% for %}", where="chat_template.jinja")
  with pytest.raises(UserError, match="does not show message 2 as it stands"):
    ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}").spans(talk(Q1, A1))
