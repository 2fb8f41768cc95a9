# SPDX-License-Identifier: Apache-2.0
"""Several candidate paths as one tree: shared prefixes once, the heaviest M - 1 nodes kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.tree import Tree


def merge_paths(
  root: Int[Array, "B"],
  tokens: Int[Array, "B R L"],
  valid: Bool[Array, "B R L"],
  weight: Float[Array, "B R"] | Float[Array, "B R L"],
  num_nodes: int,
) -> Tree:
  """Merges R candidate continuations of the root.

  Node (r, j) stands for the first j + 1 tokens of path r; equal prefixes belong to the first path
  that has them. The ``num_nodes - 1`` heaviest are kept (ties: shallower first, then earlier path),
  which always is a tree: weights never grow with depth.

  Args:
    valid: made prefix-closed.
    weight: ``[B, R]`` votes, positive: a prefix weighs the sum over the paths that have it.
      ``[B, R, L]`` what each prefix is worth, such as the probability that it is accepted, never
      growing with j: where paths share a prefix, the largest value counts.
  """
  return _merged(root, tokens, valid, weight, num_nodes, by_level=True)[0]


def rank_paths(
  root: Int[Array, "B"],
  tokens: Int[Array, "B R L"],
  valid: Bool[Array, "B R L"],
  weight: Float[Array, "B R L"],
  num_nodes: int,
) -> tuple[Tree, Float[Array, "B M"]]:
  """``merge_paths`` with the nodes in the order of their worth, and that worth.

  The first m nodes are the best tree of m nodes, for every m. The root is worth 1, unused slots 0.
  """
  return _merged(root, tokens, valid, weight, num_nodes, by_level=False)


def _merged(root, tokens, valid, weight, num_nodes, by_level):
  closed = jnp.cumprod(valid, axis=-1).astype(bool)
  merge = jax.vmap(lambda *a: _merge(*a, num_nodes - 1, by_level))
  node_tokens, parent, depth, ok, worth = merge(tokens, closed, weight)
  b = root.shape[0]
  zero = jnp.zeros((b, 1), jnp.int32)
  tree = Tree(
    tokens=jnp.concatenate([root[:, None], node_tokens], axis=1).astype(jnp.int32),
    parent=jnp.concatenate([zero, parent], axis=1),
    depth=jnp.concatenate([zero, depth], axis=1),
    valid=jnp.concatenate([jnp.ones((b, 1), bool), ok], axis=1),
    max_depth=tokens.shape[-1],
  )
  return tree, jnp.concatenate([jnp.ones((b, 1)), worth], axis=1)


def shared_prefixes(tokens: Int[Array, "R L"], valid: Bool[Array, "R L"]) -> Bool[Array, "R R L"]:
  """``[r, s, j]``: the first j + 1 tokens of paths r and s are valid and equal."""
  same = (tokens[:, None] == tokens[None]) & valid[:, None] & valid[None]
  return jnp.cumprod(same, axis=-1).astype(bool)


def _merge(c, ok, weight, keep, by_level):
  paths, length = c.shape
  prefix = shared_prefixes(c, ok)
  first = jnp.argmax(prefix, axis=1)  # [r, j]: the path that owns the node
  owned = ok & (first == jnp.arange(paths)[:, None])
  if weight.ndim == 1:
    value = jnp.einsum("rsj,s->rj", prefix.astype(jnp.float32), weight)
  else:
    value = jnp.max(jnp.where(prefix, weight, 0.0), axis=1)
  r, j = jnp.meshgrid(jnp.arange(paths), jnp.arange(length), indexing="ij")
  flat = lambda x: x.reshape(-1).astype(jnp.int32)  # noqa: E731
  cost = jnp.where(owned, -value, jnp.inf).reshape(-1)
  cost, j, r = jax.lax.sort((cost, flat(j), flat(r)), num_keys=3)
  kept = jnp.arange(paths * length) < jnp.minimum(keep, jnp.sum(owned))
  j = jnp.where(kept, j, length)  # unused slots last
  if by_level:
    j, r, cost = jax.lax.sort((j, r, cost), num_keys=1, is_stable=True)
  size = min(keep, paths * length)
  j, r, cost = j[:size], r[:size], cost[:size]
  valid = j < length
  slot = (
    jnp.zeros((paths, length), jnp.int32)
    .at[r, j]
    .set(jnp.arange(1, size + 1, dtype=jnp.int32), mode="drop")
  )
  above = jnp.maximum(j - 1, 0)
  parent = jnp.where(valid & (j > 0), slot[first[r, above], above], 0)
  depth = jnp.where(valid, j + 1, 1)  # unused slots: children of the root, never accepted
  node_tokens = jnp.where(valid, c[r, jnp.minimum(j, length - 1)], 0)
  pad = (0, keep - size)
  return tuple(
    jnp.pad(x, pad, constant_values=v)
    for x, v in (
      (node_tokens, 0),
      (parent, 0),
      (depth, 1),
      (valid, False),
      (jnp.where(valid, -cost, 0.0), 0.0),
    )
  )
