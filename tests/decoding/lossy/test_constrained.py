# SPDX-License-Identifier: Apache-2.0
"""Sequences under a constraint: their law against enumeration, and the rest of the contract."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, compilations, generate
from jaxdec.decoding.lossy import generate_constrained
from jaxdec.errors import UserError
from tests.decoding.targets import target

PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5], [7, 8, 9, 10] * 3]
PLAIN = Sampler(temperature=1.0)
NEW = 9


@dataclasses.dataclass
class Only:
  """Tokens of a set; what a state was at each call is recorded."""

  tokens: tuple = tuple(range(13))
  calls: int = 0

  def start(self):
    return 0

  def allows(self, state, token):
    self.calls += 1
    return token in self.tokens

  def advance(self, state, token):
    return state + 1


class Even:
  """Texts of three tokens whose sum is even and that never hold token 1 twice in a row."""

  def start(self):
    return ()

  def allows(self, state, token):
    text = (*state, token)
    if text[-2:] == (1, 1):
      return False
    return len(text) < 3 or sum(text) % 2 == 0

  def advance(self, state, token):
    return (*state, token)


def run(kind="attention", prompts=PROMPTS, constraint=None, **options):
  model, params = target(kind, eos=(0,))
  defaults = dict(max_new_tokens=NEW, seed=3)
  return generate_constrained(
    model, params, prompts, constraint=constraint or Only(), **{**defaults, **options}
  )


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_without_a_constraint_one_particle_is_plain_sampling(kind):
  model, params = target(kind, eos=(0,))
  plain = generate(model, params, PROMPTS, max_new_tokens=NEW, sampler=PLAIN, seed=3)
  constraint = Only()
  out = run(kind, constraint=constraint, variant="simple")
  assert [row[0] for row in out.tokens] == plain.tokens
  assert out.log_evidence == [0.0] * 3 and out.weights == [[1.0]] * 3
  assert sum(out.calls) == constraint.calls == 2 * sum(map(len, plain.tokens))
  assert [row[0] for row in out.complete] == [t[-1] == 0 for t in plain.tokens]
  few = run(kind, constraint=Only((0, 2, 3)))
  assert {t for row in few.tokens for t in row[0]} <= {0, 2, 3}
  assert all(e < 0 for e in few.log_evidence)


def exact(prompt, vocab=4):
  """``{text: p(text)}`` of the three-token texts that satisfy ``Even``."""
  model, params = target("attention", vocab)
  texts = list(itertools.product(range(vocab), repeat=3))
  logits = jax.jit(lambda t: model.apply({"params": params}, t).logits)(
    jnp.asarray([[*prompt, *text] for text in texts])
  )
  log_p = jax.nn.log_softmax(logits)[:, len(prompt) - 1 : -1]
  p = jnp.exp(jnp.take_along_axis(log_p, jnp.asarray(texts)[..., None], axis=-1).sum((1, 2)))
  good = lambda t: sum(t) % 2 == 0 and (1, 1) not in (t[:2], t[1:])  # noqa: E731
  return {t: float(x) for t, x in zip(texts, p) if good(t)}


@pytest.mark.parametrize("variant, particles", [("simple", 1), ("geometric", 6)])
def test_weighted_texts_have_the_law_of_the_model_given_the_constraint(variant, particles):
  model, params = target("attention", 4)
  rows, prompt = 600 // particles, [1, 3, 2]
  law = exact(prompt)
  out = generate_constrained(
    model,
    params,
    [prompt] * rows,
    constraint=Even(),
    max_new_tokens=3,
    particles=particles,
    variant=variant,
    stop=None,
    seed=11,
  )
  # Unbiased: the mean over rows of Z * weight of a text is its probability under the model.
  index = {text: i for i, text in enumerate(law)}
  mass, plain = np.zeros((rows, len(law))), np.zeros(len(law))
  for row in range(rows):
    for text, weight in zip(out.tokens[row], out.weights[row]):
      if weight > 0:
        mass[row, index[tuple(text)]] += np.exp(out.log_evidence[row]) * weight
        plain[index[tuple(text)]] += 1
  p = np.asarray(list(law.values()))
  error = mass.std(0) / np.sqrt(rows) + 1e-3 * p.max()
  assert np.max(np.abs(mass.mean(0) - p) / error) < 4.5
  z = mass.sum(1)
  assert abs(z.mean() - p.sum()) < 4.5 * z.std() / np.sqrt(rows)
  # The negative control: without weights the law is another.
  if particles == 1:
    counts = plain / plain.sum()
    noise = np.sqrt(counts * (1 - counts) / plain.sum()) + 1e-3
    assert np.max(np.abs(counts - p / p.sum()) / noise) > 4.5


def test_dead_ends():
  out = run(constraint=Only(()), particles=2)
  assert out.tokens == [[[], []]] * 3 and out.weights == [[0.0, 0.0]] * 3
  assert out.log_evidence == [-np.inf] * 3 and not np.any(out.complete) and out.passes == 0
  one = run(constraint=[Only(()), Only(), Only()], particles=2, stop=None)
  assert one.tokens[0] == [[], []] and {len(t) for row in one.tokens[1:] for t in row} == {NEW}


def test_rows_do_not_see_their_neighbours_and_nothing_compiles_twice():
  options = dict(constraint=Only((0, 2, 3, 9)), particles=3)
  together = run(**options, seed=[4, 5, 6])
  for i in range(2):
    alone = run(prompts=[PROMPTS[i]], **options, seed=[4, 5, 6][i])
    assert alone.tokens[0] == together.tokens[i]
    np.testing.assert_allclose(alone.weights[0], together.weights[i], rtol=1e-4)
    assert alone.log_evidence[0] == pytest.approx(together.log_evidence[i], rel=1e-4)
  # Tokens fetched one at a time are the same ones.
  slow = run(**options, seed=[4, 5, 6], pull=1)
  assert slow.tokens == together.tokens and slow.weights == together.weights
  before = compilations()
  run(constraint=Only((1, 2)), particles=3, stop=[4])
  assert compilations() == before


def test_mistakes_are_named_before_compiling():
  for options, message in [
    ({"sampler": Sampler()}, "temperature"),
    ({"variant": "best"}, "variant"),
    ({"particles": 0}, "particles"),
    ({"max_accepts": 1}, "max_accepts"),
    ({"constraint": [Only()] * 2}, "2 constraints for 3 prompts"),
  ]:
    before = compilations()
    with pytest.raises(UserError, match=message):
      run(**options)
    assert compilations() == before
