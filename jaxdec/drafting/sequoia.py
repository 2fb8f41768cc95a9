# SPDX-License-Identifier: Apache-2.0
"""Sequoia (arXiv 2402.12374): the best static tree for measured acceptance and measured times.

``acceptance[k]`` is the probability that the k-th drawn child of a node is the one accepted,
whatever the depth. With ``T[n, l, b]`` the most tokens a subtree of n nodes and depth at most l is
worth whose root has b children,

  T[1, l, 0] = 1,   T[n, l, b] = max_{0<y<n} T[y, l, b-1] + acceptance[b] max_b' T[n-y, l-1, b']

and the tree to use minimises ``(l t_draft + t_verify(n)) / max_b T[n, l, b]``, seconds per token.
Children are drawn without replacement, in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdec.drafting.base import Context
from jaxdec.drafting.sampled_tree import Kept, SampledTree
from jaxdec.drafting.static_tree import Path, StaticTree
from jaxdec.errors import UserError


class BestTrees:
  """The dynamic programme: best trees of up to ``max_nodes`` nodes, the root included.

  Args:
    acceptance: ``[K]``, see above; the sum is at most 1. Non-increasing or not.
    max_depth: most levels of drafts.

  ``tokens[n, l]`` is what the best tree of exactly n nodes and depth at most l is worth per step,
  -inf where there is none. O(n^2 l K).
  """

  def __init__(self, acceptance, max_nodes: int, max_depth: int):
    acc = np.asarray(acceptance, np.float64)
    if acc.ndim != 1 or not acc.size or not np.all(acc >= 0) or acc.sum() > 1 + 1e-6:
      raise UserError(
        "acceptance must be one probability per child, in the order of the draws, with a sum of at "
        f"most 1; got {acc.tolist()}"
      )
    if max_nodes < 1 or max_depth < 0:
      raise UserError(f"need max_nodes >= 1 and max_depth >= 0, got {max_nodes} and {max_depth}")
    k = min(len(acc), max_nodes - 1)
    worth = np.full((max_nodes + 1, max_depth + 1, k + 1), -np.inf)
    worth[1, :, 0] = 1.0
    self._split = np.zeros(worth.shape, np.int64)
    n, y = np.arange(max_nodes + 1)[:, None], np.arange(max_nodes + 1)[None]
    inside = (y >= 1) & (y < n)
    for level in range(1, max_depth + 1):
      below = worth[:, level - 1].max(axis=-1)  # best subtree of a child, by size
      for b in range(1, k + 1):
        child = below[np.where(inside, n - y, 0)]
        # A child that is never accepted is worth 0, not 0 * -inf.
        gain = np.where(child == -np.inf, -np.inf, acc[b - 1] * np.maximum(child, 0.0))
        total = np.where(inside, worth[:, level, b - 1][None] + gain, -np.inf)
        self._split[:, level, b] = total.argmax(axis=1)
        worth[:, level, b] = total.max(axis=1)
    self._worth = worth
    self.tokens = worth.max(axis=-1)

  def tree(self, num_nodes: int, depth: int) -> StaticTree:
    """The best tree of that size and depth at most ``depth``, traced back."""
    if not self.tokens[num_nodes, depth] > -np.inf:
      raise UserError(
        f"no tree of {num_nodes} nodes has depth <= {depth} with at most "
        f"{self._worth.shape[-1] - 1} children a node"
      )
    paths: list[Path] = []

    def trace(n: int, level: int, path: Path) -> None:
      if path:
        paths.append(path)
      for b in range(int(self._worth[n, level].argmax()), 0, -1):
        rest = int(self._split[n, level, b])
        trace(n - rest, level - 1, (*path, b - 1))
        n = rest

    trace(num_nodes, depth, ())
    return StaticTree.from_paths(paths)


def best_tree(acceptance, num_nodes: int, max_depth: int) -> StaticTree:
  """The tree of ``num_nodes`` nodes that is worth most tokens per step."""
  return BestTrees(acceptance, num_nodes, max_depth).tree(num_nodes, max_depth)


def fastest_tree(
  acceptance, draft_seconds: float, verify_seconds: Mapping[int, float], max_depth: int = 16
) -> tuple[StaticTree, float]:
  """The tree of fewest seconds per token, and these.

  Args:
    acceptance: ``[K]``, see the module.
    draft_seconds: of one pass of the draft model, which is one level of the tree.
    verify_seconds: of the target's pass by number of nodes, the root included; trees have one of
      these sizes. With size 1, plain decoding competes as the tree without drafts.
  """
  if not verify_seconds or min(verify_seconds) < 1:
    raise UserError(f"verify_seconds needs sizes >= 1, got {sorted(verify_seconds)}")
  best = BestTrees(acceptance, max(verify_seconds), max_depth)
  choices = [
    ((level * draft_seconds + seconds) / best.tokens[n, level], n, level)
    for n, seconds in verify_seconds.items()
    for level in range(max_depth + 1)
    if best.tokens[n, level] > -np.inf
  ]
  if not choices:
    raise UserError(
      f"no tree of {sorted(verify_seconds)} nodes fits depth {max_depth} with "
      f"{len(acceptance)} children a node"
    )
  seconds, n, level = min(choices)
  return best.tree(n, level), float(seconds)


def measure_acceptance(
  rule: Any,
  context: Context,
  draft_logits: Float[Array, "B V"],
  target_logits: Float[Array, "B V"],
  width: int,
  draws: str = "sampled",
) -> np.ndarray:
  """``acceptance [width]``: how often each of ``width`` children of a root is the accepted one.

  Args:
    rule: the ``Rule`` that will decide, ``WithoutReplacement()`` for example.
    context: one row for each position of the text, of which ``root`` (any token), ``length``,
      ``keys`` and ``sampler`` are used.
    draft_logits, target_logits: of the token after the root.
    draws: as the drafter will make them.
  """
  star = StaticTree.from_paths((i,) for i in range(width))
  tree = Sequoia(model=None, draws=draws, tree=star).grow(context, draft_logits, None)
  logits = jnp.repeat(target_logits[:, None], width + 1, axis=1)
  verdict = rule(tree, logits, context.sampler, context.keys, context.length)
  child = np.asarray(jnp.where(verdict.count > 1, verdict.path[:, 1], 0))
  return np.bincount(child, minlength=width + 1)[1:] / len(child)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequoia(SampledTree):
  """A static tree of draws.

  Attributes:
    tree: its shape, from ``best_tree`` or ``fastest_tree`` with what ``measure_acceptance`` gives.
      The default is the best one of 12 nodes and depth 4 where 60 % of first children are accepted
      and each further one half as often as the one before: a guess.
  """

  tree: StaticTree = dataclasses.field(
    default_factory=lambda: best_tree(
      0.6 * 0.5 ** np.arange(4) * np.array([1, 0.5, 0.5, 0.5]), 12, 4
    )
  )
  depth: int = dataclasses.field(init=False, default=0)

  name: ClassVar[str] = "sequoia"

  def __post_init__(self):
    if not self.tree.paths:
      raise UserError("sequoia needs a tree with drafts, got the root alone; decode without it")
    for path in self.tree.paths:
      if path[-1] and (*path[:-1], path[-1] - 1) not in self.tree.paths:
        raise UserError(f"sequoia's tree has the child {path} of a node without the draw before it")
    object.__setattr__(self, "depth", self.tree.max_depth)
    super().__post_init__()

  @property
  def num_nodes(self) -> int:
    return self.tree.num_nodes

  def fan(self, level):
    return int(self.tree.rank[self.tree.levels[level - 1]].max()) + 1

  def inner(self, level):
    has_children = np.isin(self.tree.levels[level - 1], self.tree.parent[1:])
    return np.flatnonzero(has_children)

  def keep(self, level, draws, carry):
    slots, above = self.tree.levels[level - 1], np.zeros(1, np.int64)
    if level > 1:
      above = self.tree.levels[level - 2][self.inner(level - 1)]
    b, _, k = draws.tokens.shape
    index = np.searchsorted(above, self.tree.parent[slots]) * k + self.tree.rank[slots]
    index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), (b, len(index)))
    return Kept(index, jnp.ones(index.shape, bool))
