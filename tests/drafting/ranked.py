# SPDX-License-Identifier: Apache-2.0
"""Is a drafted tree what the training graph would draft, path by path?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from toy_target import VOCAB, batch_of, logits_by_depth, run, target
from universal import PATHS, start

from jaxdec.drafting.base import Context


def assert_drafts_what_training_ranks(drafter, params, length=9, root=4):
  """Every path of ``PATHS`` as if it were alone: siblings and cousins don't see each other."""
  t = target()
  text = np.random.default_rng(1).integers(0, VOCAB, (1, length + 1))
  text[0, length] = root
  state, first = start(drafter, params, t, text, [length])
  context = Context(root=first, length=jnp.asarray([length]), history=None, target=t, sampler=None)
  tree, _ = jax.jit(lambda s: drafter.propose(params, s, context, None))(state)
  drafted, paths = np.asarray(tree.tokens[0]), [(), *PATHS]
  leaves = [p for p in PATHS if not any(q[: len(p)] == p and q != p for q in PATHS)]
  rows = np.zeros((len(leaves), length + 8), np.int32)
  rows[:, :length] = text[0, :length]
  for row, leaf in zip(rows, leaves):
    path = [drafted[paths.index(leaf[:i])] for i in range(len(leaf) + 1)]
    row[length : length + len(path)] = path
  batch = batch_of(rows)
  by_depth = logits_by_depth(drafter, params, t, run(t, batch, drafter.capture), batch)
  for row, leaf in enumerate(leaves):
    for depth in range(1, len(leaf) + 1):
      ranked = jax.lax.top_k(by_depth[depth - 1][row, length - 1], 3)[1]
      assert rows[row, length + depth] == int(ranked[leaf[depth - 1]]), (leaf, depth)
