# SPDX-License-Identifier: Apache-2.0
"""Retrieval from a corpus: what followed the longest end of the text that the corpus holds.

Source: "REST: Retrieval-Based Speculative Decoding" (arXiv 2311.08252). The corpus is an array of
tokens and one of its places, sorted by the text before each place read *backwards* (a suffix array
of the reversed corpus). The places that share the longest context with the end of the text then lie
beside the point where that would be sorted in: one binary search finds how long it is, two more
where such places begin and end. Their continuations are counted into a tree; a prefix that k of n
places have is right with probability k / (n + 1).

Our decisions: contexts of up to ``longest`` tokens, ``shortest`` at least; of more than ``matches``
places evenly spread ones are counted, so that the places' longer contexts are represented alike.

``jaxdec datastore`` builds the arrays (``jaxdec.io.datastore``); they are ``drafter_params``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxdec.drafting.counted import counted_tree
from jaxdec.drafting.source import Candidates, Source, recent_tokens
from jaxdec.errors import UserError

CONTEXT = 16  # tokens of context the places are sorted by, and separators before the corpus
SEPARATOR = -1  # between documents: no match or continuation goes across


@dataclasses.dataclass(frozen=True, kw_only=True)
class Datastore(Source):
  """Parameters: ``tokens`` ``[N]`` and ``order`` ``[P]``, int32.

  Attributes:
    num_drafts: most nodes below the root. depth: most tokens of a continuation.
    longest, shortest: tokens of context looked for, ``CONTEXT`` at most.
    matches: places counted at most.
  """

  num_drafts: int = 15
  depth: int = 10
  longest: int = CONTEXT
  shortest: int = 2
  matches: int = 64

  name: ClassVar[str] = "datastore"
  may_pass: ClassVar[bool] = True

  def __post_init__(self):
    if min(self.num_drafts, self.depth, self.matches) < 1 or not (
      1 <= self.shortest <= self.longest <= CONTEXT
    ):
      raise UserError(
        f"datastore needs num_drafts, depth and matches of at least 1 and 1 <= shortest <= longest "
        f"<= {CONTEXT}, got {self}"
      )

  @property
  def num_nodes(self) -> int:
    return self.num_drafts + 1

  @property
  def max_depth(self) -> int:
    return min(self.depth, self.num_drafts)

  @property
  def num_candidates(self) -> int:
    return min(self.num_drafts, self.matches)

  def start(self, params, state, prompt, output, target):
    if not params or set(params) != {"tokens", "order"}:
      raise UserError(
        "drafter 'datastore' has no corpus; build one with jaxdec datastore and give its folder"
      )
    return state

  def candidates(self, params, state, context, rng):
    def draft(begin, count):
      used = jnp.minimum(count, self.matches)
      row = jnp.arange(self.matches, dtype=jnp.int32)
      # row * count / matches, without overflow in a corpus of 2^31 tokens
      spread = count // self.matches * row + count % self.matches * row // self.matches
      row = jnp.where(count > self.matches, spread, row)
      places = params["order"][jnp.minimum(begin + row, params["order"].shape[0] - 1)]
      at = places[:, None] + jnp.arange(self.max_depth, dtype=jnp.int32)
      tokens = params["tokens"][jnp.minimum(at, params["tokens"].shape[0] - 1)]
      valid = (tokens != SEPARATOR) & (at < params["tokens"].shape[0])
      valid = jnp.cumprod(valid, axis=1).astype(bool)
      return counted_tree(
        tokens, valid, used[None], used[None] + 1, jnp.asarray([self.num_drafts]), 0.0,
        self.num_candidates,
      )  # fmt: skip

    found = jax.vmap(draft)(*self._find(params, context))
    return Candidates(found.tokens, found.valid, found.weight)

  def has_draft(self, params, state, context):
    return self._find(params, context)[1] > 0

  def _find(self, params, context) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    recent = recent_tokens(context.history, context.length + 1, self.longest)

    def find(query):
      begin, length, count = longest_match(params["tokens"], params["order"], query)
      return begin, jnp.where(length >= self.shortest, count, 0)

    return jax.vmap(find)(recent)


def longest_match(
  tokens: Int[Array, "N"], order: Int[Array, "P"], recent: Int[Array, "C"]
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
  """The places whose context agrees with ``recent`` (newest first, C at most) in most tokens.

  Returns:
    ``begin, length, count``: ``order[begin : begin + count]`` are they; ``length`` tokens agree.
  """
  places, offsets = order.shape[0], jnp.arange(1, recent.shape[0] + 1, dtype=jnp.int32)

  def differs(index):
    before = tokens[order[index] - offsets]
    return before, before != recent

  def search(length, after):
    """How many places are sorted before ``recent[:length]``, or (``after``) up to it."""

    def halve(_, bounds):
      low, high = bounds
      middle = low + (high - low) // 2
      before, other = differs(jnp.minimum(middle, places - 1))
      other = other & (offsets <= length)
      at = jnp.argmax(other)
      less = jnp.where(jnp.any(other), before[at] < recent[at], after)
      going = low < high
      return (
        jnp.where(going & less, middle + 1, low),
        jnp.where(going & ~less, middle, high),
      )

    steps = places.bit_length()
    return jax.lax.fori_loop(0, steps, halve, (jnp.int32(0), jnp.int32(places)))[0]

  here = search(recent.shape[0], False)
  beside = jnp.stack([jnp.maximum(here - 1, 0), jnp.minimum(here, places - 1)])
  agree = jax.vmap(lambda i: jnp.sum(jnp.cumprod(~differs(i)[1])))(beside)
  length = jnp.max(agree).astype(jnp.int32)
  begin = search(length, False)
  return begin, length, search(length, True) - begin
