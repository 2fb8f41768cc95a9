# SPDX-License-Identifier: Apache-2.0
"""N-gram counts by hand, and superposed drafts against a search in plain Python."""

from __future__ import annotations

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import compilations, generate
from jaxdec.decoding.lossy import build_ngrams, generate_superposed
from jaxdec.decoding.lossy.superposed import UNSUPPORTED, interpolate
from jaxdec.errors import UserError
from tests.decoding.targets import target

PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5], [7, 8, 9, 10] * 3]
NEW, TAU = 6, 0.5
LAMBDA = (0.1, 0.3, 0.6)


def corpus(seed=0, vocab=13):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, vocab, n).tolist() for n in (150, 1, 2, 90)]


def probability(texts, context, token):
  """P_n(token | context) by counting in the texts."""
  n, seen = len(context), collections.Counter()
  for text in texts:
    for i in range(len(text) - n):
      if text[i : i + n] == list(context):
        seen[text[i + n]] += 1
  return seen[token] / max(sum(seen.values()), 1)


def mixture(texts, text, token):
  return sum(
    LAMBDA[n - 1] * probability(texts, text[-n:], token)
    for n in range(1, len(LAMBDA) + 1)
    if len(text) >= n
  )


def test_ngrams_are_counts():
  texts = corpus(vocab=4)
  ngrams = build_ngrams(texts, 3)
  rng = np.random.default_rng(1)
  context = rng.integers(0, 5, (40, 3))  # 4 is never seen
  context[:3, 0] = -1  # a prompt shorter than the context
  tokens = np.tile(np.arange(5), (40, 1))
  got = ngrams(jnp.asarray(context), jnp.asarray(tokens), jnp.asarray(LAMBDA))
  expected = [
    [mixture(texts, [t for t in row.tolist() if t >= 0], v) for v in range(5)] for row in context
  ]
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert np.any(got == 0) and np.any(got > 0)
  nothing = build_ngrams([[1], []], 2)(jnp.zeros((1, 2), int), jnp.zeros((1, 1), int), jnp.ones(2))
  assert nothing.tolist() == [[0.0]]


def test_interpolation():
  log_pi = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
  g = jnp.asarray([[0.0, 0.2, 0.1]])
  np.testing.assert_array_equal(interpolate(log_pi, g, 0.0), log_pi)
  np.testing.assert_allclose(
    jnp.exp(interpolate(log_pi, g, 0.4)), jnp.exp(log_pi) ** 0.6 * g**0.4, rtol=1e-5
  )
  np.testing.assert_allclose(interpolate(log_pi, 0 * g, 0.4), 0.6 * log_pi + UNSUPPORTED)


def run(kind="attention", prompts=PROMPTS, **options):
  model, params = target(kind, eos=(0,))
  defaults = dict(max_new_tokens=NEW, temperature=TAU, top=6)
  return generate_superposed(model, params, prompts, **{**defaults, **options})


@functools.cache
def from_embeddings(kind):
  """The token embeddings; logits of whole texts given by theirs."""
  model, params = target(kind, eos=(0,))

  @jax.jit
  def forward(x):
    where = jnp.ones(x.shape[:2], bool)
    zeros = jnp.zeros(x.shape[:2], jnp.int32)
    return model.apply({"params": params}, zeros, embeddings=(x, where)).logits[0]

  return np.asarray(params["embed"]), forward


def search(kind, prompt, k, m, alpha, texts):
  """The rules of the module by whole forward passes over embeddings: ``[(score, tokens)]``."""
  embed, forward = from_embeddings(kind)
  inputs, drafts, over = [embed[t] for t in prompt], [(0.0, [])], []
  for step in range(NEW):
    x = np.zeros((1, 32, embed.shape[1]), np.float32)
    x[0, : len(inputs)] = inputs
    z = np.asarray(forward(jnp.asarray(x))[len(inputs) - 1])
    ids = np.argsort(-z, kind="stable")[:m]
    p = np.exp((z[ids] - z.max()) / TAU)
    log_pi = np.log(p / p.sum())
    options = []
    for i, (score, text) in enumerate(drafts):
      g = np.asarray([mixture(texts, prompt + text, v) for v in ids.tolist()])
      with np.errstate(divide="ignore"):
        log_f = (1 - alpha) * log_pi + (alpha * np.log(g) if g.any() else -200.0)
      log_f = log_pi if step == 0 or alpha == 0 else log_f
      options += [(-(score + f), i, j, [*text, int(ids[j])]) for j, f in enumerate(log_f)]
    options = sorted(o for o in options if np.isfinite(o[0]))
    over += [(-o[0], o[3]) for o in options[:k] if o[3][-1] == 0]
    over = sorted(over, key=lambda x: -x[0])[:k]
    drafts = [(-o[0], o[3]) for o in options if o[3][-1] != 0][:k]
    if len(over) == k or not drafts:
      break
    gamma = np.exp(np.asarray([s for s, _ in drafts]) - drafts[0][0])
    inputs.append((gamma / gamma.sum()) @ embed[[t[-1] for _, t in drafts]])
  if len(over) < k:
    over = sorted(over + drafts, key=lambda x: -x[0])[:k]
  return over


@pytest.mark.parametrize(
  "kind, alpha",
  [
    ("attention", 0.54),
    ("hybrid", 0.3),
    pytest.param("recurrent", 0.0, marks=pytest.mark.slow),
  ],
)
def test_equals_a_search_draft_by_draft(kind, alpha):
  texts = corpus()
  out = run(kind, drafts=3, alpha=alpha, weights=LAMBDA, ngrams=build_ngrams(texts, 3))
  for i, prompt in enumerate(PROMPTS):
    expected = search(kind, prompt, 3, 6, alpha, texts)
    assert out.tokens[i] == [text for _, text in expected]
    np.testing.assert_allclose(out.scores[i], [s for s, _ in expected], rtol=1e-3, atol=1e-3)
    assert out.scores[i] == sorted(out.scores[i], reverse=True) and max(out.scores[i]) <= 0
    assert len({tuple(t) for t in out.tokens[i]}) == len(out.tokens[i])
  assert out.passes <= NEW - 1


@pytest.mark.parametrize("kind", ["attention", pytest.param("linear", marks=pytest.mark.slow)])
def test_one_draft_without_ngrams_is_greedy(kind):
  model, params = target(kind, eos=(0,))
  greedy = generate(model, params, PROMPTS, max_new_tokens=NEW)
  assert [row[0] for row in run(kind, drafts=1).tokens] == greedy.tokens


def test_rows_do_not_see_their_neighbours_and_nothing_compiles_twice():
  options = dict(drafts=2, weights=LAMBDA, ngrams=build_ngrams(corpus(), 3))
  together = run(**options)
  assert [run(prompts=[p], **options).tokens[0] for p in PROMPTS[:2]] == together.tokens[:2]
  before = compilations()
  run(**options, alpha=0.1, temperature=2.0, stop=3)
  assert compilations() == before


def test_mistakes_are_named_before_compiling():
  ngrams = build_ngrams(corpus(), 3)
  for options, message in [
    ({"drafts": 7}, "drafts <= top"),
    ({"top": 14}, "vocabulary"),
    ({"alpha": 2.0}, "alpha"),
    ({"temperature": 0.0}, "temperature"),
    ({"ngrams": ngrams}, "weights has 5"),
  ]:
    before = compilations()
    with pytest.raises(UserError, match=message):
      run(**options)
    assert compilations() == before
  with pytest.raises(UserError, match="text 0"):
    build_ngrams([[0.5]])
