# SPDX-License-Identifier: Apache-2.0
"""Growing a draft tree level by level, for any drafter that scores children of a drafted node.

``expand_dynamic`` is EAGLE-2's tree (arXiv 2406.16858): a node's score is the sum of the draft
log-probabilities on its path; each level feeds the ``width`` best nodes of the level before it, and
the ``num_nodes - 1`` best of all nodes seen are kept. ``expand_static`` grows a fixed topology of
child ranks and feeds only nodes that have children. Shapes are static in both.

A drafter takes part through one function,
``step(carry, level, tokens [B,n], parents) -> (logits [B,n,V], carry)``: feed the ``n`` nodes of
depth ``level`` whose parents were fed as numbers ``parents`` (``[n]`` static or ``[B,n]``) of the
level before; logits score their children. A drafter whose logits ignore the path (Medusa) returns
``[B,1,V]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.selection import argmax, top_k
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError
from jaxdec.mixers.base import gather_nodes

Step = Callable[[Any, int, Array, Any], tuple[Array, Any]]
Perturb = Callable[[Array, int], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicTree:
  """Shape of an EAGLE-2 tree.

  Attributes:
    num_nodes: M, root included. max_depth: deepest node. width: k, children tried per fed node and
      nodes fed per level. The paper's defaults (60 drafts, depth 8 counted this way, k = 10) suit a
      GPU; a CPU verifies wide trees slowly.
  """

  num_nodes: int = 16
  max_depth: int = 4
  width: int = 4

  def __post_init__(self):
    candidates = self.width + (self.max_depth - 1) * self.width**2
    if min(self.num_nodes - 1, self.max_depth, self.width) < 1 or self.num_nodes - 1 > candidates:
      raise UserError(
        f"a dynamic tree of width {self.width} and depth {self.max_depth} has 1 to {candidates} "
        f"drafts, got num_nodes={self.num_nodes}; use num_nodes from 2 to {candidates + 1}"
      )


def take_nodes(x: Float[Array, "B n ..."], parents: Any) -> Array:
  """Rows of ``x`` by parent number, ``parents`` as a step receives it."""
  if isinstance(parents, np.ndarray):
    if x.shape[1] == len(parents) and np.array_equal(parents, np.arange(len(parents))):
      return x
    return x[:, parents]
  return gather_nodes(x, parents)


def _top(logits: Float[Array, "B n V"], k: int) -> tuple[Array, Array]:
  if k == 1:  # several times cheaper than a sort of the vocabulary
    return jnp.max(logits, axis=-1, keepdims=True), argmax(logits)[..., None]
  return top_k(logits, k)


def expand_static(
  step: Step,
  carry: Any,
  logits: Float[Array, "B V"],
  root: Int[Array, "B"],
  shape: StaticTree,
  *,
  perturb: Perturb | None = None,
  ids: Int[Array, "V"] | None = None,
) -> Tree:
  """Fills a static tree with tokens, feeding only the nodes that have children.

  ``logits`` score the children of the root. ``perturb(logits, level)`` re-scores the children of
  depth-``level`` nodes before ranking; ``ids`` maps a draft vocabulary to token ids.
  """
  has_children = set(shape.parent[1:].tolist())
  fed, scores, tokens = np.zeros(1, np.int32), logits[:, None], [root[:, None]]
  for level, slots in enumerate(shape.levels, 1):
    row = np.searchsorted(fed, shape.parent[slots])  # the parent's number among the fed nodes
    rank = shape.rank[slots]
    if perturb is not None:
      scores = perturb(scores, level - 1)
    top = _top(scores, int(rank.max()) + 1)[1]
    drafted = top[:, row if top.shape[1] > 1 else np.zeros_like(row), rank]
    drafted = drafted if ids is None else ids[drafted]
    tokens.append(drafted)
    if level < shape.max_depth:
      inner = np.array([i for i, s in enumerate(slots.tolist()) if s in has_children])
      fed = slots[inner]
      scores, carry = step(carry, level, drafted[:, inner], row[inner])
  return shape.tree(jnp.concatenate(tokens, axis=1))


def expand_dynamic(
  step: Step,
  carry: Any,
  logits: Float[Array, "B V"],
  root: Int[Array, "B"],
  spec: DynamicTree,
  *,
  perturb: Perturb | None = None,
  ids: Int[Array, "V"] | None = None,
) -> Tree:
  """EAGLE-2's expand and re-rank. Arguments as in ``expand_static``.

  The kept set is connected: a parent scores at least as high as its child and comes earlier in the
  candidate list, and ``lax.top_k`` prefers earlier entries among equals.
  """
  b, k = root.shape[0], spec.width

  def children(scores, level, cumulative):
    """Top-k children of the fed nodes: cumulative scores and tokens, ``[B,n,k]``."""
    log_probs = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
    if perturb is None:
      best, index = _top(log_probs, k)
    else:  # ranked with the noise, scored without it
      index = _top(perturb(scores, level), k)[1]
      best = jnp.take_along_axis(log_probs, index, axis=-1)
    index = index if ids is None else ids[index]
    return cumulative[:, :, None] + best, jnp.broadcast_to(index, (b, cumulative.shape[1], k))

  score, token = children(logits[:, None], 0, jnp.zeros((b, 1)))
  score, token = score[:, 0], token[:, 0]
  frontier = jnp.broadcast_to(jnp.arange(k), (b, k))  # candidate numbers of the fed nodes
  parents = jnp.zeros((b, k), jnp.int32)  # their parents' numbers among the nodes fed before
  all_scores, all_tokens = [score], [token]
  all_parents, all_depths = [jnp.full((b, k), -1)], [np.full(k, 1)]
  size = k
  for level in range(1, spec.max_depth):
    scores, carry = step(carry, level, token, parents)
    cumulative, drafted = children(scores, level, score)
    cumulative, drafted = cumulative.reshape(b, k * k), drafted.reshape(b, k * k)
    all_scores.append(cumulative)
    all_tokens.append(drafted)
    all_parents.append(jnp.repeat(frontier, k, axis=1))
    all_depths.append(np.full(k * k, level + 1))
    score, best = jax.lax.top_k(cumulative, k)
    token = jnp.take_along_axis(drafted, best, axis=1)
    frontier, parents = size + best, best // k
    size += k * k
  kept = jax.lax.top_k(jnp.concatenate(all_scores, axis=1), spec.num_nodes - 1)[1]
  return assemble(root, all_tokens, all_parents, all_depths, kept, spec)


def assemble(
  root: Int[Array, "B"],
  tokens: Sequence[Int[Array, "B _"]],
  parents: Sequence[Int[Array, "B _"]],
  depths: Sequence[np.ndarray],
  kept: Int[Array, "B N"],
  spec: DynamicTree,
  valid: Bool[Array, "B _"] | None = None,
) -> Tree:
  """The tree of some of the candidates, which are listed level by level.

  Args:
    parents: the candidate number of each one's parent, -1 for the root. depths: alike in all rows.
    kept: N = ``num_nodes - 1`` different candidates, and with each its parent. valid: candidates
      that may be accepted; the parents of others don't matter.
  """
  kept = jnp.sort(kept, axis=1)  # creation order: parents before children

  def pick(parts):
    return jnp.take_along_axis(jnp.concatenate(parts, axis=1), kept, axis=1)

  above, depth = pick(parents), jnp.asarray(np.concatenate(depths), jnp.int32)[kept]
  ok = jnp.ones(kept.shape, bool)
  if valid is not None:
    ok = jnp.take_along_axis(valid, kept, axis=1)
    above, depth = jnp.where(ok, above, -1), jnp.where(ok, depth, 1)
  # Slot of the parent: where its candidate number sits among the kept ones (none: the root).
  parent = jnp.where(above < 0, 0, 1 + jnp.argmax(above[:, :, None] == kept[:, None, :], axis=-1))
  zero = jnp.zeros((root.shape[0], 1), jnp.int32)
  return Tree(
    tokens=jnp.concatenate([root[:, None], pick(tokens)], axis=1).astype(jnp.int32),
    parent=jnp.concatenate([zero, parent], axis=1).astype(jnp.int32),
    depth=jnp.concatenate([zero, depth], axis=1),
    valid=jnp.concatenate([zero == 0, ok], axis=1),
    max_depth=spec.max_depth,
  )
