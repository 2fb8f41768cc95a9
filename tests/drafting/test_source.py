# SPDX-License-Identifier: Apache-2.0
"""The contract of sources: their lists are consistent, and their trees the best of their lists."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.drafting import PromptLookup, TokenRecycling, merge_paths
from tests.drafting.spelled import context_of, estimates, spelled


def best(values: dict, keep: int) -> set:
  """The heaviest texts (ties: shorter first); no ties among equal lengths may straddle the cut."""
  order = sorted(values, key=lambda t: (-values[t], len(t)))
  kept, rest = order[:keep], order[keep:]
  if rest:
    key = lambda t: (-values[t], len(t))  # noqa: E731
    assert key(kept[-1]) < key(rest[0])
  return set(kept)


def test_estimates_of_prefixes_merge_best_first():
  """Against a dictionary; every path has its own decreasing weights, all different."""
  rng = np.random.default_rng(0)
  batch, paths, length, nodes = 24, 5, 4, 9
  tokens = rng.integers(0, 2, (batch, paths, length))
  valid = np.cumprod(rng.random((batch, paths, length)) > 0.1, axis=-1).astype(bool)
  weight = -np.sort(-rng.random((batch, paths, length)), axis=-1).astype(np.float32)
  tree = jax.jit(merge_paths, static_argnums=4)(
    jnp.zeros(batch, jnp.int32), jnp.asarray(tokens), jnp.asarray(valid), jnp.asarray(weight), nodes
  )
  cut = 0
  for b in range(batch):
    values: dict = {}
    for r in range(paths):
      for j in range(length):
        if valid[b, r, j]:
          text = tuple(tokens[b, r, : j + 1].tolist())
          values[text] = max(values.get(text, 0.0), float(weight[b, r, j]))
    assert spelled(tree, b) == best(values, nodes - 1)
    cut += len(values) > nodes - 1
  assert cut > batch // 2


@pytest.mark.parametrize("num_matches", [1, 3])
def test_prompt_lookup_lists_its_matches(num_matches):
  rng = np.random.default_rng(1)
  texts = [rng.integers(0, 2, n).tolist() for n in (2, 7, 12, 15)]
  context = context_of(texts, 19)
  drafter = PromptLookup(num_drafts=4, num_matches=num_matches, ngram_min=1)
  listed = drafter.candidates(None, (), context, None)
  tree, _ = drafter.propose(None, (), context, None)
  for b in range(len(texts)):
    values = estimates(listed, b)
    assert len(spelled(tree, b)) == min(len(values), 4)
    assert spelled(tree, b) <= set(values)
    if values:
      assert max(values.values()) <= num_matches / (num_matches + 1)
  assert any(estimates(listed, b) for b in range(len(texts)))


def test_token_recycling_lists_its_tree():
  """The tree it proposes level by level is what merging its list gives, node for node."""
  drafter = TokenRecycling(size=24)
  vocab = 11
  rng = np.random.default_rng(2)
  table = np.stack([rng.permutation(vocab)[: drafter.width] for _ in range(vocab)])
  table[3] = -1  # a token never met
  context = context_of([[1, 2], [3]], 8)
  table = jnp.asarray(table, jnp.int32)
  tree, _ = drafter.propose(None, table, context, None)
  listed = drafter.candidates(None, table, context, None)
  merged = merge_paths(context.root, listed.tokens, listed.valid, listed.weight, drafter.num_nodes)
  for b in range(2):
    assert spelled(tree, b) == spelled(merged, b) == set(estimates(listed, b))
  assert len(spelled(tree, 0)) > 12 and not spelled(tree, 1)
