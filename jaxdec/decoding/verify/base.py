# SPDX-License-Identifier: Apache-2.0
"""What a rule is, and what it says."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdec.decoding.sampling import Sampler
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.tree import Tree


@struct.dataclass
class Verdict:
  """What a rule decided, before stop tokens and budgets cut it.

  Attributes:
    path: accepted node ids, root first; entries beyond ``count`` repeat the last one.
    count: accepted drafts + 1, so at least 1.
    tokens: ``tokens[b, :count[b]]`` are emitted: drafts on the path, then the target's own token.
  """

  path: Int[Array, "B P"]
  count: Int[Array, "B"]
  tokens: Int[Array, "B P"]


class Rule:
  """Base class; rules are frozen dataclasses, so they are static under ``jit``.

  Attributes:
    lossless: whether the emitted text has the law of plain decoding.
    needs_draft_probs: whether ``tree.draft_probs`` must be there.
    chains_only: judges one child a node. distinct_siblings: whether siblings may have been drawn
      without replacement.
  """

  name: ClassVar[str]
  lossless: ClassVar[bool] = True
  needs_draft_probs: ClassVar[bool] = False
  chains_only: ClassVar[bool] = False
  distinct_siblings: ClassVar[bool] = True

  def __call__(
    self,
    tree: Tree,
    logits: Float[Array, "B M V"],
    sampler: Sampler,
    keys: Key[Array, "B"],
    length: Int[Array, "B"],
  ) -> Verdict:
    """Args:

    tree: node 0 is the root. logits: the target's, at every node.
    keys: request keys. length: tokens in the target's state, root excluded.
    """
    raise NotImplementedError


def path_to(tree: Tree, node: Int[Array, "B"]) -> Int[Array, "B P"]:
  """Node ids from the root to ``node``; entries beyond its depth repeat it."""
  steps, here = [], node
  for _ in range(tree.max_depth + 1):
    steps.append(here)
    here = jnp.take_along_axis(tree.parent, here[:, None], axis=1)[:, 0]
  upwards = jnp.stack(steps, axis=1)  # node, its parent, ..., root, root, ...
  depth = jnp.take_along_axis(tree.depth, node[:, None], axis=1)
  index = jnp.maximum(depth - jnp.arange(tree.max_depth + 1), 0)
  return jnp.take_along_axis(upwards, index, axis=1).astype(jnp.int32)


def longest_path(tree: Tree, ok: Bool[Array, "B M"], log_p: Float[Array, "B M"]) -> Int[Array, "B"]:
  """The deepest node all of whose path is ``ok``; of several the one of the most probable path.

  Args:
    log_p: of every node's token given its path.
  """
  on, log_path = tree.depth == 0, jnp.zeros(log_p.shape)
  for depth in range(1, tree.max_depth + 1):
    here = (tree.depth == depth) & ok & jnp.take_along_axis(on, tree.parent, axis=1)
    log_path = jnp.where(here, jnp.take_along_axis(log_path, tree.parent, axis=1) + log_p, log_path)
    on = on | here
  deepest = jnp.max(jnp.where(on, tree.depth, 0), axis=1, keepdims=True)
  return argmax(jnp.where(on & (tree.depth == deepest), log_path, -jnp.inf))


def verdict_at(tree: Tree, node: Int[Array, "B"], final: Int[Array, "B"]) -> Verdict:
  """The path to ``node`` is accepted, then ``final`` emitted."""
  path = path_to(tree, node)
  depth = jnp.take_along_axis(tree.depth, node[:, None], axis=1)
  tokens = jnp.take_along_axis(tree.tokens, path, axis=1)
  tokens = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
  tokens = jnp.where(jnp.arange(tokens.shape[1]) == depth, final[:, None], tokens)
  return Verdict(path, depth[:, 0] + 1, tokens)
