# SPDX-License-Identifier: Apache-2.0
"""Token Recycling: the template's transcription, the table's update, and that it learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import Context, StaticTree, TokenRecycling
from jaxdec.drafting.token_recycling import UNKNOWN, recycle, template
from jaxdec.errors import UserError
from tests.decoding.targets import target


def test_template_totals():
  full = template()
  assert full.num_nodes == 81
  assert [len(level) for level in full.levels] == [8, 21, 25, 15, 8, 3]
  assert full.max_rank == 8


@pytest.mark.parametrize("size", [2, 16, 32, 64])
def test_sub_templates_are_part_of_the_template(size):
  part = template(size)
  assert part.num_nodes == size and set(part.paths) <= set(template().paths)


def test_update_keeps_the_last_occurrence():
  rng = np.random.default_rng(0)
  vocab, k = 9, 3
  table = jnp.full((vocab, k), UNKNOWN, jnp.int32)
  tokens = rng.integers(0, 6, (2, 7))
  logits = rng.normal(size=(2, 7, vocab)).astype(np.float32)
  known = rng.random((2, 7)) > 0.3
  got = np.asarray(recycle(table, jnp.asarray(tokens), jnp.asarray(logits), jnp.asarray(known)))
  want = np.full((vocab, k), UNKNOWN)
  for token, row, ok in zip(tokens.ravel(), logits.reshape(-1, vocab), known.ravel()):
    if ok:
      want[token] = np.argsort(-row)[:k]
  np.testing.assert_array_equal(got, want)
  assert (got[6:] == UNKNOWN).all()
  again = recycle(jnp.asarray(got), jnp.asarray(tokens), jnp.asarray(logits), jnp.asarray(known))
  np.testing.assert_array_equal(again, got)  # idempotent


def test_propose_unrolls_the_table():
  drafter = TokenRecycling(tree=StaticTree.from_paths([(0,), (1,), (0, 0), (0, 1), (0, 1, 0)]))
  table = jnp.full((6, 2), UNKNOWN, jnp.int32)
  table = table.at[5].set(jnp.asarray([2, 3])).at[2].set(jnp.asarray([4, 1]))
  context = Context(
    root=jnp.asarray([5, 0]),
    length=jnp.zeros(2, jnp.int32),
    history=None,
    target=None,
    sampler=None,
  )
  tree, _ = drafter.propose(None, table, context, None)
  assert tree.tokens[0, :5].tolist() == [5, 2, 3, 4, 1]
  assert tree.valid.tolist() == [[True] * 5 + [False], [True] + [False] * 5]  # 1 and 0 are unknown


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.0)])
def test_output_is_unchanged_and_a_second_pass_is_faster(sampler):
  model, params = target()
  prompts = [[1, 2, 3, 4], [9]]
  options = dict(max_new_tokens=40, sampler=sampler, stop=None, seed=2)
  plain = generate(model, params, prompts, **options)
  drafter = TokenRecycling(size=12)
  cold = generate(model, params, prompts, **options, drafter=drafter)
  warm = generate(
    model, params, prompts, **options, drafter=drafter, drafter_state=cold.drafter_state
  )
  assert cold.tokens == warm.tokens == plain.tokens
  assert warm.stats.tokens_per_step > cold.stats.tokens_per_step >= 1.0
  third = generate(
    model, params, prompts, **options, drafter=drafter, drafter_state=cold.drafter_state
  )
  assert third.tokens == plain.tokens  # the state was copied, not consumed


def test_learning_the_prompt_fills_its_rows():
  model, params = target()
  prompt = [1, 2, 3, 4, 5, 1, 7]
  drafter = TokenRecycling(size=8, learn_prompt=True)
  out = generate(model, params, [prompt], max_new_tokens=1, stop=None, drafter=drafter)
  logits = model.apply({"params": params}, jnp.asarray([prompt])).logits[0]
  table = np.asarray(out.drafter_state)
  best = np.asarray(jax.lax.top_k(logits, drafter.width)[1])
  for i, token in enumerate(prompt):
    if token not in prompt[i + 1 :]:
      np.testing.assert_array_equal(table[token], best[i])
  assert all((table[t] == UNKNOWN).all() for t in range(13) if t not in prompt)


def test_bad_options_are_named():
  with pytest.raises(UserError, match="size=100"):
    TokenRecycling(size=100)
  with pytest.raises(UserError, match="k >= "):
    TokenRecycling(size=81, k=2)
  model, params = target()
  with pytest.raises(UserError, match="drafter_state"):
    generate(
      model,
      params,
      [[1]],
      max_new_tokens=2,
      drafter=TokenRecycling(),
      drafter_state=jnp.zeros((4, 2), jnp.int32),
    )
