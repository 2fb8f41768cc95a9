# SPDX-License-Identifier: Apache-2.0
"""Who decides: the rules that turn target logits at tree nodes into an accepted path.

* ``match`` (default, lossless): one target draw per position, keyed by (request, position); a draft
  is accepted iff it equals the draw. Output equals plain decoding token for token, for any drafter
  and any tree.
* ``ratio`` (lossless in law): speculative sampling of chains drawn from a known law q (Leviathan et
  al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
* ``typical_lossy`` (NOT lossless): Medusa's typical acceptance (arXiv 2401.10774, section 2.3.2).

At temperature 0 all three are the greedy comparison, which is exact.

Index law, the same for all: the logits of node i judge its children; the token they predict sits at
absolute position ``length + depth[i] + 1``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdec.decoding.sampling import (
  ACCEPT,
  RESAMPLE,
  Sampler,
  gumbel,
  position_keys,
)
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError, nearest


@struct.dataclass
class Verdict:
  """What a rule decided, before stop tokens and budgets cut it.

  Attributes:
    path: accepted node ids, root first; entries beyond ``count`` repeat the last one.
    count: accepted drafts + 1, so at least 1.
    tokens: ``tokens[b, :count[b]]`` are emitted: drafts on the path, then the target's own token.
  """

  path: Int[Array, "B P"]
  count: Int[Array, "B"]
  tokens: Int[Array, "B P"]


class Rule:
  """Base class; rules are frozen dataclasses, so they are static under ``jit``.

  Attributes:
    lossless: whether the emitted text has the law of plain decoding.
    needs_draft_probs: whether ``tree.draft_probs`` must be there.
  """

  name: ClassVar[str]
  lossless: ClassVar[bool] = True
  needs_draft_probs: ClassVar[bool] = False

  def __call__(
    self,
    tree: Tree,
    logits: Float[Array, "B M V"],
    sampler: Sampler,
    keys: Key[Array, "B"],
    length: Int[Array, "B"],
  ) -> Verdict:
    """Args:

    tree: node 0 is the root. logits: the target's, at every node.
    keys: request keys. length: tokens in the target's state, root excluded.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Match(Rule):
  """Draw the target's token at the root, step to the child that holds it, draw there, and so on.

  Only nodes on the realised path are ever drawn at: a tree of M nodes costs ``count`` rows of noise
  and sampling instead of M. Siblings with equal tokens are all followed, so the deepest match wins.
  """

  name: ClassVar[str] = "match"

  def __call__(self, tree, logits, sampler, keys, length):
    batch, nodes = tree.tokens.shape
    width = tree.max_depth + 1
    rows = jnp.arange(batch)
    nodes_index = jnp.arange(nodes, dtype=jnp.int32)

    def alive(carry):
      depth, moved, *_ = carry
      return (depth < width) & jnp.any(moved)

    def descend(carry):
      depth, moved, on, best, count, tokens = carry
      # All nodes in ``on`` spell the same text; the first stands for them.
      here = jnp.min(jnp.where(on, nodes_index, nodes - 1), axis=1)
      drawn = sampler.draw(logits[rows, here], keys, length + depth + 1)
      best = jnp.where(moved, here, best)
      count = count + moved
      tokens = jax.lax.dynamic_update_slice(tokens, drawn[:, None], (0, depth))
      child_of_on = jnp.take_along_axis(on, tree.parent, axis=1)
      on = child_of_on & tree.valid & (tree.tokens == drawn[:, None])
      on = on & (tree.depth == depth + 1) & moved[:, None]
      return depth + 1, jnp.any(on, axis=1), on, best, count, tokens

    root = jnp.broadcast_to(nodes_index == 0, (batch, nodes))
    zeros = jnp.zeros(batch, jnp.int32)
    start = (
      jnp.int32(0),
      jnp.ones(batch, bool),
      root,
      zeros,
      zeros,
      jnp.zeros((batch, width), jnp.int32),
    )
    *_, best, count, tokens = jax.lax.while_loop(alive, descend, start)
    return Verdict(path_to(tree, best), count, tokens)


@dataclasses.dataclass(frozen=True)
class Ratio(Rule):
  """Accept draft x with probability ``min(1, p(x)/q(x))``; at the first rejection draw from
  ``max(p - q, 0)``, after the last draft (or the last valid one) from p.

  Chains only; ``tree.draft_probs`` must be the law every draft was really drawn from, and the
  drafts' noise must be independent of the ACCEPT and RESAMPLE noise of their positions.
  """

  name: ClassVar[str] = "ratio"
  needs_draft_probs: ClassVar[bool] = True

  def __call__(self, tree, logits, sampler, keys, length):
    if sampler.greedy:
      return Match()(tree, logits, sampler, keys, length)
    if tree.draft_probs is None or tree.max_depth != tree.tokens.shape[1] - 1:
      raise UserError(
        "rule 'ratio' needs a chain of drafts sampled from a known law (draft_probs); "
        "use rule='match', which is exact for every drafter"
      )
    p = jnp.exp(sampler.log_probs(logits))  # row i: law after i drafts
    q = jnp.where(tree.valid[..., None], tree.draft_probs, 0.0)[:, 1:]
    x = tree.tokens[:, 1:, None]
    width = tree.tokens.shape[1]
    position = length[:, None] + jnp.arange(1, width + 1)  # of the token row i predicts
    u = _uniform(position_keys(keys, position[:, :-1], ACCEPT))
    p_x = jnp.take_along_axis(p[:, :-1], x, axis=-1)[..., 0]
    q_x = jnp.take_along_axis(q, x, axis=-1)[..., 0]
    # Strict: p(x) = 0 is never accepted, not even at u = 0.
    ok = (u * q_x < p_x) & tree.valid[:, 1:]
    accepted = jnp.sum(jnp.cumprod(ok, axis=1), axis=1, dtype=jnp.int32)
    # One row of zeros after the last draft, and q = 0 at drafts that were not made: there the
    # residual is p itself.
    q = jnp.concatenate([q, jnp.zeros_like(q[:, :1])], axis=1)
    rows = jnp.arange(x.shape[0])
    p_a = p[rows, accepted]
    residual = jnp.maximum(p_a - q[rows, accepted], 0.0)
    residual = jnp.where(jnp.sum(residual, -1, keepdims=True) > 0, residual, p_a)
    noise = gumbel(position_keys(keys, position[rows, accepted], RESAMPLE), p.shape[-1])
    final = argmax(jnp.log(residual) + noise)
    tokens = jnp.concatenate([tree.tokens[:, 1:], jnp.zeros_like(tree.tokens[:, :1])], axis=1)
    index = jnp.arange(width)
    tokens = jnp.where(index == accepted[:, None], final[:, None], tokens)
    path = jnp.broadcast_to(jnp.minimum(index, accepted[:, None]), tokens.shape).astype(jnp.int32)
    return Verdict(path, accepted + 1, tokens)


@dataclasses.dataclass(frozen=True)
class TypicalLossy(Rule):
  """NOT lossless. Accept draft x where ``p(x) > min(epsilon, delta * exp(-H(p)))``, H in nats.

  Keeps the longest accepted path, among those the most probable one, then emits the argmax of p
  (``sample_next``: a draw from p instead). ``epsilon`` near 1 with a large ``delta`` accepts
  nothing uncertain.
  """

  epsilon: float = 0.09
  delta: float = 0.3
  sample_next: bool = False

  name: ClassVar[str] = "typical_lossy"
  lossless: ClassVar[bool] = False

  def __call__(self, tree, logits, sampler, keys, length):
    if sampler.greedy:
      return Match()(tree, logits, sampler, keys, length)
    log_p = sampler.log_probs(logits)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
    threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
    rows = jnp.arange(tree.tokens.shape[0])[:, None]
    p_node = p[rows, tree.parent, tree.tokens]
    ok = tree.valid & (p_node > threshold[rows, tree.parent])
    on, log_path = tree.depth == 0, jnp.zeros(p_node.shape)
    for depth in range(1, tree.max_depth + 1):
      here = (tree.depth == depth) & ok & jnp.take_along_axis(on, tree.parent, axis=1)
      log_path = jnp.where(
        here, jnp.take_along_axis(log_path, tree.parent, axis=1) + jnp.log(p_node), log_path
      )
      on = on | here
    deepest = jnp.max(jnp.where(on, tree.depth, 0), axis=1)
    best = argmax(jnp.where(on & (tree.depth == deepest[:, None]), log_path, -jnp.inf))
    path = path_to(tree, best)
    chosen = logits[rows[:, 0], best]
    final = sampler.draw(chosen, keys, length + deepest + 1) if self.sample_next else argmax(chosen)
    tokens = jnp.take_along_axis(tree.tokens, path, axis=1)
    tokens = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    tokens = jnp.where(jnp.arange(tokens.shape[1]) == deepest[:, None], final[:, None], tokens)
    return Verdict(path, deepest + 1, tokens)


RULES: dict[str, Rule] = {rule.name: rule for rule in (Match(), Ratio(), TypicalLossy())}


def get_rule(rule: str | Rule) -> Rule:
  """The rule of that name, or the object itself."""
  if isinstance(rule, Rule):
    return rule
  if rule not in RULES:
    raise UserError(f"unknown rule {rule!r}{nearest(str(rule), RULES)}; known: {', '.join(RULES)}")
  return RULES[rule]


def path_to(tree: Tree, node: Int[Array, "B"]) -> Int[Array, "B P"]:
  """Node ids from the root to ``node``; entries beyond its depth repeat it."""
  steps, here = [], node
  for _ in range(tree.max_depth + 1):
    steps.append(here)
    here = jnp.take_along_axis(tree.parent, here[:, None], axis=1)[:, 0]
  upwards = jnp.stack(steps, axis=1)  # node, its parent, ..., root, root, ...
  depth = jnp.take_along_axis(tree.depth, node[:, None], axis=1)
  index = jnp.maximum(depth - jnp.arange(tree.max_depth + 1), 0)
  return jnp.take_along_axis(upwards, index, axis=1).astype(jnp.int32)


def match_whole_tree(
  tree: Tree,
  logits: Float[Array, "B M V"],
  sampler: Sampler,
  keys: Key[Array, "B"],
  length: Int[Array, "B"],
) -> Verdict:
  """``Match`` without a loop, drawing at every node: the specification the tests hold it to.

  One noise row per depth, shared by the nodes of equal depth.
  """
  drawn = sampler.draw(logits, keys, length[:, None] + tree.depth + 1)
  hit = tree.valid & (tree.tokens == jnp.take_along_axis(drawn, tree.parent, axis=1))
  hit = hit.at[:, 0].set(True)
  on: Bool[Array, "B M"] = ~jnp.any(tree.topology.ancestors & ~hit[:, None], axis=-1)
  depth = jnp.where(on, tree.depth, -1)
  best = argmax(depth)
  path = path_to(tree, best)
  return Verdict(path, jnp.max(depth, axis=1) + 1, jnp.take_along_axis(drawn, path, axis=1))


def _uniform(keys: Key[Array, "B T"]) -> Float[Array, "B T"]:
  return jax.vmap(jax.vmap(jax.random.uniform))(keys)
