# SPDX-License-Identifier: Apache-2.0
"""The acceptance rules on made-up laws: exact ones are exact, broken ones are seen to be broken."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import verify
from jaxdec.decoding.sampling import Sampler, gumbel, position_keys, request_keys
from jaxdec.decoding.verify import (
  Match,
  Ratio,
  TypicalLossy,
  get_rule,
  match_whole_tree,
  rejection,
)
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.tree import chain
from jaxdec.errors import UserError
from tests.decoding.chi_square import chi_square_p
from tests.decoding.trees import random_tree

ROWS = 200_000
PLAIN = Sampler(temperature=1.0)


@functools.cache
def laws(vocab: int = 7) -> tuple[jax.Array, jax.Array]:
  """Target logits after 0, 1, 2 drafts and draft logits, [3, V] and [2, V]."""
  keys = jax.random.split(jax.random.key(3))
  return jax.random.normal(keys[0], (3, vocab)) * 1.5, jax.random.normal(keys[1], (2, vocab)) * 1.5


def rows(x: jax.Array, n: int = ROWS) -> jax.Array:
  return jnp.broadcast_to(x, (n, *x.shape))


def law_of(logits, sampler=PLAIN) -> np.ndarray:
  return np.exp(np.asarray(sampler.log_probs(logits), np.float64))


def first_counts(verdict, vocab: int = 7) -> np.ndarray:
  return np.bincount(np.asarray(verdict.tokens[:, 0]), minlength=vocab)


def sampled_chain(q_logits, sampler, keys, length, depth=2):
  """Drafts really drawn from q, one law per depth."""
  positions = length[:, None] + 1 + jnp.arange(depth)
  logits = rows(q_logits[:depth], len(length))
  drafts = sampler.draw_independently(logits, keys, positions)
  q = jnp.exp(sampler.log_probs(logits))
  return chain(jnp.zeros(len(length), jnp.int32), drafts, draft_probs=q)


# Arrays are arguments, not closures: XLA would fold constants of this size at compile time.
@functools.partial(jax.jit, static_argnames=("rule", "sampler"))
def decide(rule, tree, logits, keys, length, sampler=PLAIN):
  return rule(tree, logits, sampler, keys, length)


@functools.partial(jax.jit, static_argnames=("sampler", "draft_sampler", "tamper"))
def speculate(p, q, keys, length, *, sampler=PLAIN, draft_sampler=PLAIN, tamper=None):
  """Drafts from q, judges with p by rule ratio; ``tamper`` breaks the tree in between."""
  tree = sampled_chain(q, draft_sampler, keys, length, len(q))
  tree = tree if tamper is None else tamper(tree, q)
  return Ratio()(tree, rows(p, len(keys)), sampler, keys, length)


# --- match --------------------------------------------------------------------------------------


@functools.cache
def random_case(nodes: int, depth: int, vocab: int = 3, b: int = 500):
  """Random trees with logits that equal texts share, as a target gives them (a hash of the path).

  A small vocabulary: many matches, many duplicate siblings.
  """

  @jax.jit
  def build(rng):
    keys = jax.random.split(rng, 3)
    tokens = jax.random.randint(keys[0], (b, nodes - 1), 0, vocab)
    tree = random_tree(keys[1], jnp.zeros(b, jnp.int32), tokens, depth)
    text = jnp.zeros((b, nodes), jnp.int32)
    for _ in range(depth):
      text = jnp.take_along_axis(text, tree.parent, axis=1) * 4 + tree.tokens + 1
      text = text.at[:, 0].set(0)
    return tree, jax.random.normal(keys[2], (4 ** (depth + 1), vocab))[text]

  return build(jax.random.key(nodes))


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.8, top_p=0.7)])
@pytest.mark.parametrize("nodes, depth", [(1, 1), (11, 4)])
def test_match_equals_its_whole_tree_specification(sampler, nodes, depth):
  tree, logits = random_case(nodes, depth)
  request, length = request_keys(1, 500), jnp.arange(500, dtype=jnp.int32) % 50
  got = decide(Match(), tree, logits, request, length, sampler)
  want = jax.jit(match_whole_tree, static_argnums=2)(tree, logits, sampler, request, length)
  np.testing.assert_array_equal(got.count, want.count)
  inside = np.arange(tree.max_depth + 1) < np.asarray(got.count)[:, None]
  np.testing.assert_array_equal(np.where(inside, got.tokens, 0), np.where(inside, want.tokens, 0))
  np.testing.assert_array_equal(got.path, want.path)
  if nodes > 4:
    assert int(got.count.max()) >= 3  # the case is not vacuous


def test_logits_of_a_node_judge_its_children():
  tree = chain(jnp.asarray([5]), jnp.asarray([[1, 2, 3]]))
  logits = jnp.zeros((1, 4, 6)).at[0, [0, 1, 2, 3], [1, 2, 3, 4]].set(9.0)
  for rule in (Match(), Ratio(), TypicalLossy()):
    out = rule(tree, logits, Sampler(), request_keys(0, 1), jnp.asarray([3]))
    assert out.count.tolist() == [4] and out.tokens.tolist() == [
      [1, 2, 3, 4]
    ]  # bonus: the last row
    assert out.path.tolist() == [[0, 1, 2, 3]]
  wrong = Match()(
    tree, jnp.roll(logits, 1, axis=1), Sampler(), request_keys(0, 1), jnp.asarray([3])
  )
  assert wrong.count.tolist() == [1]  # off by one row: nothing is accepted unverified


def test_token_ids_survive_low_precision():
  """Ids above 256 are not exact in bfloat16: they must never pass through a tensor of floats."""
  ids = [257, 777, 999]
  tree = chain(jnp.asarray([301]), jnp.asarray([ids[:2]]))
  logits = jax.nn.one_hot(jnp.asarray([ids]), 1001, dtype=jnp.bfloat16) * 30
  out = Match()(tree, logits, Sampler(), request_keys(0, 1), jnp.asarray([5]))
  assert out.tokens.tolist() == [ids] and out.tokens.dtype == jnp.int32


def test_match_has_the_law_with_duplicate_siblings_and_node_keys_do_not():
  p, _ = laws()
  tree = StaticTree.from_paths([(0,), (1,), (2,), (0, 0), (1, 0), (2, 0)]).tree(
    rows(jnp.asarray([0, 2, 2, 2, 4, 4, 4]), ROWS)
  )
  depth = np.asarray(tree.depth[0])
  logits = rows(p[depth])
  length = jnp.zeros(ROWS, jnp.int32)
  keys = request_keys(0, ROWS)
  out = decide(Match(), tree, logits, keys, length)
  assert chi_square_p(first_counts(out), law_of(p[0])) > 1e-4
  second = np.asarray(out.tokens[:, 1])[np.asarray(out.count) > 1]
  assert chi_square_p(np.bincount(second, minlength=7), law_of(p[1])) > 1e-4

  # Negative control: one key per node, the deepest path wins; duplicates then get several tries.
  @jax.jit
  def node_keys(tree, logits, keys):
    own = position_keys(keys, jnp.broadcast_to(jnp.arange(7), (ROWS, 7)))
    drawn = argmax(logits + gumbel(own, 7))
    hit = (tree.tokens == jnp.take_along_axis(drawn, tree.parent, axis=1)).at[:, 0].set(True)
    on = hit & jnp.take_along_axis(hit, tree.parent, axis=1)
    best = argmax(jnp.where(on, tree.depth, -1))
    path = verify.path_to(tree, best)
    return verify.Verdict(
      path,
      jnp.take_along_axis(tree.depth, best[:, None], 1)[:, 0] + 1,
      jnp.take_along_axis(drawn, path, axis=1),
    )

  wrong = node_keys(tree, logits, keys)
  second = np.asarray(wrong.tokens[:, 1])[np.asarray(wrong.count) > 1]
  assert chi_square_p(np.bincount(second, minlength=7), law_of(p[1])) < 1e-6


def test_noise_differs_from_step_to_step():
  p, _ = laws()
  tree = chain(jnp.zeros(40, jnp.int32), jnp.zeros((40, 1), jnp.int32))
  keys = jnp.repeat(request_keys(0, 1), 40)  # one request at 40 lengths
  out = Match()(tree, rows(p[:2], 40), PLAIN, keys, jnp.arange(40))
  assert len(set(out.tokens[:, 0].tolist())) > 2


# --- ratio --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [PLAIN, Sampler(temperature=0.7, top_k=4)])
def test_ratio_has_the_law_and_accepts_the_overlap(sampler):
  p, q = laws()
  keys, length = request_keys(2, ROWS), jnp.full(ROWS, 9)

  out = speculate(p, q, keys, length, sampler=sampler, draft_sampler=sampler)
  assert chi_square_p(first_counts(out), law_of(p[0], sampler)) > 1e-4
  count = np.asarray(out.count)
  second = np.asarray(out.tokens[:, 1])[count > 1]
  assert chi_square_p(np.bincount(second, minlength=7), law_of(p[1], sampler)) > 1e-4
  third = np.asarray(out.tokens[:, 2])[count > 2]  # the bonus
  assert chi_square_p(np.bincount(third, minlength=7), law_of(p[2], sampler)) > 1e-4
  # Joint law of the first two tokens where both came from this pass: no shared uniform.
  pairs = np.bincount(np.asarray(out.tokens[:, 0] * 7 + out.tokens[:, 1])[count > 1], minlength=49)
  accepted_first = np.minimum(law_of(p[0], sampler), law_of(q[0], sampler))
  joint = np.outer(accepted_first / accepted_first.sum(), law_of(p[1], sampler)).ravel()
  assert chi_square_p(pairs, joint) > 1e-4
  overlap = accepted_first.sum()
  error = np.sqrt(overlap * (1 - overlap) / ROWS)
  assert abs((count > 1).mean() - overlap) < 4 * error


def unprocessed_q(tree, q):
  """q without the top-k the drafts were drawn with."""
  raw = rows(jax.nn.softmax(q), len(tree.tokens))
  return tree.replace(draft_probs=jnp.concatenate([tree.draft_probs[:, :1], raw], axis=1))


def best_tokens(tree, q):
  """The likeliest token, verified as if it had been drawn."""
  return tree.replace(tokens=tree.tokens.at[:, 1:].set(jnp.argmax(q, axis=-1)[None]))


@pytest.mark.parametrize("tamper", [unprocessed_q, best_tokens])
def test_negative_controls_fail(tamper):
  p, q = laws()
  keys, length = request_keys(4, ROWS), jnp.zeros(ROWS, jnp.int32)
  # The target keeps its whole law; only the drafts are drawn with a top-k.
  draft_sampler = Sampler(temperature=1.0, top_k=3)
  wrong = speculate(p, q, keys, length, draft_sampler=draft_sampler, tamper=tamper)
  assert chi_square_p(first_counts(wrong), law_of(p[0])) < 1e-6
  right = speculate(p, q, keys, length, draft_sampler=draft_sampler)
  assert chi_square_p(first_counts(right), law_of(p[0])) > 1e-4


def test_drafts_made_with_the_targets_noise_match_more_often_and_keep_the_law():
  p, q = laws()
  keys, length = request_keys(6, ROWS), jnp.zeros(ROWS, jnp.int32)
  drafts = jax.jit(PLAIN.draw)(rows(q), keys, length[:, None] + 1 + jnp.arange(2))
  out = decide(Match(), chain(length, drafts), rows(p), keys, length)
  assert chi_square_p(first_counts(out), law_of(p[0])) > 1e-4
  distance = 0.5 * np.abs(law_of(p[0]) - law_of(q[0])).sum()
  rate = (np.asarray(out.count) > 1).mean()
  assert rate > (1 - distance) / (1 + distance)  # the coupling's bound
  assert rate > (law_of(p[0]) * law_of(q[0])).sum() + 0.05  # what independent noise would give


def test_self_draft_is_always_accepted():
  p, _ = laws()
  keys, length = request_keys(0, ROWS), jnp.zeros(ROWS, jnp.int32)
  assert (np.asarray(speculate(p, p[:2], keys, length).count) == 3).mean() >= 0.999


def test_disjoint_drafts_are_never_accepted_and_the_law_survives():
  p = jnp.where(jnp.arange(7) < 3, laws()[0], -jnp.inf)
  q = jnp.where(jnp.arange(7) >= 3, laws()[1], -jnp.inf)
  keys, length = request_keys(0, ROWS), jnp.zeros(ROWS, jnp.int32)
  out = speculate(p, q, keys, length)
  assert np.all(np.asarray(out.count) == 1)
  assert chi_square_p(first_counts(out), law_of(p[0])) > 1e-4


def test_zero_probability_is_rejected_even_at_u_equal_zero(monkeypatch):
  monkeypatch.setattr(rejection, "_uniform", lambda keys, k: jnp.zeros(keys.shape))
  p = jnp.asarray([[[0.0, -jnp.inf, 0.0], [0.0, 0.0, 0.0]]])
  tree = chain(jnp.asarray([0]), jnp.asarray([[1]]), draft_probs=jnp.asarray([[[0.0, 1.0, 0.0]]]))
  assert Ratio()(tree, p, PLAIN, request_keys(0, 1), jnp.asarray([0])).count.tolist() == [1]


def test_q_underflow_gives_no_nan():
  p = jnp.asarray([[[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]])
  tree = chain(jnp.asarray([0]), jnp.asarray([[1]]), draft_probs=jnp.zeros((1, 1, 3)))
  out = Ratio()(tree, p, PLAIN, request_keys(0, 1), jnp.asarray([0]))
  assert 0 <= int(out.tokens[0, 0]) < 3
  same = jnp.exp(PLAIN.log_probs(p[:, :1]))  # p = q and rejected: the residual is empty
  out = Ratio()(
    chain(jnp.asarray([0]), jnp.asarray([[1]]), jnp.asarray([[False]]), same),
    p,
    PLAIN,
    request_keys(0, 1),
    jnp.asarray([0]),
  )
  assert out.count.tolist() == [1] and 0 <= int(out.tokens[0, 0]) < 3


def nothing_valid(tree, q):
  return tree.replace(valid=tree.valid.at[:, 1:].set(False))


def test_a_draft_that_was_not_made_leaves_the_target_law():
  p, q = laws()
  keys, length = request_keys(8, ROWS), jnp.zeros(ROWS, jnp.int32)
  out = speculate(p, q, keys, length, tamper=nothing_valid)
  assert np.all(np.asarray(out.count) == 1)
  assert chi_square_p(first_counts(out), law_of(p[0])) > 1e-4


def test_ratio_refuses_trees_and_fixed_drafts():
  tree = chain(jnp.asarray([0]), jnp.asarray([[1, 2]]))
  logits = jnp.zeros((1, 3, 5))
  with pytest.raises(UserError, match="draft_probs"):
    Ratio()(tree, logits, PLAIN, request_keys(0, 1), jnp.asarray([0]))


# --- typical ------------------------------------------------------------------------------------


def test_typical_is_marked_lossy_and_is_greedy_at_zero_temperature():
  assert not TypicalLossy.lossless and "lossy" in TypicalLossy.name
  assert Match.lossless and Ratio.lossless
  tree, logits = random_case(11, 4)
  args = (tree, logits, Sampler(), request_keys(1, 500), jnp.zeros(500, jnp.int32))
  for x, y in zip(jax.tree.leaves(TypicalLossy()(*args)), jax.tree.leaves(Match()(*args))):
    np.testing.assert_array_equal(x, y)


def test_typical_threshold():
  log_p = jnp.log(jnp.asarray([0.7, 0.25, 0.05]))
  tree = StaticTree.from_paths([(0,), (1,), (0, 0), (1, 0)]).tree(jnp.asarray([[0, 2, 1, 0, 1]]))
  logits = jnp.broadcast_to(log_p, (1, 5, 3))
  args = (tree, logits, PLAIN, request_keys(0, 1), jnp.zeros(1, jnp.int32))
  entropy = float(-(jnp.exp(log_p) * log_p).sum())
  # 0.25 passes and 0.05 does not: path 0 -> 2 (token 1) -> 4 (token 1), then the argmax.
  out = TypicalLossy(epsilon=0.1, delta=0.1 * np.exp(entropy) * 2)(*args)
  assert out.count.tolist() == [3] and out.path.tolist() == [[0, 2, 4]]
  assert out.tokens.tolist() == [[1, 1, 0]]
  # Everything passes: among the deepest paths the most probable, (0.25, 0.25) against (0.05, 0.7).
  out = TypicalLossy(epsilon=0.01, delta=1.0)(*args)
  assert out.path.tolist() == [[0, 2, 4]]
  certain = TypicalLossy(epsilon=1 - 1e-6, delta=1e9)(*args)
  assert certain.count.tolist() == [1]


def test_rules_by_name():
  assert get_rule("match") == Match() and get_rule(Ratio()) == Ratio()
  with pytest.raises(UserError, match="did you mean 'match'"):
    get_rule("mach")
