# SPDX-License-Identifier: Apache-2.0
"""Several sources in one tree: alone they stay themselves, and who is right gets the room."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import (
  Candidates,
  Combined,
  EarlyExit,
  PromptLookup,
  Source,
  Suffix,
  TokenRecycling,
  get,
)
from jaxdec.drafting.base import Accepted, Prompt
from jaxdec.errors import UserError
from tests.decoding.targets import target
from tests.drafting.spelled import context_of, spelled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Says(Source):
  """Lists its parameters ``[R, L]`` on every row, each prefix with the same stated probability."""

  paths: int = 2
  length: int = 3
  boast: float = 0.5
  passes: bool = True

  name: ClassVar[str] = "says"

  num_nodes = property(lambda self: self.paths * self.length + 1)
  max_depth = property(lambda self: self.length)
  num_candidates = property(lambda self: self.paths)
  may_pass = property(lambda self: self.passes)

  def candidates(self, params, state, context, rng):
    batch = context.root.shape[0]
    tokens = jnp.broadcast_to(params, (batch, *params.shape))
    some = jnp.broadcast_to(context.root[:, None, None] > 0, tokens.shape)
    return Candidates(tokens, some, jnp.full(tokens.shape, self.boast))


def _begin(drafter, params, batch):
  prompt = Prompt(jnp.zeros((batch, 4), jnp.int32), jnp.ones(batch, jnp.int32), jnp.zeros(batch))
  return drafter.start(params, drafter.init_state(batch, 8), prompt, None, None)


@pytest.mark.parametrize("source", [
  PromptLookup(num_drafts=5, num_matches=3, ngram_min=1), Suffix(num_drafts=6), Suffix(mode="path"),
])  # fmt: skip
def test_one_source_stays_what_it_is(source):
  rng = np.random.default_rng(0)
  context = context_of([rng.integers(0, 2, n).tolist() for n in (1, 4, 9, 20, 30)], 47)
  alone = Combined(sources=(source,), size=source.num_nodes)
  state = _begin(alone, None, 5)
  state = state.replace(hits=state.hits.at[:, :, 1].set(0.1))  # no rival: no record matters
  key = jax.random.key(0)
  tree, _ = jax.jit(alone.propose)(None, state, context, key)
  want, _ = source.propose(None, (), context, None)
  for row in range(5):
    assert spelled(tree, row) == spelled(want, row)
  assert len(spelled(tree, 4)) > 3
  assert alone.may_pass
  has = alone.has_draft(None, state, context)
  np.testing.assert_array_equal(has, source.has_draft(None, (), context))
  assert not has[0]


def test_records_follow_the_formula_and_the_right_source_wins():
  """A boaster that is always wrong against a modest source that is always right; rows apart."""
  right = jnp.asarray([[1, 2, 3], [1, 5, 6]])
  wrong = jnp.asarray([[4, 4, 4], [8, 8, 8]])
  drafter = Combined(sources=(Says(boast=0.9), Says(boast=0.1)), size=4, rate=0.1)
  params = (wrong, right)
  context = context_of([[1], [1]], 6)
  state = _begin(drafter, params, 2)
  propose = jax.jit(drafter.propose)
  hits, hoped = np.full((2, 3), 0.5), np.full((2, 3), 0.5)
  for step in range(30):
    tree, state = propose(params, state, context, jax.random.key(step))
    if step == 0:
      assert all({p[0] for p in spelled(tree, row)} == {4, 8} for row in (0, 1))
    # Row 0 is given 1 2 7; row 1 has finished: nothing is learned there.
    accepted = Accepted(None, jnp.asarray([3, 0]), None, jnp.asarray([[1, 2, 7, 0]] * 2))
    state = drafter.observe(params, state, tree, accepted, None, context)
    for source, depth, hit, hope in (
      (0, 0, 0, 0.9 * 2),  # two guesses, both wrong; nothing below them is judged
      (1, 0, 1, 0.1), (1, 1, 1, 1.0 + 1.0), (1, 2, 0, 1.0),  # 2 and 5 after 1; 3 after 1 2
    ):  # fmt: skip
      hits[source, depth] += 0.1 * (hit - hits[source, depth])
      hoped[source, depth] += 0.1 * (hope - hoped[source, depth])
    np.testing.assert_allclose(state.hits[0], hits, atol=1e-5)
    np.testing.assert_allclose(state.hoped[0], hoped, atol=1e-5)
  np.testing.assert_array_equal(state.hits[1], 0.5)
  assert {(1,), (1, 2)} <= spelled(tree, 0) and spelled(tree, 1) <= {(4,), (8,), (4, 4), (8, 8)}


def test_probabilities_are_corrected_and_stay_ordered():
  drafter = Combined(sources=(Says(paths=1, boast=0.4), Says(paths=1, boast=0.5)), size=7)
  params = (jnp.asarray([[1, 2, 3]]), jnp.asarray([[4, 5, 6]]))
  state = _begin(drafter, params, 1)
  state = state.replace(
    hits=jnp.asarray([[[0.5, 0.25, 0.5], [0.5, 1.0, 1.5]]]), hoped=jnp.full((1, 2, 3), 0.5)
  )
  listed = drafter.candidates(params, state, context_of([[1]], 4), jax.random.key(0))
  want = [[0.4, 0.2, 0.2], [0.5, 0.5, 0.5]]  # never growing with depth
  np.testing.assert_allclose(listed.weight[0], want, rtol=1e-6)


def test_steps_are_passed_only_where_every_source_passes():
  some, always = Says(), Says(passes=False)
  both = Combined(sources=(some, PromptLookup()))
  assert both.may_pass and not Combined(sources=(some, always)).may_pass
  assert not Combined().may_pass  # Token Recycling learns from every step
  params = (jnp.zeros((2, 3), jnp.int32), None)
  context = context_of([[1, 2], [1, 0], [5, 0, 5, 0]], 9)
  state = _begin(both, params, 3)
  assert both.has_draft(params, state, context).tolist() == [True, False, True]


def test_what_sources_keep_is_kept_from_call_to_call():
  model, params = target()
  prompts = [[1, 2, 3, 4], [9]]
  options = dict(max_new_tokens=30, sampler=Sampler(temperature=1.0), stop=None, seed=[2, 3])
  suffix = Suffix(num_drafts=5, store=64, answer=32)
  drafter = Combined(sources=(suffix, TokenRecycling(size=12)), size=8)
  plain = generate(model, params, prompts, **options)
  cold = generate(model, params, prompts, **options, drafter=drafter)
  state = cold.drafter_state
  warm = generate(model, params, prompts, **options, drafter=drafter, drafter_state=state)
  assert cold.tokens == warm.tokens == plain.tokens
  assert warm.stats.tokens_per_step > cold.stats.tokens_per_step > 1.0
  other = Combined(sources=(Suffix(num_drafts=5),), size=8)
  with pytest.raises(UserError, match="2 parts, this combination 1"):
    generate(model, params, prompts, **options, drafter=other, drafter_state=state)
  with pytest.raises(UserError, match="tuple of 2, one for each of suffix, token_recycling"):
    generate(model, params, prompts, **options, drafter=drafter, drafter_params={"a": 1})


def test_bad_options_are_named():
  assert get("combined") == Combined()
  for options in ({"sources": ()}, {"sources": (EarlyExit(),)}):
    with pytest.raises(UserError, match="sources that list continuations"):
      Combined(**options)
  for options in ({"size": 1}, {"rate": 1.0}, {"prior": 0.0}):
    with pytest.raises(UserError, match="combined needs size"):
      Combined(**options)
