# SPDX-License-Identifier: Apache-2.0
"""Regular expressions and JSON schemas as constraints."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from jaxdec.decoding.lossy import generate_constrained
from jaxdec.decoding.lossy.grammar import json_schema, regex
from jaxdec.errors import UserError
from jaxdec.io.tokenizers import load_tokenizer
from jaxdec.lm import TINY
from tests.decoding.targets import Letters, target

pytest.importorskip("llguidance")


def follow(constraint, tokens):
  """How many tokens are allowed, and the state after them."""
  state = constraint.start()
  for i, token in enumerate(tokens):
    if not constraint.allows(state, token):
      return i, state
    state = constraint.advance(state, token)
  return len(tokens), state


@pytest.fixture(scope="module")
def tiny():
  """The embedded model's tokenizer, and a configuration of its size."""
  tokenizer = load_tokenizer(str(TINY))
  config = dataclasses.replace(
    target()[0].config, vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids
  )
  return tokenizer, config


def test_texts_match_the_pattern():
  model, params = target("attention", eos=(0,))
  pattern = "(bc|d)+e"
  constraint = regex(pattern, Letters(), model.config)
  out = generate_constrained(
    model,
    params,
    ["bcd", "e"],
    constraint=constraint,
    max_new_tokens=12,
    particles=4,
    tokenizer=Letters(),
    seed=1,
  )
  finished = 0
  for texts, complete, weights in zip(out.tokens, out.complete, out.weights):
    for tokens, ended, weight in zip(texts, complete, weights):
      if ended:
        finished += 1
        assert tokens[-1] == 0 and re.fullmatch(pattern, Letters().decode(tokens[:-1]))
      elif weight:
        assert len(tokens) == 12 and not re.fullmatch(".*e.", Letters().decode(tokens))
  assert finished
  # Every token has been asked for in vain or not; the state before is as it was.
  state = constraint.start()
  assert [constraint.allows(state, t) for t in range(13)] == [t in (1, 3) for t in range(13)]
  after = constraint.advance(state, 1)
  assert [t for t in range(13) if constraint.allows(after, t)] == [2]
  assert [t for t in range(13) if constraint.allows(state, t)] == [1, 3]


def test_json_schema_by_the_bytes_of_tokens(tiny):
  tokenizer, config = tiny
  schema = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
  }
  constraint = json_schema(schema, tokenizer, config)
  end = config.eos_ids[0]
  good = tokenizer.encode(
    json.dumps({"name": "Zoë ☃", "age": 7}, ensure_ascii=False), add_special=False
  )
  count, state = follow(constraint, good)
  assert count == len(good) and constraint.allows(state, end)
  for i in range(len(good)):
    assert not constraint.allows(follow(constraint, good[:i])[1], end)
  for bad in ('{"name": 3', '{"age": "x"', "[1]", '{"name": "a", "age": 7.5}', '{"other": 1'):
    tokens = tokenizer.encode(bad, add_special=False)
    assert follow(constraint, tokens)[0] < len(tokens)
  assert follow(json_schema(json.dumps(schema), tokenizer, config), good)[0] == len(good)


def test_mistakes(tiny):
  tokenizer, config = tiny
  for make, message in [
    (lambda: regex("a(", tokenizer, config), "invalid"),
    (lambda: json_schema({"type": "bogus"}, tokenizer, config), "bogus"),
    (lambda: json_schema("{", tokenizer, config), "not JSON"),
    (lambda: json_schema({"a": {1}}, tokenizer, config), "not JSON"),
    (lambda: regex("a", Letters(), target()[0].config), "EOS"),
  ]:
    with pytest.raises(UserError, match=message):
      make()
