# SPDX-License-Identifier: Apache-2.0
"""One token under a constraint: unbiased weights, the conditional law, and counted calls."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from jaxdec.decoding.lossy.awrs import geometric, simple
from tests.decoding.chi_square import chi_square_p

P = np.asarray([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
OK = np.asarray([False, True, False, True, True, False])
DRAWS = 20_000
VARIANTS = {
  "simple": None,
  "two": (2, None),
  "four": (4, None),
  "limited": (2, 3),
}


def orders(rng, p, number):
  keyed = np.log(p) + rng.gumbel(size=(number, p.size))
  return [[(int(t), float(p[t])) for t in np.argsort(-row)] for row in keyed]


def draw(rng, how, p=P, ok=OK.__getitem__):
  if how is None:
    return simple(orders(rng, p, 1)[0], ok)
  return geometric(orders(rng, p, how[0]), ok, rng, how[1])


@functools.cache
def sample(variant):
  rng = np.random.default_rng(7)
  drawn = [draw(rng, VARIANTS[variant]) for _ in range(DRAWS)]
  token = np.asarray([-1 if d.token is None else d.token for d in drawn])
  return token, np.asarray([d.weight for d in drawn])


def errors_from(values, expected):
  """How many standard errors the mean of ``values [N, V]`` is off."""
  error = np.maximum(values.std(0) / np.sqrt(len(values)), 1e-9)
  return np.max(np.abs(values.mean(0) - expected) / error)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_unbiased(variant):
  """``E[w; token = t] = p(t) ok(t)``, and so ``E[w] = Z``."""
  token, weight = sample(variant)
  here = token[:, None] == np.arange(P.size)
  assert errors_from(here * weight[:, None], P * OK) < 4.5
  assert errors_from(weight[:, None], (P * OK).sum()) < 4.5
  # The negative control: with every weight 1.
  assert errors_from(here, P * OK) > 20


@pytest.mark.parametrize("variant", ["simple", "two", "four"])
def test_tokens_follow_the_conditional_law(variant):
  token, _ = sample(variant)
  counts = np.bincount(token, minlength=P.size)
  law = P * OK / (P * OK).sum()
  assert chi_square_p(counts, law) > 1e-4
  tilted = np.sqrt(law)
  assert chi_square_p(counts, tilted / tilted.sum()) < 1e-4  # the negative control


def test_more_orders_estimate_better():
  assert sample("four")[1].std() < 0.9 * sample("two")[1].std()


@pytest.mark.parametrize("how", VARIANTS.values())
def test_calls_are_counted_and_limits_are_met(how):
  rng = np.random.default_rng(1)
  for _ in range(200):
    asked = []

    def ok(token, asked=asked):
      asked.append(token)
      return bool(OK[token])

    drawn = draw(rng, how, ok=ok)
    assert drawn.calls == len(asked) == len(set(asked))
    rejected = sum(not OK[t] for t in asked)
    if how is None:  # the rejects before it, the token, the one after it
      assert OK[asked[-2]] and drawn.token == asked[-2] and not any(OK[asked[:-2]])
    assert how is None or how[1] is None or rejected <= how[1]
    assert 0 <= drawn.weight <= 1
    # Nothing passes: no token, weight 0; everything passes: weight 1, and no rejects.
    nothing = draw(rng, how, ok=lambda t: False)
    assert nothing.token is None and nothing.weight == 0
    everything = draw(rng, how, ok=lambda t: True)
    assert everything.weight == 1 and everything.calls <= max(2, 0 if how is None else how[0])


def test_the_last_token_and_rounding():
  """The only token to pass comes last; probabilities that add up to more than 1."""
  assert simple([(0, 0.9), (1, 0.1)], lambda t: t == 1).weight == pytest.approx(0.1)
  p = np.float32([1.0, 1e-9, 1e-9])
  for how in VARIANTS.values():
    drawn = draw(np.random.default_rng(0), how, p, lambda t: t == 2)
    assert drawn.token in (2, None) and 0 <= drawn.weight < 1e-3
