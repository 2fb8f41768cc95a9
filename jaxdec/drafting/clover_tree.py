# SPDX-License-Identifier: Apache-2.0
"""Clover's draft tree (arXiv 2405.00263): few candidates, none of them unlikely.

A token is a candidate below its parent while it is

  in the draft law's nucleus: tokens likelier than it hold less than ``top_p``, and
  no less likely than ``ratio`` times the likeliest.

Of a level's candidates the likeliest paths, by the product of their tokens' probabilities, are
kept, as many as ``num_nodes - 1`` less what the levels above have used; at most ``width`` below a
node and on a level. A sure drafter thus spends its nodes on depth and verifies fewer in all.

The paper gives the quarter; ``top_p`` is the user's. With coupled noise (``TrainedDrafter``) tokens
are ranked with it and judged without, and the first of them is kept in any case.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdec.drafting.dynamic_tree import DynamicTree, Perturb, Step, assemble
from jaxdec.drafting.selection import top_k
from jaxdec.drafting.tree import Tree


def expand_clover(
  step: Step,
  carry: Any,
  logits: Float[Array, "B V"],
  root: Int[Array, "B"],
  spec: DynamicTree,
  *,
  top_p: float,
  ratio: float,
  perturb: Perturb | None = None,
  ids: Int[Array, "V"] | None = None,
) -> Tree:
  """Grows Clover's tree of up to ``num_nodes`` nodes. Arguments as in ``expand_dynamic``.

  ``spec`` must ask for no more drafts than ``width`` a level.
  """
  b, k = root.shape[0], spec.width

  def children(scores, level, cumulative):
    """Scores (-inf: no candidate) and tokens of each fed node's children, ``[B,n,k]``."""
    log_probs = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
    best, index = top_k(log_probs, k)
    if perturb is not None:
      index = top_k(perturb(scores, level), k)[1]
    own = jnp.take_along_axis(log_probs, index, axis=-1)
    likely = own >= candidate_floor(best, top_p, ratio)
    likely = likely.at[..., 0].set(True)
    index = index if ids is None else ids[index]
    own = cumulative[:, :, None] + jnp.where(likely, own, -jnp.inf)
    return own, jnp.broadcast_to(index, own.shape)

  score, frontier = jnp.zeros((b, 1)), jnp.full((b, 1), -1)
  scores, left = logits[:, None], jnp.full((b, 1), spec.num_nodes - 1)
  tokens, parents, valid, depths, size = [], [], [], [], 0
  for level in range(1, spec.max_depth + 1):
    joint, drafted = children(scores, level - 1, score)
    score, best = jax.lax.top_k(joint.reshape(b, -1), k)
    token = jnp.take_along_axis(drafted.reshape(b, -1), best, axis=1)
    keep = (score > -jnp.inf) & (jnp.arange(k) < left)
    score, left = jnp.where(keep, score, -jnp.inf), left - jnp.sum(keep, axis=1, keepdims=True)
    fed = best // k
    tokens.append(token)
    parents.append(jnp.take_along_axis(frontier, fed, axis=1))
    valid.append(keep)
    depths.append(np.full(k, level))
    frontier, size = jnp.broadcast_to(size + jnp.arange(k), (b, k)), size + k
    if level < spec.max_depth:
      scores, carry = step(carry, level, token, fed)
  valid = jnp.concatenate(valid, axis=1)
  kept = jax.lax.top_k(valid.astype(jnp.int32), spec.num_nodes - 1)[1]
  return assemble(root, tokens, parents, depths, kept, spec, valid)


def candidate_floor(
  best: Float[Array, "... k"], top_p: float, ratio: float
) -> Float[Array, "... 1"]:
  """The least log-probability of a candidate, ``best`` being the largest ones in order."""
  prob = jnp.exp(best)
  inside = jnp.cumsum(prob, axis=-1) - prob < top_p
  inside &= prob >= ratio * prob[..., :1]
  return jnp.min(jnp.where(inside, best, jnp.inf), axis=-1, keepdims=True)
