# SPDX-License-Identifier: Apache-2.0
"""Clover's tree against a plain rewriting of its rule, one row at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import VOCAB, target
from universal import SAMPLERS, Universal, plain

from jaxdec.decoding import generate
from jaxdec.drafting import Clover, DynamicTree
from jaxdec.drafting.checkpoint import from_config, to_config
from jaxdec.drafting.clover_tree import expand_clover
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.errors import UserError

SPEC = DynamicTree(num_nodes=9, max_depth=4, width=4)


def laws(rng, rows, sharpness):
  """Logits of the next token by the path's last token and depth, ``[B,D,V,V]``."""
  return sharpness * rng.normal(size=(rows, SPEC.max_depth, VOCAB, VOCAB)).astype(np.float32)


def grown(table, spec=SPEC, **options):
  """The tree of a drafter whose laws are the table's; token 0 is the root."""

  def step(path, level, tokens, parents):
    path = jnp.concatenate([take_nodes(path, parents), tokens[..., None]], axis=-1)
    rows = jnp.arange(table.shape[0])[:, None]
    return jnp.asarray(table)[rows, level, tokens], path

  @jax.jit
  def grow(table):
    empty, root = jnp.zeros((table.shape[0], 1, 0), jnp.int32), jnp.zeros(table.shape[0], jnp.int32)
    return expand_clover(step, empty, table[:, 0, 0], root, spec, **options)

  return jax.device_get(grow(jnp.asarray(table)))


def by_hand(table, spec, top_p, ratio):
  """Paths of tokens kept, row by row, and how many on each level."""
  kept, level, left, sizes = set(), [((), 0.0)], spec.num_nodes - 1, []
  for depth in range(spec.max_depth):
    found = []
    for path, score in level:
      logits = table[depth, path[-1] if path else 0].astype(np.float64)
      prob = np.exp(logits - logits.max())
      prob /= prob.sum()
      above = 0.0
      for token in np.argsort(-prob)[: spec.width]:
        if above >= top_p or prob[token] < ratio * prob.max():
          break
        above += prob[token]
        found.append(((*path, int(token)), score + np.log(prob[token])))
    level = sorted(found, key=lambda x: -x[1])[: min(spec.width, left)]
    left -= len(level)
    sizes.append(len(level))
    kept |= {path for path, _ in level}
  return kept, sizes


def paths_of(tree, row):
  """The token paths of a tree's valid nodes, root left out."""
  paths = {0: ()}
  for i in range(1, tree.tokens.shape[1]):
    if tree.valid[row, i]:
      parent = int(tree.parent[row, i])
      assert parent < i and tree.depth[row, i] == len(paths[parent]) + 1
      paths[i] = (*paths[parent], int(tree.tokens[row, i]))
  assert len(set(paths.values())) == len(paths)
  return set(paths.values()) - {()}


@pytest.mark.parametrize(("top_p", "ratio"), [(0.8, 0.25), (0.5, 0.0), (1.0, 0.25), (1.0, 0.0)])
def test_tree_is_the_rules(top_p, ratio):
  rng, seen = np.random.default_rng(0), set()
  table = np.concatenate([laws(rng, 3, s) for s in (0.3, 1.0, 3.0)])
  tree = grown(table, top_p=top_p, ratio=ratio)
  assert tree.tokens.shape == (9, SPEC.num_nodes)
  for row in range(9):
    expected, sizes = by_hand(table[row], SPEC, top_p, ratio)
    assert paths_of(tree, row) == expected
    seen.add(tuple(sizes))
  assert len(seen) > 1 or (top_p, ratio) == (1.0, 0.0)  # which is wide first: 4, 4, 0, 0


def test_a_sure_drafter_goes_deep_and_spares_nodes():
  """Flat laws use the budget on two levels; sharp ones draft a chain of few nodes."""
  rng = np.random.default_rng(1)
  used = {}
  for sharpness in (0.1, 30.0):
    tree = grown(laws(rng, 4, sharpness), top_p=0.8, ratio=0.25)
    valid = tree.valid[:, 1:]
    used[sharpness] = valid.sum() / 4, np.max(tree.depth[:, 1:] * valid)
  assert used[0.1] == (8, 2)
  assert used[30.0][0] < 6 and used[30.0][1] == 4


def drafter(**options):
  return Clover.for_target(
    target().model.config, **{"num_heads": 4, "tree": SPEC, "top_p": 0.8, **options}
  )


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_lossless(sampler):
  t, prompts = target(), ((5, 1, 7, 7, 2), (4,), (9, 8, 3))
  ours = drafter()
  out = generate(
    t.model, t.params, [list(p) for p in prompts], max_new_tokens=16, sampler=SAMPLERS[sampler],
    drafter=ours, drafter_params=Universal.params(ours), stop=None, seed=5,
  )  # fmt: skip
  assert out.tokens == plain(sampler, prompts, 16)


def test_configuration_round_trip():
  assert from_config(to_config(drafter())) == drafter()


def test_wrong_settings_are_one_sentence():
  with pytest.raises(UserError, match="needs a DynamicTree of at most width drafts a level"):
    drafter(tree=None)
  with pytest.raises(UserError, match="num_nodes <= 1"):
    drafter(tree=DynamicTree(num_nodes=18, max_depth=4, width=4))
  with pytest.raises(UserError, match=r"top_p must lie in \(0, 1\]"):
    drafter(top_p=0.0)
