# SPDX-License-Identifier: Apache-2.0
"""Continuations found at many places of a text, counted into one chain or one tree.

Row r holds what followed the r-th occurrence. A *hypothesis* is a set of occurrences, the first
``sizes[h]`` rows (all that share a context of some length, say). Under it a prefix has probability

  (rows of the hypothesis that begin with it) / totals[h],

and the hypothesis is worth the sum of the probabilities of what it would draft: the tokens it is
expected to get right. The best hypothesis drafts; ties go to the last one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.merge import shared_prefixes
from jaxdec.drafting.selection import argmax, top_k

TIE = 1e-4  # scores are sums of rounded fractions
_ULP = 1e-6  # a probability of exactly ``floor`` is enough


@struct.dataclass
class Counted:
  """Continuations of one text with the probability of each prefix, and their worth."""

  tokens: Int[Array, "R T"]
  valid: Bool[Array, "R T"]
  weight: Float[Array, "R T"]
  score: Float[Array, ""]


def counted_tree(
  tokens: Int[Array, "m T"],
  valid: Bool[Array, "m T"],
  sizes: Int[Array, "h"],
  totals: Int[Array, "h"],
  budgets: Int[Array, "h"],
  floor: float,
  keep: int,
) -> Counted:
  """The best-first tree: the ``budgets[h]`` likeliest prefixes of probability ``floor`` or more.

  Ties: shallower first, then earlier rows.

  Args:
    valid: prefix-closed.
    keep: most nodes, and most rows of the result.
  """
  rows, length = tokens.shape
  keep = min(keep, rows * length)
  prefix = shared_prefixes(tokens, valid)
  first = jnp.argmax(prefix, axis=1)  # [r, t]: the row that owns the node
  owned = valid & (first == jnp.arange(rows)[:, None])
  member = jnp.arange(rows) < sizes[:, None]
  counts = jnp.einsum("hq,rqt->hrt", member.astype(jnp.float32), prefix.astype(jnp.float32))
  value = counts / jnp.maximum(totals, 1)[:, None, None]
  # The earliest row of a prefix is in every hypothesis that has the prefix: owners are common.
  open_ = owned & member[:, :, None] & (value > floor - _ULP)
  flat = jnp.where(open_, value, 0.0).transpose(0, 2, 1).reshape(-1, length * rows)
  top, at = top_k(flat, keep)
  taken = (jnp.arange(keep) < budgets[:, None]) & (top > 0)
  best, score = _best(jnp.sum(jnp.where(taken, top, 0.0), axis=1))
  kept = jnp.zeros(length * rows, bool)
  kept = kept.at[jnp.where(taken[best], at[best], length * rows)].set(True, mode="drop")
  kept = kept.reshape(length, rows).T
  owners = jnp.any(kept, axis=1)  # these rows spell the whole tree
  order = jnp.where(owners, rows - jnp.arange(rows), 0)
  _, chosen = jax.lax.top_k(order, min(keep, rows))
  inside = valid & kept[first, jnp.arange(length)]
  return Counted(tokens[chosen], inside[chosen] & owners[chosen, None], value[best][chosen], score)


def counted_path(
  tokens: Int[Array, "m T"],
  valid: Bool[Array, "m T"],
  sizes: Int[Array, "h"],
  totals: Int[Array, "h"],
  budgets: Int[Array, "h"],
  floor: float,
) -> Counted:
  """The greedy chain: always the commonest next token, as far as its prefix's probability is
  ``floor`` or more, ``budgets[h]`` tokens at most. Ties: earlier rows."""
  alive = jnp.arange(tokens.shape[0]) < sizes[:, None]  # [h, m]

  def extend(carry, column):
    alive, going = carry
    token, ok, t = column
    alive = alive & ok
    same = (token[:, None] == token[None]).astype(jnp.float32)
    counts = jnp.where(alive, alive.astype(jnp.float32) @ same, 0.0)
    pick = argmax(counts)
    value = jnp.take_along_axis(counts, pick[:, None], 1)[:, 0] / jnp.maximum(totals, 1)
    going = going & (value > 0) & (value > floor - _ULP) & (t < budgets)
    alive = alive & (token == token[pick][:, None])
    return (alive, going), (token[pick], going, value)

  start = (alive, jnp.ones(sizes.shape, bool))
  steps = (tokens.T, valid.T, jnp.arange(tokens.shape[1]))
  _, (drafts, going, value) = jax.lax.scan(extend, start, steps)  # [T, h]
  best, score = _best(jnp.sum(jnp.where(going, value, 0.0), axis=0))
  return Counted(drafts[:, best][None], going[:, best][None], value[:, best][None], score)


def _best(score: Float[Array, "h"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
  top = jnp.max(score)
  return jnp.max(jnp.where(score > top - TIE, jnp.arange(score.shape[0]), 0)), top
