# SPDX-License-Identifier: Apache-2.0
"""Draft trees and candidates as the texts they stand for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxdec.drafting import Context


def spelled(tree, row: int = 0) -> set[tuple[int, ...]]:
  """The text of every valid node below the root."""
  tokens, parent, valid = (np.asarray(x[row]) for x in (tree.tokens, tree.parent, tree.valid))
  paths = {0: ()}
  for i in range(1, len(tokens)):
    if valid[i]:
      paths[i] = (*paths[int(parent[i])], int(tokens[i]))  # KeyError: a parent that is not valid
  return set(paths.values()) - {()}


def estimates(candidates, row: int = 0) -> dict[tuple[int, ...], float]:
  """Every candidate prefix and its weight (the largest, where paths share it)."""
  tokens, valid, weight = (
    np.asarray(x[row]) for x in (candidates.tokens, candidates.valid, candidates.weight)
  )
  out: dict[tuple[int, ...], float] = {}
  for r in range(tokens.shape[0]):
    for j in range(tokens.shape[1]):
      if not valid[r, j]:
        assert not valid[r, j:].any()  # prefix-closed
        break
      text = tuple(int(t) for t in tokens[r, : j + 1])
      out[text] = max(out.get(text, 0.0), float(weight[r, j]))
      assert 0 < weight[r, j] <= 1 and (j == 0 or weight[r, j] <= weight[r, j - 1])
  return out


def context_of(texts, width: int) -> Context:
  """What a drafter sees after each of the texts; the last token is the root."""
  history = np.zeros((len(texts), width), np.int32)
  for row, text in zip(history, texts):
    row[: len(text)] = text
  size = np.asarray([len(t) for t in texts], np.int32)
  return Context(
    root=jnp.asarray(history[np.arange(len(texts)), size - 1]),
    length=jnp.asarray(size - 1),
    history=jnp.asarray(history),
    target=None,
    sampler=None,
  )
