# SPDX-License-Identifier: Apache-2.0
"""Draft trees: topology is data, the number of nodes M is static (one compilation per M).

Node 0 is the root: the last emitted token, whose key and value are not in the cache yet. Parents
come before their children. ``valid`` is False for unused slots and for probe nodes, which are
computed with the rest but never accepted.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.mixers.base import Topology, ancestors_from_parents


@struct.dataclass
class Tree:
  """A batch of draft trees.

  Attributes:
    tokens: proposed token ids; ``tokens[:, 0]`` is the root.
    parent: parent slot of each node, ``parent[:, 0] = 0`` and ``parent[:, i] < i``.
    depth: distance from the root.
    valid: True for the root and for nodes that may be accepted.
    max_depth: static bound on ``depth`` (D).
    draft_probs: for *sampled* drafts, the law q each node was drawn from, ``[B,M,V]`` (row i is the
      law of node i, before its earlier siblings were taken out; row 0 unused); None when the
      children are a fixed set. Siblings come in the order they were drawn in, by ascending node id.
  """

  tokens: Int[Array, "B M"]
  parent: Int[Array, "B M"]
  depth: Int[Array, "B M"]
  valid: Bool[Array, "B M"]
  max_depth: int = struct.field(pytree_node=False)
  draft_probs: Float[Array, "B M V"] | None = None

  @property
  def topology(self) -> Topology:
    """What a mixer needs: depths and the ancestor matrix. Invalid nodes keep their ancestors."""
    return Topology(self.depth, ancestors_from_parents(self.parent, self.max_depth))


def chain(
  root: Int[Array, "B"],
  drafts: Int[Array, "B G"],
  valid: Bool[Array, "B G"] | None = None,
  draft_probs: Float[Array, "B G V"] | None = None,
) -> Tree:
  """A tree with one path: root, then ``drafts`` in order (validity is made prefix-closed)."""
  b, g = drafts.shape
  index = jnp.arange(g + 1, dtype=jnp.int32)
  ok = jnp.ones((b, g), bool) if valid is None else jnp.cumprod(valid, axis=1).astype(bool)
  if draft_probs is not None:
    draft_probs = jnp.concatenate([jnp.zeros_like(draft_probs[:, :1]), draft_probs], axis=1)
  return Tree(
    tokens=jnp.concatenate([root[:, None], drafts], axis=1).astype(jnp.int32),
    parent=jnp.broadcast_to(jnp.maximum(index - 1, 0), (b, g + 1)),
    depth=jnp.broadcast_to(index, (b, g + 1)),
    valid=jnp.concatenate([jnp.ones((b, 1), bool), ok], axis=1),
    max_depth=g,
    draft_probs=draft_probs,
  )
