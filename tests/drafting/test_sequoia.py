# SPDX-License-Identifier: Apache-2.0
"""The dynamic programme against all trees there are, and its forecast against sampling."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_laws import MODEL, PLAIN, V, context, grow

from jaxdec.decoding.sampling import request_keys
from jaxdec.decoding.verify import Match, WithoutReplacement
from jaxdec.drafting.sequoia import BestTrees, Sequoia, best_tree, fastest_tree, measure_acceptance
from jaxdec.drafting.static_tree import StaticTree, expected_tokens, greedy_tree
from jaxdec.errors import UserError

NODES, DEPTH = 7, 4


@functools.cache
def ordered_trees(n: int) -> list:
  """All ordered trees of n nodes, each the tuple of its root's subtrees."""
  return [forest for forest in forests(n - 1)]


@functools.cache
def forests(n: int) -> list:
  if n == 0:
    return [()]
  return [
    (tree, *rest)
    for size in range(1, n + 1)
    for tree in ordered_trees(size)
    for rest in forests(n - size)
  ]


def worth(tree, acc) -> float:
  if len(tree) > len(acc):
    return -np.inf
  return 1 + sum(a * worth(t, acc) if worth(t, acc) > 0 else -np.inf for a, t in zip(acc, tree))


def height(tree) -> int:
  return max((1 + height(t) for t in tree), default=0)


@pytest.mark.parametrize("acc", [(0.6, 0.2, 0.1), (0.2, 0.5, 0.0, 0.3), (0.8, 0.0)])
def test_the_programme_finds_the_best_of_all_trees(acc):
  best = BestTrees(acc, NODES, DEPTH)
  for n in range(1, NODES + 1):
    for depth in range(DEPTH + 1):
      all_of_them = [worth(t, acc) for t in ordered_trees(n) if height(t) <= depth]
      want = max(all_of_them, default=-np.inf)
      assert best.tokens[n, depth] == pytest.approx(want)
      if want > -np.inf:
        tree = best.tree(n, depth)
        assert tree.num_nodes == n and tree.max_depth <= depth
        assert expected_tokens(tree, np.tile(acc, (DEPTH, 1))) == pytest.approx(want)
      else:
        with pytest.raises(UserError, match="no tree"):
          best.tree(n, depth)


def test_limits():
  assert best_tree((0.7, 0.0, 0.0), 5, 8) == StaticTree.chain(4)
  assert best_tree((0.5, 0.3, 0.1, 0.05), 5, 1) == StaticTree.from_paths([(i,) for i in range(4)])
  # Where acceptance falls with the rank, as Medusa's tree.
  acc = np.array([0.55, 0.2, 0.1, 0.05])
  big = best_tree(acc, 40, 6)
  other = greedy_tree(np.tile(acc, (6, 1)), 40)
  tiled = np.tile(acc, (6, 1))
  assert expected_tokens(big, tiled) == pytest.approx(expected_tokens(other, tiled))


def test_the_fastest_tree_for_measured_times():
  acc = (0.7, 0.15, 0.05)
  verify = {1: 1.0, 2: 1.0, 4: 1.05, 8: 1.2, 16: 3.0}
  tree, seconds = fastest_tree(acc, 0.1, verify, max_depth=6)
  best = BestTrees(acc, 16, 6)
  every = {
    (n, level): (level * 0.1 + verify[n]) / best.tokens[n, level]
    for n in verify
    for level in range(7)
    if best.tokens[n, level] > 0
  }
  n, level = min(every, key=every.get)
  assert seconds == pytest.approx(every[n, level]) and 1 < n < 16
  assert tree.num_nodes == n and tree.max_depth <= level
  # A slow draft model: nothing is drafted.
  assert fastest_tree(acc, 10.0, verify)[0].num_nodes == 1
  # Free verification: the largest tree.
  assert fastest_tree(acc, 0.0, dict.fromkeys(verify, 1.0))[0].num_nodes == 16


def test_forecast_against_independent_acceptance():
  acc = np.array([0.5, 0.2, 0.1])
  tree = best_tree(acc, 16, 4)
  slots = {path: i for i, path in enumerate(((), *tree.paths))}
  rng, total = np.random.default_rng(0), 0
  for _ in range(20_000):
    path = ()
    while path in slots:
      total += 1
      path = (*path, int(rng.choice(4, p=[*acc, 1 - acc.sum()])))
  assert total / 20_000 == pytest.approx(expected_tokens(tree, np.tile(acc, (4, 1))), rel=0.02)


@pytest.mark.parametrize(
  "rule, draws", [(WithoutReplacement(), "sampled"), (Match(), "shared")], ids=["sampled", "shared"]
)
def test_forecast_from_measured_acceptance(rule, draws):
  """Laws that don't depend on the text: acceptance measured on one level tells of four."""
  rng = np.random.default_rng(2)
  p, q = (jnp.asarray(x, jnp.float32) for x in rng.dirichlet(np.full(V, 1.5), 2))
  rows = 50_000
  wide = jnp.broadcast_to(jnp.log(p), (rows, V))
  keys = request_keys(1, rows)
  acc = measure_acceptance(
    rule, context(keys), jnp.broadcast_to(jnp.log(q), (rows, V)), wide, 3, draws
  )
  tree = best_tree(acc, 10, 4)
  assert tree.max_depth > 1 and tree.max_rank > 1
  drafter = Sequoia(model=MODEL, draws=draws, tree=tree)

  @jax.jit
  def step(q, p, keys):
    drafts = grow(drafter, (q, jnp.tile(q, (V, 1))), keys)
    logits = jnp.broadcast_to(jnp.log(p), (rows, drafter.num_nodes, V))
    return rule(drafts, logits, PLAIN, keys, jnp.full(rows, 8)).count

  tokens = float(step(q, p, request_keys(7, rows)).mean())
  assert tokens == pytest.approx(expected_tokens(tree, np.tile(acc, (4, 1))), rel=0.02)
  assert abs(tokens - expected_tokens(tree, np.tile(acc[::-1], (4, 1)))) > 0.1  # it says something


def test_mistakes_are_named():
  with pytest.raises(UserError, match="sum"):
    BestTrees((0.9, 0.3), 4, 2)
  with pytest.raises(UserError, match="sizes"):
    fastest_tree((0.5,), 0.1, {})
  with pytest.raises(UserError, match="root alone"):
    Sequoia(model=MODEL, tree=StaticTree(()))
