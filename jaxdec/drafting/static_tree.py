# SPDX-License-Identifier: Apache-2.0
"""Static draft trees: a fixed shape written as child ranks, filled with tokens every step.

A tree is a tuple of paths, one per node below the root: ``(0, 2)`` is the third-best child of the
best child of the root. All index arrays are NumPy constants, so they cost nothing inside ``jit``.

``greedy_tree`` builds the best shape of a given size from measured accuracies (Medusa, arXiv
2401.10774, section 2.3.3): if the draft of depth d and rank r is right with probability
``acc[d-1, r]``, independently of the other depths, a node is on the accepted path with probability
``prod_d acc[d-1, r_d]``, tokens per step are ``1 + sum over nodes`` of it, and the N - 1 largest
products, which always form a tree, are optimal.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StaticTree:
  """A tree shape. ``paths`` are child ranks, sorted by (length, lexicographic), root left out."""

  paths: tuple[Path, ...]

  def __post_init__(self):
    known = {(), *self.paths}
    if len(known) != len(self.paths) + 1 or () in self.paths:
      raise UserError("a static tree needs distinct, non-empty paths of child ranks")
    for path in self.paths:
      if path[:-1] not in known:
        raise UserError(f"static tree path {path} has no parent; add {path[:-1]}")
    if list(self.paths) != sorted(self.paths, key=lambda p: (len(p), p)):
      raise UserError("static tree paths must be sorted by (length, ranks); use from_paths")

  @classmethod
  def from_paths(cls, paths: Iterable[Sequence[int]]) -> StaticTree:
    """Sorts the paths; every prefix of a path must be there too."""
    return cls(tuple(sorted({tuple(int(r) for r in p) for p in paths}, key=lambda p: (len(p), p))))

  @classmethod
  def chain(cls, length: int) -> StaticTree:
    """One path of best children, ``length`` drafts."""
    return cls(tuple((0,) * d for d in range(1, length + 1)))

  @property
  def num_nodes(self) -> int:
    """M, the root included."""
    return len(self.paths) + 1

  @functools.cached_property
  def max_depth(self) -> int:
    return max((len(p) for p in self.paths), default=0)

  @functools.cached_property
  def max_rank(self) -> int:
    """Number of ranks used at any node (table width that suffices)."""
    return max((r for p in self.paths for r in p), default=-1) + 1

  @functools.cached_property
  def parent(self) -> np.ndarray:
    """``[M]`` slot of each node's parent; the root's is 0."""
    slot = {(): 0} | {p: i + 1 for i, p in enumerate(self.paths)}
    return np.array([0] + [slot[p[:-1]] for p in self.paths], np.int32)

  @functools.cached_property
  def depth(self) -> np.ndarray:
    """``[M]`` distance from the root."""
    return np.array([0] + [len(p) for p in self.paths], np.int32)

  @functools.cached_property
  def rank(self) -> np.ndarray:
    """``[M]`` rank among the siblings; the root's is 0."""
    return np.array([0] + [p[-1] for p in self.paths], np.int32)

  @functools.cached_property
  def levels(self) -> tuple[np.ndarray, ...]:
    """Node slots of depth 1, 2, ..., D."""
    return tuple(np.flatnonzero(self.depth == d) for d in range(1, self.max_depth + 1))

  @functools.cached_property
  def branches(self) -> np.ndarray:
    """``[R, D]`` slots along the path to each leaf, root left out; padded with 0."""
    slot = {p: i + 1 for i, p in enumerate(self.paths)}
    inner = {p[:-1] for p in self.paths}
    leaves = [p for p in self.paths if p not in inner]
    out = np.zeros((len(leaves), self.max_depth), np.int32)
    for row, leaf in zip(out, sorted(leaves)):
      row[: len(leaf)] = [slot[leaf[: d + 1]] for d in range(len(leaf))]
    return out

  def truncated(self, num_nodes: int) -> StaticTree:
    """The first ``num_nodes - 1`` paths in level order (prefix-closed)."""
    return StaticTree(self.paths[: num_nodes - 1])

  def tree(self, tokens: Int[Array, "B M"], valid: Bool[Array, "B M"] | None = None) -> Tree:
    """Fills the shape with tokens (slot 0 = root); ``valid`` is made closed under ancestors."""
    b, m = tokens.shape
    ok = jnp.ones((b, m), bool)
    if valid is not None:
      own = valid.at[:, 0].set(True)
      ok = own
      for _ in range(self.max_depth):
        ok = own & ok[:, self.parent]
    return Tree(
      tokens=tokens.astype(jnp.int32),
      parent=jnp.broadcast_to(jnp.asarray(self.parent), (b, m)),
      depth=jnp.broadcast_to(jnp.asarray(self.depth), (b, m)),
      valid=ok,
      max_depth=self.max_depth,
    )


def greedy_tree(accuracy, num_nodes: int, max_depth: int | None = None) -> StaticTree:
  """The best static tree of ``num_nodes`` nodes, root included, under independent accuracies.

  Args:
    accuracy: ``[D, K]``; ``accuracy[d-1, r]`` = probability that the draft of rank r at depth d is
      right, given that its parent is (top-k accuracies differenced: column sums stay <= 1).
    num_nodes: M. Fewer nodes come back where fewer have positive probability.
    max_depth: optional bound on the depth.

  Raises:
    UserError: accuracies outside [0, 1] or not ``[D, K]``.
  """
  acc = np.asarray(accuracy, np.float64)
  if acc.ndim != 2 or not np.all((acc >= 0) & (acc <= 1)):
    raise UserError(f"accuracies must be [depth, rank] numbers in [0, 1], got shape {acc.shape}")
  limit = min(acc.shape[0], max_depth or acc.shape[0])
  # (-value, depth, path): best first, ties to the shallower and then the better-ranked node.
  heap = [(-acc[0, r], 1, (r,)) for r in range(acc.shape[1]) if acc[0, r] > 0]
  heapq.heapify(heap)
  paths: list[Path] = []
  while heap and len(paths) < num_nodes - 1:
    value, depth, path = heapq.heappop(heap)
    paths.append(path)
    if depth < limit:
      for r in range(acc.shape[1]):
        if acc[depth, r] > 0:
          heapq.heappush(heap, (value * acc[depth, r], depth + 1, (*path, r)))
  return StaticTree.from_paths(paths)


def expected_tokens(tree: StaticTree, accuracy) -> float:
  """Expected tokens per step of a static tree under independent accuracies, bonus included."""
  acc = np.asarray(accuracy, np.float64)
  return 1.0 + float(sum(np.prod([acc[d, r] for d, r in enumerate(path)]) for path in tree.paths))
