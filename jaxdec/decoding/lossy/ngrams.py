# SPDX-License-Identifier: Apache-2.0
"""N-gram models of token arrays, looked up inside a compiled program.

For contexts of n tokens the distinct (n + 1)-grams lie in lexicographic order, so one binary search
of ``log2`` comparisons finds a count, exactly: no hashes, no collisions.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.errors import UserError


@struct.dataclass
class NGrams:
  """Counts for contexts of 1, 2, ... tokens.

  Attributes:
    grams: by context length n, the distinct (n + 1)-grams in order.
    prob: ``count(gram) / count(its context)``.
  """

  grams: tuple[Int[Array, "P n1"], ...]
  prob: tuple[Float[Array, "P"], ...]

  def __call__(
    self,
    context: Int[Array, "*B n"],
    tokens: Int[Array, "*B m"],
    weights: Float[Array, "n"],
  ) -> Float[Array, "*B m"]:
    """``sum_n weights[n] P_n(token | last n tokens)``; a context never seen contributes 0."""
    total = jnp.zeros(tokens.shape, jnp.float32)
    for n, (grams, prob) in enumerate(zip(self.grams, self.prob), start=1):
      last = context[..., None, context.shape[-1] - n :]
      last = jnp.broadcast_to(last, (*tokens.shape, n))
      at, found = _find(grams, jnp.concatenate([last, tokens[..., None]], axis=-1))
      total += weights[n - 1] * jnp.where(found, prob[at], 0.0)
    return total


def build_ngrams(texts: Sequence[Sequence[int]], longest: int = 5) -> NGrams:
  """Counts of token-id lists, for contexts of 1 to ``longest`` tokens.

  Raises:
    UserError: ids that aren't integers >= 0.
  """
  if longest < 1:
    raise UserError(f"longest must be at least 1, got {longest}")
  arrays = [np.asarray(text) for text in texts]
  for i, a in enumerate(arrays):
    if a.size and (a.ndim != 1 or not np.issubdtype(a.dtype, np.integer) or a.min() < 0):
      raise UserError(f"text {i} must be a flat list of token ids, got {a.dtype} of {a.shape}")
  all_grams, all_prob = [], []
  for n in range(1, longest + 1):
    windows = [
      np.lib.stride_tricks.sliding_window_view(a.astype(np.int32), n + 1)
      for a in arrays
      if a.size > n
    ]
    # Where there is nothing, a gram that nobody asks for.
    windows = np.concatenate(windows) if windows else np.full((1, n + 1), -2, np.int32)
    grams, count = np.unique(windows, axis=0, return_counts=True)
    _, context = np.unique(grams[:, :n], axis=0, return_inverse=True)
    context = context.reshape(-1)
    all_grams.append(jnp.asarray(grams))
    all_prob.append(jnp.asarray(count / np.bincount(context, count)[context], jnp.float32))
  return NGrams(tuple(all_grams), tuple(all_prob))


def _find(
  grams: Int[Array, "P n"], query: Int[Array, "*B n"]
) -> tuple[Int[Array, "*B"], Bool[Array, "*B"]]:
  """Where each query lies among the sorted grams, and whether it does."""
  low = jnp.zeros(query.shape[:-1], jnp.int32)
  high = jnp.full_like(low, grams.shape[0])
  for _ in range(grams.shape[0].bit_length()):
    middle = (low + high) // 2
    gram = grams[jnp.minimum(middle, grams.shape[0] - 1)]
    less, same = jnp.zeros(low.shape, bool), jnp.ones(low.shape, bool)
    for i in range(grams.shape[1]):
      less |= same & (gram[..., i] < query[..., i])
      same &= gram[..., i] == query[..., i]
    open_ = low < high
    low, high = (
      jnp.where(open_ & less, middle + 1, low),
      jnp.where(open_ & ~less, middle, high),
    )
  at = jnp.minimum(low, grams.shape[0] - 1)
  return at, jnp.all(grams[at] == query, axis=-1)
