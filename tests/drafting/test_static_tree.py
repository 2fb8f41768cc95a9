# SPDX-License-Identifier: Apache-2.0
"""Static shapes, the greedy builder, and merged paths, against brute force."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.drafting import StaticTree, argmax, expected_tokens, greedy_tree, merge_paths, top_k
from jaxdec.errors import UserError

SMALL = StaticTree.from_paths([(1,), (0,), (0, 1), (0, 0), (0, 1, 0)])


def test_index_arrays():
  assert SMALL.paths == ((0,), (1,), (0, 0), (0, 1), (0, 1, 0))
  assert SMALL.num_nodes == 6 and SMALL.max_depth == 3 and SMALL.max_rank == 2
  assert SMALL.parent.tolist() == [0, 0, 0, 1, 1, 4]
  assert SMALL.depth.tolist() == [0, 1, 1, 2, 2, 3]
  assert SMALL.rank.tolist() == [0, 0, 1, 0, 1, 0]
  assert [level.tolist() for level in SMALL.levels] == [[1, 2], [3, 4], [5]]
  assert np.all(SMALL.parent[1:] < np.arange(1, 6))
  assert StaticTree.chain(3).parent.tolist() == [0, 0, 1, 2]
  assert SMALL.truncated(4).paths == ((0,), (1,), (0, 0))
  assert hash(SMALL) == hash(StaticTree.from_paths(reversed(SMALL.paths)))


def test_validity_is_closed_under_ancestors():
  valid = jnp.ones((1, 6), bool).at[0, 4].set(False)
  tree = SMALL.tree(jnp.arange(6)[None], valid)
  assert tree.valid.tolist() == [[True, True, True, True, False, False]]
  assert (
    SMALL.tree(jnp.arange(6)[None], jnp.zeros((1, 6), bool)).valid.tolist()[0]
    == [True] + [False] * 5
  )


@pytest.mark.parametrize("paths", [[(0, 0)], [()], [(0,), (0, 1, 1), (0, 0)]])
def test_paths_without_parents_are_refused(paths):
  with pytest.raises(UserError, match="static tree"):
    StaticTree.from_paths(paths)


def test_greedy_tree_is_optimal():
  """Against every tree of that size, for small sizes."""
  rng = np.random.default_rng(0)
  for _ in range(5):
    acc = rng.dirichlet([1, 0.6, 0.3, 0.5], size=3)[:, :3]
    every = [p for d in (1, 2, 3) for p in itertools.product(range(3), repeat=d)]
    for nodes in (2, 3, 4):
      best = max(
        expected_tokens(StaticTree.from_paths(c), acc)
        for c in itertools.combinations(every, nodes - 1)
        if all(p[:-1] == () or p[:-1] in c for p in c)
      )
      tree = greedy_tree(acc, nodes)
      assert tree.num_nodes == nodes
      assert expected_tokens(tree, acc) == pytest.approx(best)


def test_greedy_tree_on_planted_accuracies():
  chain_like = greedy_tree([[0.9, 0.01]] * 8, 6)
  assert chain_like == StaticTree.chain(5)
  star_like = greedy_tree([[0.3, 0.29, 0.28], [0.01, 0, 0]], 4)
  assert star_like.paths == ((0,), (1,), (2,))
  assert greedy_tree([[0.5, 0.0]], 10).num_nodes == 2  # nothing worth adding
  assert greedy_tree([[0.9, 0.05]] * 8, 9, max_depth=2).max_depth == 2
  with pytest.raises(UserError, match="accuracies"):
    greedy_tree([[1.2]], 3)


@pytest.mark.parametrize("vocab, k", [(5, 3), (1000, 1), (4096, 8), (4099, 10), (1500, 9)])
def test_top_k_equals_lax(vocab, k):
  x = jax.random.normal(jax.random.key(vocab), (2, 3, vocab))
  x = jnp.round(x * 4)  # many ties
  for a, b in zip(top_k(x, k), jax.lax.top_k(x, k)):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(argmax(x), jnp.argmax(x, -1))


def brute_merge(paths, valid, weights, keep):
  """Prefixes with summed weights; the heaviest kept (ties: shallow, then first seen)."""
  nodes = {}
  for r, (path, ok) in enumerate(zip(paths, valid)):
    for j in range(len(path)):
      if not ok[j]:
        break
      entry = nodes.setdefault(tuple(path[: j + 1]), [0.0, j, r])
      entry[0] += weights[r]
  order = sorted(nodes, key=lambda p: (-nodes[p][0], nodes[p][1], nodes[p][2]))
  return set(order[:keep])


def test_merge_equals_brute_force():
  rng = np.random.default_rng(1)
  batch, paths, length, nodes = 40, 4, 3, 7
  tokens = rng.integers(0, 3, (batch, paths, length))
  valid = rng.random((batch, paths, length)) > 0.15
  weights = rng.integers(1, 4, (batch, paths)).astype(np.float32)
  root = jnp.arange(batch, dtype=jnp.int32)
  tree = jax.jit(merge_paths, static_argnums=4)(
    root, jnp.asarray(tokens, jnp.int32), jnp.asarray(valid), jnp.asarray(weights), nodes
  )
  assert tree.tokens.shape == (batch, nodes) and tree.max_depth == length
  for b in range(batch):
    text = {0: ()}
    for i in range(1, nodes):
      parent = int(tree.parent[b, i])
      assert parent < i
      if tree.valid[b, i]:
        text[i] = (*text[parent], int(tree.tokens[b, i]))
        assert int(tree.depth[b, i]) == len(text[i])
    got = set(text.values()) - {()}
    want = brute_merge(tokens[b].tolist(), np.cumprod(valid[b], -1), weights[b], nodes - 1)
    assert got == want, b
