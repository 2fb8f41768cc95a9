# SPDX-License-Identifier: Apache-2.0
"""Growing trees level by level, against enumeration of all paths."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.drafting.dynamic_tree import DynamicTree, expand_dynamic, expand_static, take_nodes
from jaxdec.drafting.static_tree import StaticTree, greedy_tree
from jaxdec.errors import UserError

VOCAB, STATES = 9, 53
ROOT = np.array([2, 7])


def table(seed=0, sharpness=2.0):
  """Logits by state; a node's state is a hash of its path, so siblings' subtrees differ."""
  return sharpness * np.random.default_rng(seed).standard_normal((STATES, VOCAB)).astype(np.float32)


def after(state, token):
  return (state * 31 + token * 17 + 5) % STATES


def step_of(logits):
  logits = jnp.asarray(logits)

  def step(state, level, tokens, parents):
    state = after(take_nodes(state, parents), tokens)
    return logits[state], state

  return step


def first(logits):
  return jnp.asarray(logits)[ROOT], jnp.asarray(ROOT)[:, None]


def log_probs(logits):
  z = logits.astype(np.float64)
  return z - np.log(np.sum(np.exp(z), -1, keepdims=True))


def all_paths(logits, root, depth):
  """Every path of up to ``depth`` tokens with its log-probability."""
  law, scores = log_probs(logits), {}
  for length in range(1, depth + 1):
    for path in itertools.product(range(VOCAB), repeat=length):
      state, score = root, 0.0
      for token in path:
        score += law[state, token]
        state = after(state, token)
      scores[path] = score
  return scores


def eagle2(logits, root, spec):
  """The reference algorithm with Python lists: candidates in creation order."""
  law = log_probs(logits)
  frontier, candidates = [((), root, 0.0)], []
  for level in range(spec.max_depth):
    new = []
    for path, state, score in frontier:
      for token in np.argsort(-law[state], kind="stable")[: spec.width]:
        new.append(((*path, int(token)), after(state, token), score + law[state, token]))
    candidates += new
    keep = (
      range(spec.width)
      if level == 0
      else sorted(range(len(new)), key=lambda i: (-new[i][2], i))[: spec.width]
    )
    frontier = [new[i] for i in keep]
  order = sorted(range(len(candidates)), key=lambda i: (-candidates[i][2], i))
  return [candidates[i][0] for i in sorted(order[: spec.num_nodes - 1])]


def paths_of(tree, row):
  tokens, parent = np.asarray(tree.tokens)[row], np.asarray(tree.parent)[row]
  paths = [()]
  for i in range(1, len(tokens)):
    assert parent[i] < i
    paths.append((*paths[parent[i]], int(tokens[i])))
  return paths[1:]


@functools.partial(jax.jit, static_argnums=1)
def grow(logits, spec):
  scores, carry = first(logits)
  return expand_dynamic(step_of(logits), carry, scores, jnp.asarray(ROOT), spec)


@pytest.mark.parametrize(
  "spec",
  [
    DynamicTree(num_nodes=5, max_depth=3, width=4),
    DynamicTree(num_nodes=16, max_depth=4, width=4),
    DynamicTree(num_nodes=20, max_depth=3, width=VOCAB),
    DynamicTree(num_nodes=4, max_depth=1, width=3),
    DynamicTree(num_nodes=6, max_depth=5, width=1),
  ],
)
def test_tree_equals_the_reference(spec):
  for seed in range(3):
    logits = table(seed)
    tree = grow(jnp.asarray(logits), spec)
    assert tree.tokens.shape == (2, spec.num_nodes) and bool(jnp.all(tree.valid))
    for row in range(2):
      paths = paths_of(tree, row)
      assert paths == eagle2(logits, ROOT[row], spec)
      assert {p[:-1] for p in paths} <= {(), *paths}  # prefix-closed
      assert len(set(paths)) == len(paths)
      np.testing.assert_array_equal(tree.depth[row], [0, *map(len, paths)])
      assert int(tree.tokens[row, 0]) == ROOT[row]


def test_tree_holds_the_best_nodes_of_all_when_small():
  """N - 1 <= k: the same set as the best N - 1 of every path (no equality beyond that)."""
  spec = DynamicTree(num_nodes=5, max_depth=4, width=4)
  for seed in range(3):
    logits = table(seed, sharpness=3.0)
    tree = grow(jnp.asarray(logits), spec)
    for row in range(2):
      scores = all_paths(logits, ROOT[row], spec.max_depth)
      best = sorted(scores, key=scores.get, reverse=True)[: spec.num_nodes - 1]
      assert set(paths_of(tree, row)) == set(best)


def test_dynamic_covers_more_mass_than_static():
  """Path probabilities sum to the expected accepted drafts: more than the best static tree's."""
  spec = DynamicTree(num_nodes=10, max_depth=4, width=4)
  mass = {"dynamic": [], "static": []}
  tables = [table(seed, 2.5) for seed in range(6)]
  ranked = np.mean([np.sort(np.exp(log_probs(t)), -1)[:, ::-1].mean(0) for t in tables], 0)
  shape = greedy_tree(np.tile(ranked, (4, 1)), spec.num_nodes)
  for logits in tables:
    scores, carry = first(logits)
    static = expand_static(step_of(logits), carry, scores, jnp.asarray(ROOT), shape)
    dynamic = grow(jnp.asarray(logits), spec)
    for row in range(2):
      law = all_paths(logits, ROOT[row], 4)
      for name, tree in (("static", static), ("dynamic", dynamic)):
        mass[name].append(sum(np.exp(law[p]) for p in paths_of(tree, row)))
  assert np.mean(mass["dynamic"]) > np.mean(mass["static"]) + 0.05


def test_static_tree_holds_the_ranked_children():
  shape = StaticTree.from_paths([(0,), (1,), (3,), (0, 0), (3, 2), (3, 0), (3, 2, 1)])
  logits = table(4)
  law = log_probs(logits)
  scores, carry = first(logits)
  tree = expand_static(step_of(logits), carry, scores, jnp.asarray(ROOT), shape)
  for row in range(2):
    for path, ranks in zip(paths_of(tree, row), shape.paths):
      state = ROOT[row]
      for token, rank in zip(path, ranks):
        assert token == np.argsort(-law[state], kind="stable")[rank]
        state = after(state, token)


def test_draft_vocabulary_and_noise():
  """``ids`` renames tokens; noise changes who is tried, not what a node is worth."""
  spec, logits = DynamicTree(num_nodes=7, max_depth=2, width=3), table(1)
  ids = jnp.arange(VOCAB) * 3 + 1
  scores, carry = first(logits)

  def renamed(state, level, tokens, parents):
    return step_of(logits)(state, level, (tokens - 1) // 3, parents)

  plain = grow(jnp.asarray(logits), spec)
  tree = expand_dynamic(renamed, carry, scores, jnp.asarray(ROOT), spec, ids=ids)
  np.testing.assert_array_equal(tree.tokens[:, 1:], plain.tokens[:, 1:] * 3 + 1)

  last = jnp.where(jnp.arange(VOCAB) < 3, 100.0, 0.0)  # only tokens 0, 1, 2 are tried
  for expand, shape in ((expand_dynamic, spec), (expand_static, StaticTree.chain(2))):
    tree = expand(
      step_of(logits), carry, scores, jnp.asarray(ROOT), shape, perturb=lambda x, level: x + last
    )
    assert int(jnp.max(tree.tokens[:, 1:])) <= 2


def test_impossible_sizes_are_refused():
  with pytest.raises(
    UserError, match="has 1 to 6 drafts, got num_nodes=8; use num_nodes from 2 to 7"
  ):
    DynamicTree(num_nodes=8, max_depth=2, width=2)
