# SPDX-License-Identifier: Apache-2.0
"""Rules of drafters that are trusted: the target's law is not kept, at any temperature."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxdec.decoding.verify.base import Rule, longest_path, verdict_at
from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError


class Trusting(Rule):
  """Base: the longest path of accepted drafts, then the target's own token."""

  lossless: ClassVar[bool] = False

  def accepts(self, tree: Tree, log_p, log_p_node):
    """``[B, M]``, from the log law at every node's parent and of the node's token."""
    raise NotImplementedError

  def __call__(self, tree, logits, sampler, keys, length):
    rows = jnp.arange(tree.tokens.shape[0])
    z = logits.astype(jnp.float32) if sampler.greedy else sampler.process(logits)
    at_parent = z[rows[:, None], tree.parent]
    own = jnp.take_along_axis(at_parent, tree.tokens[..., None], axis=-1)[..., 0]
    ok = tree.valid & self.accepts(tree, at_parent, own)
    # Tokens of no probability may be trusted too: very improbable, but a path nevertheless.
    log_p = jnp.maximum(own - jnp.max(at_parent, axis=-1), -1e6)
    best = longest_path(tree, ok, log_p)
    position = length + tree.depth[rows, best] + 1
    return verdict_at(tree, best, sampler.draw(logits[rows, best], keys, position))


@dataclasses.dataclass(frozen=True)
class GadLossy(Trusting):
  """NOT lossless. Generalized aggressive decoding, relaxed (GAD++, arXiv 2203.16487): accept draft
  x where it is among the ``top`` likeliest tokens and ``max log p - log p(x) <= tolerance``.

  ``top=1`` is the strict form, at temperature 0 plain greedy decoding. The law is the sampler's;
  at temperature 0 the model's own.
  """

  top: int = 5
  tolerance: float = 3.0

  name: ClassVar[str] = "gad_lossy"

  def __post_init__(self):
    if self.top < 1 or not self.tolerance >= 0:
      raise UserError(
        f"gad_lossy needs top >= 1 and tolerance >= 0, got {self.top} and {self.tolerance}"
      )

  def accepts(self, tree, log_p, log_p_node):
    ids = jnp.arange(log_p.shape[-1])
    tied = (log_p == log_p_node[..., None]) & (ids < tree.tokens[..., None])
    rank = jnp.sum((log_p > log_p_node[..., None]) | tied, axis=-1)
    return (rank < self.top) & (jnp.max(log_p, axis=-1) - log_p_node <= self.tolerance)


@dataclasses.dataclass(frozen=True)
class UnverifiedLossy(Trusting):
  """NOT lossless. Emit every valid draft, whatever the target says of it.

  For drafters that propose only what they are sure of, such as
  ``LexicalUnits(confidence=0.9)`` (arXiv 2405.15208).
  """

  name: ClassVar[str] = "unverified_lossy"

  def accepts(self, tree, log_p, log_p_node):
    return tree.valid
