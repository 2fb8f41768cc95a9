# SPDX-License-Identifier: Apache-2.0
"""Rules that trust the drafter: what they accept, by definition, and where they are exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding.sampling import Sampler, request_keys
from jaxdec.decoding.verify import GadLossy, Match, UnverifiedLossy, get_rule
from jaxdec.errors import UserError
from tests.decoding.trees import random_tree

ROWS, NODES, DEPTH, V = 300, 12, 4, 13
GREEDY, SAMPLED = Sampler(), Sampler(temperature=0.7, top_k=5)


def case(seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  # No two siblings alike: logits here are no function of the text.
  shuffled = jax.vmap(jax.random.permutation, (0, None))(jax.random.split(keys[0], ROWS), V)
  tokens = shuffled[:, : NODES - 1]
  tree = random_tree(keys[1], jax.random.randint(keys[2], (ROWS,), 0, V), tokens, DEPTH)
  # Half a step apart: ties, and differences equal to a tolerance.
  logits = jnp.round(jax.random.normal(keys[3], (ROWS, NODES, V)) * 3) / 2
  return tree, logits


def judged(rule, tree, logits, sampler, keys, length):
  return jax.tree.map(
    np.asarray, jax.jit(rule, static_argnums=2)(tree, logits, sampler, keys, length)
  )


def accepted(rule, tree, logits, b):
  """Every node of row b whose path is accepted, by the definition."""
  on = {0}
  for i in range(1, NODES):
    parent, token = int(tree.parent[b, i]), int(tree.tokens[b, i])
    row = logits[b, parent]
    order = sorted(range(V), key=lambda v: (-row[v], v))
    ok = isinstance(rule, UnverifiedLossy) or (
      token in order[: rule.top] and row.max() - row[token] <= rule.tolerance
    )
    if tree.valid[b, i] and ok and parent in on:
      on.add(i)
  return on


@pytest.mark.parametrize("rule,sampler", [
  (GadLossy(top=3, tolerance=1.5), GREEDY),
  (GadLossy(top=V, tolerance=0.5), SAMPLED),
  (GadLossy(1), SAMPLED),
  (UnverifiedLossy(), SAMPLED),
])  # fmt: skip
def test_the_longest_path_of_accepted_drafts(rule, sampler):
  tree, logits = case()
  keys, length = request_keys(1, ROWS), jnp.full(ROWS, 3)
  out = judged(rule, tree, logits, sampler, keys, length)
  own = np.asarray(sampler.draw(logits, keys, length[:, None] + tree.depth + 1))
  law = np.asarray(logits if sampler.greedy else sampler.process(logits))
  tree = jax.tree.map(np.asarray, tree)
  lengths = set()
  for b in range(ROWS):
    on = accepted(rule, tree, law, b)
    count = int(out.count[b])
    path = out.path[b, :count]
    assert count == 1 + max(tree.depth[b, i] for i in on) and set(path) <= on
    assert out.tokens[b, : count - 1].tolist() == tree.tokens[b, path[1:]].tolist()
    assert out.tokens[b, count - 1] == own[b, path[-1]]
    lengths.add(count)
  assert len(lengths) > 2


def test_one_candidate_is_greedy_decoding():
  args = (*case(1), GREEDY, request_keys(1, ROWS), jnp.zeros(ROWS, jnp.int32))
  out, want = judged(GadLossy(top=1, tolerance=0.0), *args), judged(Match(), *args)
  np.testing.assert_array_equal(out.count, want.count)
  for b in range(ROWS):
    count = int(want.count[b])
    np.testing.assert_array_equal(out.tokens[b, :count], want.tokens[b, :count])
  assert not np.array_equal(judged(GadLossy(), *args).count, want.count)


def test_they_are_marked_lossy():
  for name in ("gad_lossy", "unverified_lossy"):
    assert not get_rule(name).lossless
  with pytest.raises(UserError, match="top >= 1"):
    GadLossy(top=0)
