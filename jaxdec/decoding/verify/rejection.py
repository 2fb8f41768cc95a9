# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling over the siblings of a node: drafts with a law, and the target's law kept."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdec.decoding.sampling import ACCEPT, RESAMPLE, gumbel, position_keys
from jaxdec.decoding.verify.base import Rule, verdict_at
from jaxdec.decoding.verify.match import Match
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError


class Rejection(Rule):
  """Base of the rules that test the children of a node one after the other.

  With P = p at the node and the children ``x_1, x_2, ...`` in ascending node id, child k proposed
  from the law ``Q_k``:

    u Q_k[x_k] < P[x_k]: step to it;  else  P <- max(P - Q_k, 0) / sum, on to the next child

  and when no child is left the next token is drawn from P. That token has the law p: one test
  emits ``min(P, Q) + (1 - sum min(P, Q)) max(P - Q, 0) / sum max(P - Q, 0) = P`` (arXiv
  2211.17192, appendix A.1), by induction from the last child to the first. Which children there are
  may depend on earlier draws, never on the token of the child in question. A subclass says what
  ``Q_k`` is. Uniforms are keyed by (position, k) and drawn only on the realised path.
  """

  def proposal(
    self, tree: Tree, child: Int[Array, "B"], gone: Bool[Array, "B V"]
  ) -> Float[Array, "B V"]:
    """``Q_k``. ``gone``: tokens of the siblings tested before. A child to which it gives no mass
    can't have been drawn from it: it is passed over."""
    raise NotImplementedError

  def __call__(self, tree, logits, sampler, keys, length):
    if sampler.greedy:
      return Match()(tree, logits, sampler, keys, length)
    if self.needs_draft_probs and tree.draft_probs is None:
      raise UserError(
        f"rule {self.name!r} needs drafts sampled from a known law (draft_probs); "
        "use rule='match', which is exact for every drafter"
      )
    batch, nodes = tree.tokens.shape
    rows, ids = jnp.arange(batch), jnp.arange(nodes, dtype=jnp.int32)
    vocabulary = jnp.arange(logits.shape[-1])

    def at(x, index):
      return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]

    def descend(carry):
      depth, moved, node, p = carry
      p = jnp.where(moved[:, None], jnp.exp(sampler.log_probs(logits[rows, node])), p)
      accept = position_keys(keys, length + depth + 1, ACCEPT)
      # The root is its own parent.
      children = (tree.parent == node[:, None]) & tree.valid & (ids > 0) & moved[:, None]

      def test(carry):
        k, left, chosen, p, gone = carry
        child = jnp.argmax(left, axis=1).astype(jnp.int32)
        token = at(tree.tokens, child)
        q = self.proposal(tree, child, gone)
        q_x, p_x = at(q, token), at(p, token)
        drawn = jnp.any(left, axis=1) & (q_x > 0)
        # Strict: p(x) = 0 is never accepted, not even at u = 0.
        ok = drawn & (_uniform(accept, k) * q_x < p_x)
        residual = jnp.maximum(p - q, 0.0)
        mass = jnp.sum(residual, axis=-1, keepdims=True)
        # No mass left means p = q up to rounding, so what was rejected is p itself.
        rejected = (drawn & ~ok)[:, None] & (mass > 0)
        p = jnp.where(rejected, residual / jnp.where(mass > 0, mass, 1.0), p)
        left = left & (ids > child[:, None]) & ~ok[:, None]
        gone = gone | (vocabulary == token[:, None])
        return k + 1, left, jnp.where(ok, child, chosen), p, gone

      start = (jnp.int32(0), children, jnp.zeros(batch, jnp.int32), p, jnp.zeros(p.shape, bool))
      _, _, chosen, p, _ = jax.lax.while_loop(lambda c: jnp.any(c[1]), test, start)
      moved = chosen > 0
      return depth + 1, moved, jnp.where(moved, chosen, node), p

    start = (
      jnp.int32(0),
      jnp.ones(batch, bool),
      jnp.zeros(batch, jnp.int32),
      jnp.zeros((batch, logits.shape[-1]), jnp.float32),
    )
    *_, node, p = jax.lax.while_loop(lambda c: jnp.any(c[1]), descend, start)
    last = length + at(tree.depth, node) + 1
    noise = gumbel(position_keys(keys, last, RESAMPLE), p.shape[-1])
    return verdict_at(tree, node, argmax(jnp.log(p) + noise))


@dataclasses.dataclass(frozen=True)
class MultiRound(Rejection):
  """Siblings drawn independently, each from its own law: SpecInfer's multi-step speculative
  sampling (arXiv 2305.09781).

  ``Q_k`` is ``tree.draft_probs`` of child k: one law for all of them, or one per draft model.
  """

  name: ClassVar[str] = "multi_round"
  needs_draft_probs: ClassVar[bool] = True
  distinct_siblings: ClassVar[bool] = False

  def proposal(self, tree, child, gone):
    return tree.draft_probs[jnp.arange(len(child)), child]


@dataclasses.dataclass(frozen=True)
class Ratio(Rule):
  """Chains: accept draft x with probability ``min(1, p(x)/q(x))``; at the first rejection draw from
  ``max(p - q, 0)``, after the last draft (or the last valid one) from p.

  Draw for draw what ``MultiRound`` says of a chain, with all drafts tested at once.
  ``tree.draft_probs`` must be the law every draft was really drawn from, and the drafts' noise must
  be independent of the ACCEPT and RESAMPLE noise of their positions.
  """

  name: ClassVar[str] = "ratio"
  needs_draft_probs: ClassVar[bool] = True
  chains_only: ClassVar[bool] = True

  def __call__(self, tree, logits, sampler, keys, length):
    if sampler.greedy:
      return Match()(tree, logits, sampler, keys, length)
    if tree.draft_probs is None or tree.max_depth != tree.tokens.shape[1] - 1:
      raise UserError(
        "rule 'ratio' needs a chain of drafts sampled from a known law (draft_probs); "
        "use rule='match', which is exact for every drafter"
      )
    p = jnp.exp(sampler.log_probs(logits))  # row i: law after i drafts
    x = tree.tokens[:, 1:, None]
    width = tree.tokens.shape[1]
    position = length[:, None] + jnp.arange(1, width + 1)  # of the token row i predicts
    u = jax.vmap(_uniform, (1, None), 1)(position_keys(keys, position[:, :-1], ACCEPT), 0)
    p_x = jnp.take_along_axis(p[:, :-1], x, axis=-1)[..., 0]
    q_x = jnp.take_along_axis(tree.draft_probs[:, 1:], x, axis=-1)[..., 0]
    drawn = tree.valid[:, 1:] & (q_x > 0)
    # Strict: p(x) = 0 is never accepted, not even at u = 0.
    ok = drawn & (u * q_x < p_x)
    accepted = jnp.sum(jnp.cumprod(ok, axis=1), axis=1, dtype=jnp.int32)
    # One row of zeros after the last draft, and q = 0 at drafts that were not made: there the
    # residual is p itself.
    q = jnp.where(drawn[..., None], tree.draft_probs[:, 1:], 0.0)
    q = jnp.concatenate([q, jnp.zeros_like(q[:, :1])], axis=1)
    rows = jnp.arange(x.shape[0])
    p_a = p[rows, accepted]
    residual = jnp.maximum(p_a - q[rows, accepted], 0.0)
    residual = jnp.where(jnp.sum(residual, -1, keepdims=True) > 0, residual, p_a)
    noise = gumbel(position_keys(keys, position[rows, accepted], RESAMPLE), p.shape[-1])
    return verdict_at(tree, accepted, argmax(jnp.log(residual) + noise))


@dataclasses.dataclass(frozen=True)
class WithoutReplacement(Rejection):
  """Siblings drawn one after the other without replacement: recursive rejection sampling
  (Sequoia, arXiv 2402.12374; RSD, arXiv 2402.14160).

  ``Q_k`` is ``tree.draft_probs`` of child k without the tokens of the siblings before it,
  renormalised. With no mass left in it P itself is drawn from. Independent draws are judged rightly
  as well: a repeated token is passed over, and the next new one has the law ``Q_k``.
  """

  name: ClassVar[str] = "without_replacement"
  needs_draft_probs: ClassVar[bool] = True

  def proposal(self, tree, child, gone):
    q = jnp.where(gone, 0.0, tree.draft_probs[jnp.arange(len(child)), child])
    mass = jnp.sum(q, axis=-1, keepdims=True)
    return q / jnp.where(mass > 0, mass, 1.0)


@dataclasses.dataclass(frozen=True)
class PointMass(Rejection):
  """Siblings however they were made, as long as the ACCEPT and RESAMPLE noise had no part in it:
  accept x with probability P[x], else take x out of P.

  ``Q_k`` puts all mass on the child's token. It descends exactly as often as ``match`` does on
  distinct siblings whose tokens don't depend on the target's noise, but isn't tied to plain
  decoding's draws.
  """

  name: ClassVar[str] = "point_mass"

  def proposal(self, tree, child, gone):
    token = tree.tokens[jnp.arange(len(child)), child]
    return jax.nn.one_hot(token, gone.shape[-1], dtype=jnp.float32)


def _uniform(keys: Key[Array, "B"], k: int | Int[Array, ""]) -> Float[Array, "B"]:
  """The k-th uniform of every key."""
  return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, k)))(keys)
