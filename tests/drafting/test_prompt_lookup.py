# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup against a Python reference, and at work."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import Context, PromptLookup
from jaxdec.errors import UserError
from tests.decoding.targets import target


def reference(ids, config):
  """Drafts for one text; what the released code does where the flags say so."""
  size, m = len(ids), config.num_drafts
  for n in range(config.ngram_max, config.ngram_min - 1, -1):
    starts = [i + n for i in range(size - n) if ids[i : i + n] == ids[size - n :]]
    if not config.partial:
      starts = [s for s in starts if s + m <= size]
    if starts:
      start = starts[-1] if config.most_recent else starts[0]
      return ids[start : start + m]
  return []


@pytest.mark.parametrize("config", [
  PromptLookup(num_drafts=4, ngram_min=1), PromptLookup(num_drafts=1, ngram_max=1, ngram_min=1),
  PromptLookup(num_drafts=5, ngram_max=4, ngram_min=2),
  PromptLookup(num_drafts=3, ngram_min=1, most_recent=False, partial=False),
  PromptLookup(num_drafts=6, ngram_min=1, partial=False),
])  # fmt: skip
def test_drafts_equal_the_reference(config):
  rng = np.random.default_rng(0)
  width, batch = 23, 64
  history = rng.integers(0, 3, (batch, width)).astype(np.int32)
  size = rng.integers(1, width - 1, batch)
  context = Context(
    root=jnp.asarray(history[np.arange(batch), size - 1]),
    length=jnp.asarray(size - 1, jnp.int32),
    history=jnp.asarray(history),
    target=None,
    sampler=None,
  )
  tree, _ = jax.jit(lambda c: config.propose(None, (), c, None))(context)
  drafts = config.has_draft(None, (), context)
  assert tree.tokens.shape == (batch, config.num_nodes)
  found = 0
  for b in range(batch):
    want = reference(history[b, : size[b]].tolist(), config)
    got = tree.tokens[b, 1:][tree.valid[b, 1:]].tolist()
    assert got == want
    found += bool(want)
    assert bool(drafts[b]) == bool(want)
  assert 0 < found < batch


def test_several_matches_make_a_tree():
  config = PromptLookup(num_drafts=5, num_matches=3, ngram_max=1, ngram_min=1)
  text = [7, 1, 2, 7, 1, 3, 7]  # after 7 came 1 2 and 1 3
  history = jnp.asarray([text + [0] * 5], jnp.int32)
  context = Context(
    root=history[:, 6], length=jnp.asarray([6]), history=history, target=None, sampler=None
  )
  tree, _ = config.propose(None, (), context, None)
  paths = {}
  for i in range(6):
    if tree.valid[0, i]:
      paths[i] = (*paths.get(int(tree.parent[0, i]), ()), int(tree.tokens[0, i])) if i else ()
  spelled = set(paths.values())
  assert {(1,), (1, 2), (1, 3)} <= spelled
  assert tree.tokens[0].tolist().count(1) <= 2


def test_no_match_is_a_plain_step_and_output_is_unchanged():
  model, params = target()
  prompts = [[1, 2, 3, 4, 5, 6], [9]]
  options = dict(max_new_tokens=30, sampler=Sampler(temperature=1.0), stop=None, seed=1)
  plain = generate(model, params, prompts, **options)
  out = generate(model, params, prompts, **options, drafter="prompt_lookup")
  assert out.tokens == plain.tokens
  assert out.stats.tokens_per_step >= 1.0
  context = Context(
    root=jnp.asarray([6]),
    length=jnp.asarray([5]),
    history=jnp.asarray([prompts[0]]),
    target=None,
    sampler=None,
  )
  tree, _ = PromptLookup().propose(None, (), context, None)
  assert tree.valid.tolist() == [[True] + [False] * 5]


def test_steps_without_a_match_run_as_plain_decoding():
  """The drafter is not even asked: one that proposes nonsense where it has no draft goes unseen."""

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Never(PromptLookup):
    def has_draft(self, params, state, context):
      return jnp.zeros(context.root.shape, bool)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Always(PromptLookup):
    def has_draft(self, params, state, context):
      return jnp.ones(context.root.shape, bool)

  model, params = target()
  prompts = [[1, 2, 1, 2, 1, 2], [9, 8, 9, 8]]
  options = dict(max_new_tokens=25, stop=None)
  plain = generate(model, params, prompts, **options)
  never = generate(model, params, prompts, **options, drafter=Never())
  always = generate(model, params, prompts, **options, drafter=Always())
  some = generate(model, params, prompts, **options, drafter=PromptLookup())
  assert never.tokens == always.tokens == some.tokens == plain.tokens
  assert never.stats.tokens_per_step == 1.0
  assert always.stats.tokens_per_step > 1.0
  assert some.stats.tokens_per_step > 1.0


def test_copying_reaches_the_whole_chain():
  """A target whose next token depends on the last one only repeats itself: all drafts are right."""
  model, params = target()
  params = {**params, "layers_0": {**params["layers_0"]}}
  params["layers_0"]["mixer"] = jax.tree.map(lambda x: x * 0, params["layers_0"]["mixer"])
  plain = generate(model, params, [[3, 1]], max_new_tokens=80, stop=None)
  prompt = [3, 1, *plain.tokens[0][:39]]
  drafter = PromptLookup(num_drafts=4, most_recent=False)  # an early match: a full continuation
  out = generate(model, params, [prompt], max_new_tokens=41, stop=None, drafter=drafter)
  assert out.tokens[0] == plain.tokens[0][39:]
  assert out.stats.tokens_per_step == 5.0


def test_bad_options_are_named():
  for options in ({"num_drafts": 0}, {"ngram_min": 5}, {"num_matches": 0}):
    with pytest.raises(UserError, match="prompt_lookup"):
      PromptLookup(**options)
