# SPDX-License-Identifier: Apache-2.0
"""Cautious decoding against its definition, span by span, and against plain sampling."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, compilations, generate
from jaxdec.decoding.lossy import generate_cautious
from jaxdec.decoding.lossy.cautious import MARKS, num_trials, span_ends
from jaxdec.decoding.lossy.common import TRIAL
from jaxdec.decoding.sampling import position_keys, request_keys
from jaxdec.errors import UserError
from tests.decoding.targets import target

PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5], [7, 8, 9, 10] * 3]
SAMPLER = Sampler(temperature=1.3, top_p=0.9)
ENDS = np.isin(np.arange(13), [3, 6])
NEW = 13


def run(kind="attention", prompts=PROMPTS, **options):
  model, params = target(kind, eos=(0,))
  defaults = dict(
    max_new_tokens=NEW, sampler=SAMPLER, max_trials=4, entropy=(0.3, 1.2), span=5, ends=ENDS, seed=3
  )
  return generate_cautious(model, params, prompts, **{**defaults, **options})


@functools.cache
def stateless(kind, nll):
  """``text -> logits, log-probabilities`` of the next token, and the draw from logits."""
  model, params = target(kind, eos=(0,))

  @jax.jit
  def run(tokens, last):
    logits = model.apply({"params": params}, tokens).logits[:, last]
    raw = jax.nn.log_softmax(logits)
    processed = SAMPLER.log_probs(logits)
    return logits, processed[0], raw[0]

  def laws(text):
    logits, processed, raw = run(jnp.asarray([text + [0] * (32 - len(text))]), len(text) - 1)
    return logits, np.exp(processed), np.asarray(processed if nll == "processed" else raw)

  draw = jax.jit(lambda logits, key, at: SAMPLER.draw(logits, key[None], at[None])[0])
  return laws, lambda logits, key, at: int(draw(logits, key, jnp.int32(at)))


def reference(kind, prompt, key, nll):
  """One row by the stateless forward pass: ``tokens, spans, mean nll of all trials by span``."""
  laws, draw = stateless(kind, nll)
  text, spans, costs = list(prompt), [], []
  end = len(prompt) + NEW
  while len(text) < end and (text[-1] != 0 or len(text) == len(prompt)):
    logits, p, _ = laws(text)
    entropy = -sum(x * np.log(x) for x in p if x > 0)
    n = 1 + int(3 * np.clip((entropy - 0.3) / 0.9, 0, 1))
    at = len(text)
    if n == 1:
      text.append(draw(logits, key, at))
      spans.append((1, 1))
      continue
    trials = []
    for j in range(n):
      own = jax.random.fold_in(position_keys(key[None], jnp.asarray([at]), TRIAL)[0], j)
      span, total = [], 0.0
      while True:
        logits, _, log_q = laws([*text, *span])
        token = draw(logits, own, at + len(span))
        span.append(token)
        total -= log_q[token]
        if ENDS[token] or token == 0 or len(span) == 5 or at + len(span) == end:
          break
      trials.append((total / len(span), span))
    best = min(trials, key=lambda trial: trial[0])
    text += best[1]
    spans.append((len(best[1]), n))
    costs.append([cost for cost, _ in trials])
  return text[len(prompt) :], spans, costs


@pytest.mark.parametrize(
  "kind, nll",
  [
    ("attention", "raw"),
    ("hybrid", "processed"),
    pytest.param("recurrent", "processed", marks=pytest.mark.slow),
  ],
)
def test_equals_its_definition_span_by_span(kind, nll):
  out = run(kind, nll=nll)
  keys = request_keys(3, len(PROMPTS))
  seen = []
  for i, prompt in enumerate(PROMPTS):
    tokens, spans, costs = reference(kind, prompt, keys[i], nll)
    assert out.tokens[i] == tokens and out.spans[i] == spans
    seen += costs
  assert any(min(c) < c[0] for c in seen), "the first trial always won"
  trials = {n for row in out.spans for _, n in row}
  assert len(trials) > 1 and 4 in trials
  assert kind == "recurrent" or 1 in trials  # that target is never sure


@pytest.mark.parametrize("kind", ["attention", pytest.param("linear", marks=pytest.mark.slow)])
def test_one_trial_is_plain_sampling(kind):
  model, params = target(kind, eos=(0,))
  plain = generate(model, params, PROMPTS, max_new_tokens=NEW, sampler=SAMPLER, seed=3)
  assert run(kind, max_trials=1).tokens == plain.tokens
  sure = run(kind, entropy=(50.0, 51.0))  # never so uncertain
  assert sure.tokens == plain.tokens and {n for row in sure.spans for _, n in row} == {1}
  greedy = generate(model, params, PROMPTS, max_new_tokens=NEW)
  assert run(kind, sampler=Sampler()).tokens == greedy.tokens
  assert run(kind).tokens != plain.tokens  # the negative control


def test_rows_do_not_see_their_neighbours_and_nothing_compiles_twice():
  together = run(seed=[4, 5, 6])
  alone = [run(prompts=[p], seed=s).tokens[0] for p, s in zip(PROMPTS, [4, 5, 6])]
  assert alone == together.tokens
  before = compilations()
  run(entropy=(0.1, 2.0), stop=[1, 2])
  assert compilations() == before


def test_number_of_trials_follows_entropy():
  entropy = jnp.linspace(0, 3, 301)
  n = np.asarray(num_trials(entropy, jnp.asarray([0.5, 2.0]), 10))
  assert np.all(np.diff(n) >= 0) and set(n) == set(range(1, 11))
  assert np.all(n[entropy <= 0.5] == 1) and np.all(n[entropy >= 2.0] == 10)


def test_ends_are_read_off_the_text():
  class Pieces:
    pieces = ("a", ".", " ,", ".\n", "", "a.b", "}", "b)")

    def encode(self, text):
      raise NotImplementedError

    def decode(self, tokens):
      return "".join(self.pieces[t] for t in tokens)

  assert span_ends(Pieces(), 8).tolist() == [False, True, True, True, False, False, True, True]
  assert len(MARKS) == 10


def test_mistakes_are_named_before_compiling():
  for options, message in [
    ({"entropy": (1.0, 1.0)}, "low < high"),
    ({"max_trials": 0}, "max_trials"),
    ({"span": 0}, "span"),
    ({"nll": "mean"}, "nll"),
    ({"ends": None}, "tokenizer"),
    ({"ends": np.zeros(3, bool)}, "13 bools"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
  ]:
    before = compilations()
    with pytest.raises(UserError, match=message):
      run(**options)
    assert compilations() == before
