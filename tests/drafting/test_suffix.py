# SPDX-License-Identifier: Apache-2.0
"""Suffix decoding against counting substrings in plain Python, and its store of answers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import Suffix, get
from jaxdec.drafting.base import Accepted, Prompt
from jaxdec.drafting.suffix import Responses
from jaxdec.errors import UserError
from tests.decoding.targets import target
from tests.drafting.spelled import context_of, estimates, spelled


def reference(sequences, text, config):
  """``(score, {prefix: probability})`` of the best draft, by counting substrings of sequences.

  ``sequences``: oldest first. Ties go to what follows the place that agrees longest with the end of
  the text, then to the latest place.
  """
  places = []  # (matched, how late, what follows)
  late = 0
  for sequence in sequences:
    for i in range(len(sequence)):
      matched = 0
      while (
        matched < min(config.context - 1, i + 1, len(text))
        and sequence[i - matched] == text[-1 - matched]
      ):
        matched += 1
      late += 1
      places.append((matched, late, sequence[i + 1 :]))
  places.sort(key=lambda p: (-p[0], -p[1]))
  best = (np.float32(0), {})
  for length in config.lengths:
    if length >= min(len(text), config.context):
      break
    found = [follows for matched, _, follows in places if matched >= length]
    if not found:
      continue
    allowed = math.floor(config.factor * length + config.offset + 1e-6)
    budget = min(config.num_drafts, allowed, config.context - length)

    def share(prefix, found=found):
      count = sum(tuple(f[: len(prefix)]) == prefix for f in found)
      return np.float32(count) / np.float32(len(found))

    def seen(prefix, found=found):  # children, in the order of the places
      n = len(prefix)
      next_ = [f[n] for f in found if tuple(f[:n]) == prefix and len(f) > n]
      return [(*prefix, t) for t in dict.fromkeys(next_)]

    draft: dict = {}
    if config.mode == "path":
      prefix = ()
      while len(draft) < budget and seen(prefix):
        prefix = max(seen(prefix), key=share)  # the first of equals
        if share(prefix) < config.floor - 1e-6:
          break
        draft[prefix] = share(prefix)
    else:

      def rank(prefix, found=found):
        return next(i for i, f in enumerate(found) if tuple(f[: len(prefix)]) == prefix)

      open_ = seen(())
      while len(draft) < budget:
        open_ = [p for p in open_ if share(p) > config.floor - 1e-6]
        if not open_:
          break
        best_one = min(open_, key=lambda p: (-share(p), len(p), rank(p)))
        open_.remove(best_one)
        draft[best_one] = share(best_one)
        open_ += seen(best_one)
    score = sum(draft.values())
    if score > best[0] - 1e-4:
      best = (max(score, best[0]), draft)
  return best


CONFIGS = [
  Suffix(num_drafts=6, context=9),
  Suffix(num_drafts=6, context=12, factor=1.0),
  Suffix(num_drafts=4, context=64, factor=2.0, offset=1.0, floor=0.3),
  Suffix(num_drafts=6, context=9, mode="path"),
  Suffix(num_drafts=5, context=7, mode="path", factor=0.5, floor=0.4, shortest=2),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_drafts_equal_counting_substrings(config):
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 3, n).tolist() for n in rng.integers(1, 40, 60)]
  texts += [(rng.integers(0, 3, 5).tolist() * 6)[: 20 + n] for n in range(8)]
  context = context_of(texts, 43)
  listed = jax.jit(lambda c: config.candidates(None, (), c, None))(context)
  tree, _ = jax.jit(lambda c: config.propose(None, (), c, None))(context)
  has = config.has_draft(None, (), context)
  drafted = 0
  for b, text in enumerate(texts):
    _, want = reference([text], text, config)
    got = estimates(listed, b)
    assert set(got) == set(want) == spelled(tree, b), text
    for prefix, probability in want.items():
      assert abs(got[prefix] - probability) < 1e-6
    assert bool(has[b]) or not want
    drafted += len(want)
  assert drafted > 60 and not all(has)


def _store(config, answers) -> Responses:
  """What the drafter's own start and observe make of some answers, one a call."""
  state = config.init_state(1, 8)
  for answer in [*answers, [0]]:
    prompt = Prompt(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.asarray(answer[:1]))
    state = config.start(None, state, prompt, None, None)
    for at in range(1, len(answer), 3):
      block = jnp.asarray([[*answer[at : at + 3], 9, 9, 9][:4]])  # the rest is garbage
      accepted = Accepted(None, jnp.asarray([len(answer[at : at + 3])]), None, block)
      state = config.observe(None, state, None, accepted, None, None)
  return state


@pytest.mark.parametrize("mode", ["tree", "path"])
def test_answers_of_earlier_calls_are_searched(mode):
  """Store against counting: it has overflowed, then an answer is removed."""
  config = Suffix(num_drafts=5, context=9, mode=mode, store=50, answer=20)
  rng = np.random.default_rng(1)
  answers = [rng.integers(0, 3, n).tolist() for n in (20, 7, 12, 1, 15, 9)]
  state = _store(config, answers)
  assert int(state.count) == 6 and state.written.tolist() == [1]
  flat = [(t, i) for i, answer in enumerate(answers) for t in answer][-50:]
  assert state.tokens.tolist() == [t for t, _ in flat]
  assert state.request.tolist() == [i for _, i in flat]
  assert len({i for _, i in flat}) == 6 and flat.count((flat[0][0], 0)) < 20  # the oldest was cut
  texts = [rng.integers(0, 3, n).tolist() for n in rng.integers(1, 12, 40)]
  context = context_of(texts, 18)
  guess = jax.jit(lambda state: config.candidates(None, state, context, None))
  from_store = 0
  for removed in (None, 2):
    kept = [[t for t, i in flat if i == n] for n in range(6) if n != removed]
    listed = guess(state if removed is None else state.without(removed))
    for b, text in enumerate(texts):
      own, past = reference([text], text, config), reference(kept, text, config)
      from_store += past[0] > own[0] + 1e-4
      _, want = own if own[0] > past[0] - 1e-4 else past
      got = estimates(listed, b)
      assert set(got) == set(want), (removed, text)
      assert all(abs(got[p] - want[p]) < 1e-6 for p in want)
  assert from_store > 40


def test_an_answer_given_before_comes_faster():
  """The same prompts again; the output is the same, and nothing is kept unless it is asked for."""
  model, params = target()
  prompts = [[1, 2, 3, 4, 5], [9]]
  options = dict(max_new_tokens=40, sampler=Sampler(temperature=1.0), stop=None, seed=[1, 2])
  plain = generate(model, params, prompts, **options)
  drafter = Suffix(num_drafts=6, store=128, answer=64)
  first = generate(model, params, prompts, **options, drafter=drafter)
  state = first.drafter_state
  for row, answer in enumerate(plain.tokens):
    assert state.writing[row, : len(answer)].tolist() == answer
  second = generate(model, params, prompts, **options, drafter=drafter, drafter_state=state)
  assert first.tokens == second.tokens == plain.tokens
  assert second.stats.tokens_per_step > 1.5 * first.stats.tokens_per_step
  assert generate(model, params, prompts, **options, drafter="suffix").drafter_state == ()
  wrong = Suffix(num_drafts=6, store=64, answer=64)
  with pytest.raises(UserError, match="store of 128 tokens"):
    generate(model, params, prompts, **options, drafter=wrong, drafter_state=state)


def test_bad_options_are_named():
  assert get("suffix", floor=0.5) == Suffix(floor=0.5)
  for options in ({"mode": "forest"}, {"floor": 0.0}, {"context": 65}, {"num_drafts": 0}):
    with pytest.raises(UserError, match="suffix needs"):
      Suffix(**options)
  with pytest.raises(UserError, match="never draft"):
    Suffix(factor=0.0)
