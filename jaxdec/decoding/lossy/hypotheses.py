# SPDX-License-Identifier: Apache-2.0
"""Candidates of a search: the best continuations, and a pool of the best finished texts."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.selection import top_k


@struct.dataclass
class Pool:
  """The k best texts of each row, best first; empty places have rank -inf.

  Attributes:
    tokens: right-padded. length: how many of them. score: log-probability. rank: what they are
    ordered by; of equal ranks the earlier one comes first.
  """

  tokens: Int[Array, "B k T"]
  length: Int[Array, "B k"]
  score: Float[Array, "B k"]
  rank: Float[Array, "B k"]

  @classmethod
  def empty(cls, batch: int, size: int, width: int) -> Pool:
    """No text yet."""
    nothing = jnp.full((batch, size), -jnp.inf)
    return cls(
      jnp.zeros((batch, size, width), jnp.int32),
      jnp.zeros((batch, size), jnp.int32),
      nothing,
      nothing,
    )

  @property
  def full(self) -> Bool[Array, "B"]:
    """Rows with k texts."""
    return jnp.isfinite(self.rank[:, -1])

  def add(
    self,
    tokens: Int[Array, "B n T"],
    length: Int[Array, "B n"],
    score: Float[Array, "B n"],
    rank: Float[Array, "B n"],
  ) -> Pool:
    """Keeps the best of those here and new ones (rank -inf: none)."""
    new = Pool(tokens, length, score, rank)
    every = {
      f: jnp.concatenate([getattr(self, f), getattr(new, f)], axis=1)
      for f in ("tokens", "length", "score", "rank")
    }
    _, best = top_k(every["rank"], self.rank.shape[1])
    return Pool(**{f: jnp.take_along_axis(x, _like(best, x), axis=1) for f, x in every.items()})


def continuations(
  objective: Float[Array, "B n C"], k: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"], Int[Array, "B k"]]:
  """The k best of n texts times C continuations: values, text, continuation.

  Ties: the lower text, then the lower continuation.
  """
  batch, _, choices = objective.shape
  value, flat = top_k(objective.reshape(batch, -1), k)
  return value, flat // choices, flat % choices


def append(
  tokens: Int[Array, "B n T"],
  text: Int[Array, "B k"],
  token: Int[Array, "B k"],
  at: Int[Array, ""],
) -> Int[Array, "B k T"]:
  """Texts ``text`` with ``token`` written at index ``at``."""
  chosen = jnp.take_along_axis(tokens, text[..., None], axis=1)
  return jnp.where(jnp.arange(tokens.shape[-1]) == at, token[..., None], chosen)


def _like(index: Int[Array, "B k"], x: Array) -> Array:
  return index.reshape(index.shape + (1,) * (x.ndim - 2))
