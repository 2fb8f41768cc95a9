# SPDX-License-Identifier: Apache-2.0
"""Random draft trees: any shape, duplicate siblings and invalid nodes included."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdec.drafting.tree import Tree


def random_tree(rng: jax.Array, root: jax.Array, tokens: jax.Array, max_depth: int) -> Tree:
  """Parents drawn uniformly among the earlier nodes with room below; a tenth of the nodes invalid.

  Args:
    tokens: ``[B, M-1]`` what to put at the nodes.
  """
  b, drafts = tokens.shape
  parents, depths = [jnp.zeros(b, jnp.int32)], [jnp.zeros(b, jnp.int32)]
  keys = jax.random.split(rng, drafts + 1)
  for i in range(1, drafts + 1):
    parent = jax.random.randint(keys[i], (b,), 0, i)
    above = jnp.stack(depths, axis=1)[jnp.arange(b), parent]
    parent = jnp.where(above < max_depth, parent, 0)
    depth = jnp.where(above < max_depth, above, 0) + 1
    parents.append(parent)
    depths.append(depth)
  valid = jax.random.uniform(keys[0], (b, drafts)) > 0.1
  return Tree(
    tokens=jnp.concatenate([root[:, None], tokens], axis=1).astype(jnp.int32),
    parent=jnp.stack(parents, axis=1),
    depth=jnp.stack(depths, axis=1),
    valid=jnp.concatenate([jnp.ones((b, 1), bool), valid], axis=1),
    max_depth=max_depth,
  )
