# SPDX-License-Identifier: Apache-2.0
"""Beam search against a search in plain Python, and what diversity does."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import compilations, generate
from jaxdec.decoding.lossy import generate_beams
from jaxdec.errors import UserError
from tests.decoding.targets import Letters, target

VOCAB, EOS = 7, (2,)
PROMPTS = [[1, 3, 4, 1, 3], [5], [6, 4, 3] * 4]  # ragged, one of length 1
NEW = 5


@functools.cache
def forward(kind):
  model, params = target(kind, VOCAB, eos=EOS)
  run = jax.jit(
    lambda tokens: jax.nn.log_softmax(model.apply({"params": params}, tokens).logits, axis=-1)
  )

  @functools.cache
  def log_p(text):
    """log p of the token after ``text``: the stateless forward pass, no cache."""
    return np.asarray(run(jnp.asarray([[*text, *[0] * (32 - len(text))]]))[0, len(text) - 1])

  return log_p


def search(kind, prompt, width, groups, diversity, alpha, stops):
  """The rules of the module, text by text: ``[(rank, score, group, tokens)]``."""
  log_p, size = forward(kind), width // groups
  beams = [[(0.0, ())] for _ in range(groups)]
  pools, done = [[] for _ in range(groups)], [False] * groups
  for step in range(NEW):
    taken = np.zeros(VOCAB)
    for g in range(groups):
      if done[g]:
        continue
      options = []
      for i, (score, text) in enumerate(beams[g]):
        p = log_p((*prompt, *text))
        for v in range(VOCAB):
          options.append((-(score + p[v] - diversity * taken[v]), i, v, score + p[v], (*text, v)))
      options.sort()
      for _, _, v, score, text in options[:size]:
        if v in stops:
          pools[g].append((score / (step + 1) ** alpha, score, g, list(text)))
      beams[g] = [(score, text) for _, _, v, score, text in options if v not in stops][:size]
      pools[g] = sorted(pools[g], key=lambda x: -x[0])[:size]
      done[g] = len(pools[g]) == size or not beams[g]
      if not done[g]:
        for _, text in beams[g]:
          taken[text[-1]] += 1
  for g in range(groups):
    if len(pools[g]) < size:
      pools[g] += [(s / NEW**alpha, s, g, list(text)) for s, text in beams[g]]
      pools[g] = sorted(pools[g], key=lambda x: -x[0])[:size]
  return sorted((text for pool in pools for text in pool), key=lambda x: -x[0])


def run(kind="attention", prompts=PROMPTS, **options):
  model, params = target(kind, VOCAB, eos=EOS)
  return generate_beams(model, params, prompts, max_new_tokens=NEW, **options)


@pytest.mark.parametrize(
  "kind, width, groups, diversity, alpha, stop",
  [
    ("attention", 3, 1, 0.0, 0.0, [0, 1, 3]),
    ("attention", 6, 3, 0.7, 1.0, [4]),
    ("hybrid", 4, 2, 0.5, 0.5, [0, 6]),  # several stop ids: beams finish all the time
    ("linear", 3, 1, 0.0, 1.0, None),
    pytest.param("recurrent", 4, 4, 1.0, 0.0, [0], marks=pytest.mark.slow),
  ],
)
def test_equals_a_search_text_by_text(kind, width, groups, diversity, alpha, stop):
  out = run(kind, width=width, groups=groups, diversity=diversity, length_penalty=alpha, stop=stop)
  stops = () if stop is None else (*EOS, *stop)
  for i, prompt in enumerate(PROMPTS):
    expected = search(kind, prompt, width, groups, diversity, alpha, stops)
    assert out.tokens[i] == [text for *_, text in expected]
    assert out.groups[i] == [g for _, _, g, _ in expected]
    np.testing.assert_allclose(out.ranks[i], [r for r, *_ in expected], rtol=1e-4)
    np.testing.assert_allclose(out.scores[i], [s for _, s, *_ in expected], rtol=1e-4)
  if stop is not None:
    assert any(len(t) < NEW for row in out.tokens for t in row), "no text finished early"


def test_a_wide_beam_finds_the_most_probable_text():
  """Width V covers every text of two tokens: exhaustive search."""
  model, params = target("attention", VOCAB)
  out = generate_beams(model, params, PROMPTS, max_new_tokens=2, width=VOCAB)
  for i, prompt in enumerate(PROMPTS):
    p = forward("attention")(tuple(prompt))
    total = {
      (v, w): p[v] + forward("attention")((*prompt, v))[w]
      for v in range(VOCAB)
      for w in range(VOCAB)
    }
    assert tuple(out.tokens[i][0]) == max(total, key=total.get)


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_one_beam_is_greedy_decoding(kind):
  model, params = target(kind, VOCAB, eos=EOS)
  plain = generate(model, params, PROMPTS, max_new_tokens=NEW)
  for alpha in (0.0, 2.0):
    out = run(kind, width=1, length_penalty=alpha)
    assert [row[0] for row in out.tokens] == plain.tokens


def test_groups():
  """The first is plain beam search of its size; without a penalty so are all; a large one keeps
  their tokens apart at every step."""
  plain = run(width=2, stop=None)
  for diversity in (0.0, 0.6, 1e4):
    out = run(width=6, groups=3, diversity=diversity, stop=None)
    for i in range(len(PROMPTS)):
      by_group = [[t for t, g in zip(out.tokens[i], out.groups[i]) if g == j] for j in range(3)]
      assert by_group[0] == plain.tokens[i]
      if diversity == 0:
        assert by_group[1] == by_group[2] == plain.tokens[i]
      if diversity == 1e4:
        for step in range(NEW):
          sets = [{text[step] for text in texts} for texts in by_group]
          assert not sets[0] & sets[1] and not (sets[0] | sets[1]) & sets[2]
  # The negative control: a mild penalty lets groups share tokens somewhere.
  mild = run(width=6, groups=3, diversity=0.1, stop=None)
  assert any(len({text[s] for text in row}) < len(row) for row in mild.tokens for s in range(NEW))


def test_ties_go_to_the_lower_beam_and_token():
  """With all parameters zero every token is equally likely."""
  model, params = target("attention", VOCAB)
  flat = jax.tree.map(jnp.zeros_like, params)
  out = generate_beams(model, flat, [[1, 2]], max_new_tokens=2, width=3)
  assert out.tokens == [[[0, 0], [0, 1], [0, 2]]]
  np.testing.assert_allclose(out.scores, [[-2 * np.log(VOCAB)] * 3], rtol=1e-5)


def test_rows_do_not_see_their_neighbours_and_nothing_compiles_twice():
  options = dict(width=4, groups=2, diversity=0.5)
  together = run(**options)
  alone = [run(prompts=[p], **options).tokens[0] for p in PROMPTS]
  assert alone == together.tokens
  before = compilations()
  again = run(**{**options, "diversity": 0.9})
  assert compilations() == before
  assert len(again.tokens) == 3


def test_text_and_mistakes():
  model, params = target("attention", VOCAB, eos=EOS)
  out = generate_beams(model, params, ["bdeb", "f"], max_new_tokens=3, width=2, tokenizer=Letters())
  assert out.text == [[Letters().decode(t) for t in row] for row in out.tokens]
  for options, message in [
    ({"width": 4, "groups": 3}, "multiple of groups"),
    ({"diversity": -1.0}, "diversity"),
    ({"length_penalty": float("nan")}, "length_penalty"),
    ({"width": 99}, "vocabulary has 7"),
    ({"stop": "x"}, "tokenizer"),
    ({"prompts": []}, "empty"),
  ]:
    before = compilations()
    with pytest.raises(UserError, match=message):
      run(**options)
    assert compilations() == before
