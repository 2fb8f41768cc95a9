# SPDX-License-Identifier: Apache-2.0
"""Drafters whose guesses are whole continuations, so that several can share one tree.

A source lists candidate continuations of the root and says how far it trusts each of them. Alone it
drafts the best nodes of its own list; ``Combined`` merges the lists of several.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.base import Context, Drafter, DraftState, Params
from jaxdec.drafting.merge import merge_paths
from jaxdec.drafting.tree import chain


@struct.dataclass
class Candidates:
  """R continuations of each row's root, of up to L tokens.

  Attributes:
    valid: prefix-closed; a row without a guess has none.
    weight: the source's estimate, in (0, 1], of the probability that the first j + 1 tokens are
      accepted; never grows with j. Continuations with a common prefix give it the same estimate.
  """

  tokens: Int[Array, "B R L"]
  valid: Bool[Array, "B R L"]
  weight: Float[Array, "B R L"]


class Source(Drafter):
  """A drafter that lists candidate continuations; the M - 1 best nodes of the list are its tree.

  Attributes:
    num_candidates: R, continuations listed (static); L is ``max_depth``.
  """

  @property
  def num_candidates(self) -> int:
    raise NotImplementedError

  def candidates(
    self, params: Params, state: DraftState, context: Context, rng: jax.Array
  ) -> Candidates:
    """The guesses. Pure: what a source learns, it learns in ``observe``."""
    raise NotImplementedError

  def listed(
    self, params: Params, state: DraftState, context: Context, rng: jax.Array
  ) -> tuple[Candidates, DraftState]:
    """The guesses that this step drafts from, and the state that ``observe`` will judge them by."""
    return self.candidates(params, state, context, rng), state

  def propose(self, params, state, context, rng):
    found, state = self.listed(params, state, context, rng)
    if found.tokens.shape[1] == 1:  # one continuation is a chain: nothing to merge
      drafts = self.num_nodes - 1
      return chain(context.root, found.tokens[:, 0, :drafts], found.valid[:, 0, :drafts]), state
    tree = merge_paths(context.root, found.tokens, found.valid, found.weight, self.num_nodes)
    return tree, state

  def has_draft(self, params, state, context):
    rng = jax.random.key(0)  # whether there is a guess must not depend on noise
    return jnp.any(self.candidates(params, state, context, rng).valid, axis=(1, 2))


def recent_tokens(
  history: Int[Array, "B S"], size: Int[Array, "B"], count: int
) -> Int[Array, "B D"]:
  """The last ``count`` of ``size`` tokens, newest first; before the beginning -2, no token."""
  back = size[:, None] - 1 - jnp.arange(count)
  return jnp.where(back >= 0, jnp.take_along_axis(history, jnp.maximum(back, 0), axis=1), -2)
