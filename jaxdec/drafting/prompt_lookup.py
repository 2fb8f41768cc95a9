# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: draft what followed an earlier occurrence of the last few tokens.

Source: A. Saxena's prompt-lookup-decoding (2023). No parameters, no state: the history is enough.
The longest matching suffix wins (``ngram_max`` tokens down to ``ngram_min``), then the latest.
Steps without a match run as plain decoding. The reference goes down to single tokens and drafts
10; by default we want two tokens to match and draft 5, which is faster on a CPU.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxdec.drafting.merge import shared_prefixes
from jaxdec.drafting.source import Candidates, Source
from jaxdec.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup(Source):
  """Attributes:

  num_drafts: tokens proposed (chain), or M - 1 (tree).
  ngram_max, ngram_min: longest and shortest suffix looked for.
  most_recent: take the last match; False: the first, as the reference does.
  partial: allow matches with fewer than ``num_drafts`` tokens after them; False: refuse them, as
    the reference does (it then never drafts from the text just written).
  num_matches: more than 1 merges the best matches' continuations into one tree.
  """

  num_drafts: int = 5
  ngram_max: int = 4
  ngram_min: int = 2
  most_recent: bool = True
  partial: bool = True
  num_matches: int = 1

  name: ClassVar[str] = "prompt_lookup"
  may_pass: ClassVar[bool] = True

  def has_draft(self, params, state, context):
    return find_matches(context.history, context.length + 1, self)[1][:, 0]

  def __post_init__(self):
    if self.num_drafts < 1 or not 1 <= self.ngram_min <= self.ngram_max or self.num_matches < 1:
      raise UserError(
        f"prompt_lookup needs num_drafts >= 1, 1 <= ngram_min <= ngram_max and num_matches >= "
        f"1, got {self}"
      )

  @property
  def num_nodes(self) -> int:
    return self.num_drafts + 1

  @property
  def num_candidates(self) -> int:
    return self.num_matches

  def candidates(self, params, state, context, rng):
    """The matches' continuations. A prefix that k of n matches have is right with probability
    k / (n + 1): the next occurrence may be a new one."""
    size = context.length + 1  # tokens known, root included
    start, ok = find_matches(context.history, size, self)
    tokens, valid = continuations(context.history, size, start, ok, self.num_drafts)
    votes = jnp.sum(jax.vmap(shared_prefixes)(tokens, valid), axis=2)
    matches = jnp.sum(ok, axis=1)[:, None, None]
    return Candidates(tokens, valid, votes / (matches + 1.0))


def find_matches(
  history: Int[Array, "B S"], size: Int[Array, "B"], config: PromptLookup
) -> tuple[Int[Array, "B R"], Bool[Array, "B R"]]:
  """The best R matches of the suffix: where their continuations start, and which are matches.

  ``matched[i]`` counts tokens equal to the suffix, reading backwards from i, up to ``ngram_max``.
  """
  width = history.shape[1]
  index = jnp.arange(width, dtype=jnp.int32)
  matched = jnp.zeros(history.shape, jnp.int32)
  run = index < size[:, None] - 1  # i = size - 1 is the suffix itself
  if not config.partial:
    run = run & (index + config.num_drafts < size[:, None])
  for j in range(config.ngram_max):
    wanted = jnp.take_along_axis(history, jnp.maximum(size - 1 - j, 0)[:, None], axis=1)
    shifted = jnp.pad(history, ((0, 0), (j, 0)), constant_values=-1)[:, :width]
    run = run & (shifted == wanted) & (size[:, None] > j)
    matched = matched + run
  recency = index if config.most_recent else width - 1 - index
  score = jnp.where(matched >= config.ngram_min, matched * width + recency, -1)
  starts, found = [], []
  for _ in range(config.num_matches):
    best = jnp.max(score, axis=1)
    at = jnp.min(jnp.where(score == best[:, None], index, width - 1), axis=1)
    starts.append(at + 1)
    found.append(best >= 0)
    score = jnp.where(index == at[:, None], -1, score)
  return jnp.stack(starts, axis=1), jnp.stack(found, axis=1)


def continuations(
  history: Int[Array, "B S"],
  size: Int[Array, "B"],
  start: Int[Array, "B R"],
  ok: Bool[Array, "B R"],
  length: int,
) -> tuple[Int[Array, "B R L"], Bool[Array, "B R L"]]:
  """The ``length`` tokens from each start; invalid beyond the known text."""
  at = start[..., None] + jnp.arange(length, dtype=jnp.int32)
  valid = ok[..., None] & (at < size[:, None, None])
  flat = jnp.minimum(at, history.shape[1] - 1).reshape(history.shape[0], -1)
  return jnp.take_along_axis(history, flat, axis=1).reshape(at.shape), valid
