# SPDX-License-Identifier: Apache-2.0
"""Speculative Jacobi decoding keeps the law of whole texts; a mixture of its variants doesn't."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import SpeculativeJacobi, get
from jaxdec.drafting.jacobi import UNKNOWN
from jaxdec.errors import UserError
from tests.decoding.chi_square import chi_square_p
from tests.decoding.targets import target

V, NEW, ROWS, PROMPT = 4, 4, 8192, [1, 3]
SAMPLED = Sampler(temperature=0.7)


@functools.cache
def law():
  """The probability of every text of NEW tokens after the prompt."""
  model, params = target(vocab=V)
  texts = np.array([[*PROMPT, *t] for t in itertools.product(range(V), repeat=NEW)])

  @jax.jit
  def log_probs(params, texts):
    logits = model.apply({"params": params}, texts).logits
    return jax.nn.log_softmax(logits / SAMPLED.temperature, axis=-1)

  found = np.asarray(log_probs(params, jnp.asarray(texts)), np.float64)
  at = np.arange(len(PROMPT) - 1, len(PROMPT) + NEW - 1)
  picked = found[np.arange(len(texts))[:, None], at, texts[:, len(PROMPT) :]]
  return np.exp(picked.sum(axis=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(SpeculativeJacobi):
  """Keeps the tokens that were not judged, with the laws of the pass that did not draw them."""

  def observe(self, params, state, tree, accepted, output, context):
    kept, drawn = (
      dataclasses.replace(SpeculativeJacobi(num_drafts=self.num_drafts, unjudged=how)).observe(
        params, state, tree, accepted, output, context
      )
      for how in ("keep", "redraw")
    )
    return kept.replace(law=drawn.law)


def run(drafter, rows=ROWS, **options):
  return generate(
    *target(vocab=V), [PROMPT] * rows, max_new_tokens=NEW, stop=None, sampler=SAMPLED,
    drafter=drafter, rule="ratio", **options,
  )  # fmt: skip


def p_value(out):
  counts = np.bincount(np.asarray(out.tokens) @ V ** np.arange(NEW)[::-1], minlength=V**NEW)
  assert abs(law().sum() - 1) < 1e-5
  return chi_square_p(counts, law() / law().sum())


@pytest.mark.parametrize("drafter", [
  SpeculativeJacobi(num_drafts=3),
  SpeculativeJacobi(num_drafts=3, unjudged="keep", fill="repeat"),
])  # fmt: skip
def test_texts_have_the_law(drafter):
  out = run(drafter)
  assert p_value(out) > 1e-4
  assert out.stats.tokens_per_step > 1.2
  # What is still in the window has a law, UNKNOWN has none.
  window = out.drafter_state
  total = np.asarray(window.law.sum(axis=-1))
  np.testing.assert_allclose(total, np.asarray(window.tokens) != UNKNOWN, atol=1e-5)


def test_keeping_tokens_under_new_laws_breaks_it():
  assert p_value(run(Mixed(num_drafts=3))) < 1e-6


def test_options():
  assert get("sjd").num_nodes == 17
  with pytest.raises(UserError, match="'redraw' or 'keep'"):
    SpeculativeJacobi(unjudged="mix")
  with pytest.raises(UserError, match="num_drafts >= 1"):
    SpeculativeJacobi(num_drafts=0)
