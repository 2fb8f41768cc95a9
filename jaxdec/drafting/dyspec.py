# SPDX-License-Identifier: Apache-2.0
"""DySpec (arXiv 2410.11744): trees that grow where acceptance is likely.

With q the chance of acceptance, a node is worth ``v``, the product of q along its path. Before the
k-th child of a node is drawn, the draws still to come from that node are worth

  w_k = v (1 - sum_{j<k} q[x_j])

the mass its earlier children left. The draw of largest w is made next, and kept *whatever it is*;
its own value is ``v q[x_k]``. A choice by the value after the draw, which a tree of fixed drafts
may make, would look at the token and change the law.

Here: the ``width`` best draws of each level are made (w never grows along a path or among
siblings), then the ``num_nodes - 1`` of largest w are kept, which is the greedy order's tree as
long as none of its levels is wider than ``width``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxdec.drafting.rsd import beam_widths
from jaxdec.drafting.sampled_tree import Draws, Kept, SampledTree
from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError
from jaxdec.mixers.base import gather_nodes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DySpec(SampledTree):
  """Attributes:

  num_nodes: M, root included. width: most nodes of a level. threshold: draws worth no more are not
  made, which leaves slots unused (about 1/M in the paper's threshold form).
  """

  num_nodes: int = 12
  width: int = 4
  threshold: float = 0.0

  name: ClassVar[str] = "dyspec"

  def __post_init__(self):
    super().__post_init__()
    if self.width < 1 or not 0 <= self.threshold < 1:
      raise UserError(
        f"dyspec needs width >= 1 and a threshold from 0 to below 1, got {self.width} and "
        f"{self.threshold}"
      )
    most = 1 + sum(beam_widths(self.width, self.fan(1), self.depth))
    if not 2 <= self.num_nodes <= most:
      raise UserError(
        f"a dyspec tree of width {self.width} and depth {self.depth} has 2 to {most} nodes, got "
        f"num_nodes={self.num_nodes}"
      )

  def fan(self, level):
    return min(self.width, self.vocab_size)

  def keep(self, level, draws, carry):
    b, n, k = draws.tokens.shape
    value, worths = carry if carry is not None else (jnp.ones((b, 1)), ())
    before, after = self.values(value, draws)
    flat = lambda x: x.reshape(b, n * k)  # noqa: E731
    worth, index = jax.lax.top_k(flat(before), min(self.width, n * k))
    ok = worth > self.threshold
    value = jnp.where(ok, jnp.take_along_axis(flat(after), index, axis=1), 0.0)
    return Kept(index, ok, (value, (*worths, worth)))

  def values(self, value, draws: Draws):
    """``w`` and the value after the draw, ``[B,n,K]``; w never grows with k."""
    possible = draws.perturbed > -jnp.inf
    q = jnp.where(possible, jnp.exp(draws.log_q), 0.0)
    # A sum that rounding brought up to 1 still leaves room for tokens there are.
    left = jnp.maximum(1 - (jnp.cumsum(q, axis=-1) - q), jnp.finfo(q.dtype).tiny)
    left = jnp.where(possible, jax.lax.cummin(left, axis=2), 0.0)
    return value[..., None] * left, value[..., None] * jnp.minimum(q, left)

  def select(self, tree, carry):
    worth = jnp.where(tree.valid[:, 1:], jnp.concatenate(carry[1], axis=1), -1.0)
    # Ties go to the earlier node, and no parent comes after its child: the kept set is connected.
    kept = jax.lax.top_k(worth, self.num_nodes - 1)[1] + 1
    return take(tree, jnp.sort(kept, axis=1))


def take(tree: Tree, kept) -> Tree:
  """The root and the nodes ``kept [B,n]``, ascending and closed under parents."""
  kept = jnp.concatenate([jnp.zeros_like(kept[:, :1]), kept], axis=1)
  pick = lambda x: jnp.take_along_axis(x, kept, axis=1)  # noqa: E731
  # A slot that is not in use may have lost its parent: it hangs from the root.
  at = pick(tree.parent)[:, :, None] == kept[:, None]
  return tree.replace(
    tokens=pick(tree.tokens),
    parent=jnp.where(pick(tree.valid), jnp.argmax(at, axis=-1), 0).astype(jnp.int32),
    depth=jnp.where(pick(tree.valid), pick(tree.depth), 1).at[:, 0].set(0),
    valid=pick(tree.valid),
    draft_probs=None if tree.draft_probs is None else gather_nodes(tree.draft_probs, kept),
  )
