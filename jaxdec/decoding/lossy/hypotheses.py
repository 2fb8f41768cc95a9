# SPDX-License-Identifier: Apache-2.0
"""Texts under way in a search, and the pool of those that have finished."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.decoding.lossy.common import is_stop
from jaxdec.drafting.selection import top_k

# ``(score, length) -> rank``: what finished texts are ordered by.
Rank = Callable[[Float[Array, "..."], Int[Array, "..."]], Float[Array, "..."]]


@struct.dataclass
class Pool:
  """The k best finished texts of each row, best first; empty places have rank -inf.

  Attributes:
    tokens: right-padded. length: how many of them. score: log-probability. rank: what they are
    ordered by; of equal ranks the earlier one comes first.
  """

  tokens: Int[Array, "B k T"]
  length: Int[Array, "B k"]
  score: Float[Array, "B k"]
  rank: Float[Array, "B k"]

  @property
  def full(self) -> Bool[Array, "B"]:
    """Rows with k texts."""
    return jnp.isfinite(self.rank[:, -1])

  def add(self, new: Pool) -> Pool:
    """The best of both."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), self, new)
    _, best = top_k(both.rank, self.rank.shape[1])
    rows = jnp.arange(best.shape[0])[:, None]
    return jax.tree.map(lambda x: x[rows, best], both)


@struct.dataclass
class Hypotheses:
  """k texts under way for each row (score -inf: none), and the pool of those finished.

  A continuation by a stop token leaves for the pool if it is among the k best of all; the k best
  others go on. A row is done when its pool is full or nothing goes on.
  """

  tokens: Int[Array, "B k T"]
  score: Float[Array, "B k"]
  pool: Pool
  done: Bool[Array, "B"]

  @classmethod
  def start(cls, batch: int, size: int, budget: int) -> Hypotheses:
    """One empty text, of score 0: what follows it has no equals among its siblings."""
    tokens = jnp.zeros((batch, size, budget), jnp.int32)
    nothing = jnp.full((batch, size), -jnp.inf)
    pool = Pool(tokens, jnp.zeros((batch, size), jnp.int32), nothing, nothing)
    return cls(tokens, nothing.at[:, 0].set(0.0), pool, jnp.zeros(batch, bool))

  @property
  def alive(self) -> Bool[Array, "B k"]:
    """Texts that go on."""
    return jnp.isfinite(self.score) & ~self.done[:, None]

  def grow(
    self,
    objective: Float[Array, "B k C"],
    score: Float[Array, "B k C"],
    ids: Int[Array, "B C"],
    stop: Int[Array, "J"],
    step: Int[Array, ""],
    rank: Rank,
  ) -> tuple[Hypotheses, Int[Array, "B k"], Int[Array, "B k"]]:
    """Every text by one token.

    Args:
      objective: what continuations are chosen by; ties go to the lower text, then continuation.
      score: what the texts have from then on.
      ids: tokens that the continuations stand for.
      stop: stop ids. step: tokens so far.

    Returns:
      the new hypotheses, the text each goes on from, its token.
    """
    size, budget = self.tokens.shape[1:]
    rows = jnp.arange(objective.shape[0])[:, None]
    ends = is_stop(ids, stop)

    def best(objective):
      value, flat = top_k(objective.reshape(objective.shape[0], -1), size)
      parent, choice = flat // ids.shape[1], flat % ids.shape[1]
      token = ids[rows, choice]
      written = jnp.arange(budget) == step
      tokens = jnp.where(written, token[..., None], self.tokens[rows, parent])
      there = jnp.isfinite(value) & ~self.done[:, None]
      return there, parent, choice, token, tokens, score[rows, parent, choice]

    there, _, choice, _, tokens, total = best(objective)
    length = jnp.full_like(choice, step + 1)
    over = jnp.where(there & ends[rows, choice], rank(total, length), -jnp.inf)
    pool = self.pool.add(Pool(tokens, length, total, over))
    there, parent, _, token, tokens, total = best(jnp.where(ends[:, None], -jnp.inf, objective))
    done = self.done | pool.full | ~jnp.any(there, axis=1)
    return Hypotheses(tokens, jnp.where(there, total, -jnp.inf), pool, done), parent, token

  def close(self, rank: Rank) -> Pool:
    """At the budget's end the texts under way join the pool of a row that isn't full."""
    length = jnp.full(self.score.shape, self.tokens.shape[-1], jnp.int32)
    open_ = jnp.where(self.pool.full[:, None], -jnp.inf, rank(self.score, length))
    return self.pool.add(Pool(self.tokens, length, self.score, open_))


def unpack(pool: Pool) -> list[list[tuple[float, float, list[int]]]]:
  """``(rank, score, tokens)`` of the texts of each row, best first."""
  pool = jax.device_get(pool)
  return [
    [
      (float(rank), float(score), tokens[:n].tolist())
      for rank, score, tokens, n in zip(*row)
      if np.isfinite(rank)
    ]
    for row in zip(pool.rank, pool.score, pool.tokens, pool.length)
  ]
