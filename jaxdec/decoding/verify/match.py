# SPDX-License-Identifier: Apache-2.0
"""Rule ``match``: the target draws, and the drafts follow or don't."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdec.decoding.sampling import Sampler
from jaxdec.decoding.verify.base import Rule, Verdict, path_to
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.tree import Tree


@dataclasses.dataclass(frozen=True)
class Match(Rule):
  """Draw the target's token at the root, step to the child that holds it, draw there, and so on.

  Only nodes on the realised path are ever drawn at: a tree of M nodes costs ``count`` rows of noise
  and sampling instead of M. Siblings with equal tokens are all followed, so the deepest match wins.
  """

  name: ClassVar[str] = "match"

  def __call__(self, tree, logits, sampler, keys, length):
    batch, nodes = tree.tokens.shape
    width = tree.max_depth + 1
    rows = jnp.arange(batch)
    nodes_index = jnp.arange(nodes, dtype=jnp.int32)

    def alive(carry):
      depth, moved, *_ = carry
      return (depth < width) & jnp.any(moved)

    def descend(carry):
      depth, moved, on, best, count, tokens = carry
      # All nodes in ``on`` spell the same text; the first stands for them.
      here = jnp.min(jnp.where(on, nodes_index, nodes - 1), axis=1)
      drawn = sampler.draw(logits[rows, here], keys, length + depth + 1)
      best = jnp.where(moved, here, best)
      count = count + moved
      tokens = jax.lax.dynamic_update_slice(tokens, drawn[:, None], (0, depth))
      child_of_on = jnp.take_along_axis(on, tree.parent, axis=1)
      on = child_of_on & tree.valid & (tree.tokens == drawn[:, None])
      on = on & (tree.depth == depth + 1) & moved[:, None]
      return depth + 1, jnp.any(on, axis=1), on, best, count, tokens

    root = jnp.broadcast_to(nodes_index == 0, (batch, nodes))
    zeros = jnp.zeros(batch, jnp.int32)
    start = (
      jnp.int32(0),
      jnp.ones(batch, bool),
      root,
      zeros,
      zeros,
      jnp.zeros((batch, width), jnp.int32),
    )
    *_, best, count, tokens = jax.lax.while_loop(alive, descend, start)
    return Verdict(path_to(tree, best), count, tokens)


def match_whole_tree(
  tree: Tree,
  logits: Float[Array, "B M V"],
  sampler: Sampler,
  keys: Key[Array, "B"],
  length: Int[Array, "B"],
) -> Verdict:
  """``Match`` without a loop, drawing at every node: the specification the tests hold it to.

  One noise row per depth, shared by the nodes of equal depth.
  """
  drawn = sampler.draw(logits, keys, length[:, None] + tree.depth + 1)
  hit = tree.valid & (tree.tokens == jnp.take_along_axis(drawn, tree.parent, axis=1))
  hit = hit.at[:, 0].set(True)
  on: Bool[Array, "B M"] = ~jnp.any(tree.topology.ancestors & ~hit[:, None], axis=-1)
  depth = jnp.where(on, tree.depth, -1)
  best = argmax(depth)
  path = path_to(tree, best)
  return Verdict(path, jnp.max(depth, axis=1) + 1, jnp.take_along_axis(drawn, path, axis=1))
