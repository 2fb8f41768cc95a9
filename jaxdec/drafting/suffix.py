# SPDX-License-Identifier: Apache-2.0
"""Suffix decoding: what most often followed the end of the text, drafted as far as it is likely.

Source: "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications" (arXiv
2411.04975). For every length l of the text's end that occurred before, a draft of at most
``factor * l + offset`` tokens is made from all its occurrences, the end itself included; a draft is
worth the sum of its tokens' probabilities, and the best of all lengths is taken. The paper's suffix
tree is replaced by arrays: the ``matches`` places whose context agrees longest with the end of the
text (the latest first) are found by comparing the text with shifts of itself, and counted. That is
exact where no more than ``matches`` places agree in the last token; the lengths tried are thinned
out above 4.

With ``store`` the answers of earlier calls are searched too (pass ``Generation.drafter_state`` on).
The text of the request wins ties. Privacy: the store holds the tokens of everybody whose answers
went into it. Drafts never change the output, but how fast an answer comes tells whether it was
given before. Share a store among users who may see each other's answers, keep one each otherwise;
``Responses.without`` takes an answer out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxdec.drafting.counted import TIE, Counted, counted_path, counted_tree
from jaxdec.drafting.selection import top_k
from jaxdec.drafting.source import Candidates, Source, recent_tokens
from jaxdec.errors import UserError

_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 63)  # match lengths tried


@struct.dataclass
class Responses:
  """Answers of earlier calls, oldest first, and those of the call under way.

  Attributes:
    request: which answer a token belongs to, counted from 0 over all rows of all calls; -1: free.
    count: answers ever stored; row b of the call under way will be answer ``count + b``.
    writing, written: the answers under way, and their lengths.
  """

  tokens: Int[Array, "H"]
  request: Int[Array, "H"]
  count: Int[Array, ""]
  writing: Int[Array, "B W"]
  written: Int[Array, "B"]

  def without(self, request: int) -> Responses:
    """The store without one answer."""
    keep = self.request != request
    return self.replace(
      tokens=jnp.where(keep, self.tokens, 0), request=jnp.where(keep, self.request, -1)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suffix(Source):
  """Attributes:

  num_drafts: most tokens drafted in a step.
  mode: ``tree``: the likeliest prefixes; ``path``: the chain of the commonest next tokens.
  context: tokens at the end of the text that are compared (a match is shorter).
  factor, offset: a match of l tokens allows ``factor * l + offset`` drafts. The released code has
    factor 1, which saves passes of varying size; here a pass has M nodes whatever is drafted, and
    short drafts only leave nodes unused.
  floor: least probability of a draft.
  shortest: shortest match used; 2 avoids passes over poor drafts where a pass is dear.
  matches: places counted at most.
  store: tokens of earlier answers kept (the oldest are dropped); 0: none.
  answer: tokens kept of one answer.
  """

  num_drafts: int = 15
  mode: Literal["tree", "path"] = "tree"
  context: int = 64
  factor: float = 4.0
  offset: float = 0.0
  floor: float = 0.1
  shortest: int = 1
  matches: int = 64
  store: int = 0
  answer: int = 2048

  name: ClassVar[str] = "suffix"

  def __post_init__(self):
    least = min(self.num_drafts, self.matches, self.shortest, self.answer)
    if least < 1 or self.store < 0 or self.mode not in ("tree", "path"):
      raise UserError(
        "suffix needs num_drafts, matches, shortest and answer of at least 1, store >= 0 and mode "
        f"'tree' or 'path', got {self}"
      )
    if not 2 <= self.context <= 64 or not 0 < self.floor <= 1 or not self.factor >= 0:
      raise UserError(
        f"suffix needs 2 <= context <= 64, 0 < floor <= 1 and factor >= 0, got {self}"
      )
    if not self.lengths:
      raise UserError(
        f"suffix would never draft: no match of {self.shortest} to {self.context - 1} tokens "
        f"allows a draft with factor={self.factor:g} and offset={self.offset:g}"
      )

  @property
  def num_nodes(self) -> int:
    return self.num_drafts + 1

  @property
  def num_candidates(self) -> int:
    return 1 if self.mode == "path" else min(self.num_drafts, self.matches)

  @property
  def may_pass(self) -> bool:
    return not self.store  # what is written must be seen, plain steps too

  def budget(self, length: int) -> int:
    """Most drafts after a match of ``length`` tokens."""
    allowed = math.floor(self.factor * length + self.offset + 1e-6)
    return max(0, min(self.num_drafts, allowed, self.context - length))

  @property
  def lengths(self) -> tuple[int, ...]:
    """Match lengths tried."""
    usable = range(self.shortest, self.context)
    return tuple(n for n in _LENGTHS if n in usable and self.budget(n))

  def init_state(self, batch, capacity):
    if not self.store:
      return ()
    return Responses(
      tokens=jnp.zeros(self.store, jnp.int32),
      request=jnp.full(self.store, -1, jnp.int32),
      count=jnp.int32(0),
      writing=jnp.zeros((batch, self.answer), jnp.int32),
      written=jnp.zeros(batch, jnp.int32),
    )

  def start(self, params, state, prompt, output, target):
    """Moves the answers of the last call into the store and begins new ones."""
    if not self.store:
      return ()
    if state.tokens.shape[0] != self.store or state.writing.shape[1] != self.answer:
      raise UserError(
        f"the drafter_state has a store of {state.tokens.shape[0]} tokens and answers of "
        f"{state.writing.shape[1]}, this suffix drafter {self.store} and {self.answer}"
      )

    def append(stored, row):
      tokens, request, count = stored
      answer, n = row
      push = lambda old, new: jax.lax.dynamic_slice(  # noqa: E731
        jnp.concatenate([old, new]), (n,), old.shape
      )
      stored = push(tokens, answer), push(request, jnp.broadcast_to(count, answer.shape))
      return (*stored, count + (n > 0)), None

    stored = (state.tokens, state.request, state.count)
    stored, _ = jax.lax.scan(append, stored, (state.writing, state.written))
    batch = prompt.root.shape[0]
    writing = jnp.zeros((batch, self.answer), jnp.int32).at[:, 0].set(prompt.root)
    return Responses(*stored, writing, jnp.ones(batch, jnp.int32))

  def observe(self, params, state, tree, accepted, output, context):
    if not self.store:
      return state
    index = jnp.arange(accepted.tokens.shape[1])
    at = jnp.where(
      index < accepted.count[:, None], state.written[:, None] + index, self.answer
    )  # beyond the end: dropped
    rows = jnp.arange(at.shape[0])[:, None]
    return state.replace(
      writing=state.writing.at[rows, at].set(accepted.tokens, mode="drop"),
      written=jnp.minimum(state.written + accepted.count, self.answer),
    )

  def candidates(self, params, state, context, rng):
    size = context.length + 1
    recent = recent_tokens(context.history, size, self.context)
    index = jnp.arange(context.history.shape[1])
    request = jnp.where(index < size[:, None], 0, -1)
    matched = match_lengths(context.history, request, recent, index < size[:, None] - 1)
    tail = jnp.minimum(size, self.context - 1)[:, None]  # the end of the text matches itself
    matched = jnp.where(index == size[:, None] - 1, tail, matched)
    best = self._padded(jax.vmap(self._count)(context.history, request, matched, size))
    if self.store:
      matched = match_lengths(state.tokens[None], state.request[None], recent)
      past = jax.vmap(self._count, (None, None, 0, 0))(state.tokens, state.request, matched, size)
      own = (best.score > past.score - TIE)[:, None, None]
      best, past = best.replace(score=own), self._padded(past).replace(score=own)
      best = jax.tree.map(lambda a, b: jnp.where(own, a, b), best, past)
    return Candidates(best.tokens, best.valid, best.weight)

  def _count(self, tokens, request, matched, size) -> Counted:
    """The best draft after any of the matches in one text."""
    width = tokens.shape[0]
    index = jnp.arange(width)
    # Longest match first, then the latest: exact in float32 up to 2^18 tokens.
    rank = jnp.where(matched > 0, matched * width + index, -1).astype(jnp.float32)
    _, at = top_k(rank, min(self.matches, width))
    then = at[:, None] + 1 + jnp.arange(self.num_drafts)
    inside = jnp.minimum(then, width - 1)
    valid = (then < width) & (request[inside] == request[at][:, None]) & (matched[at] > 0)[:, None]
    lengths = np.asarray(self.lengths)
    budgets = np.asarray([self.budget(n) for n in self.lengths])
    sizes = jnp.sum(matched[at] >= lengths[:, None], axis=1)
    sizes = jnp.where(lengths < size, sizes, 0)
    arguments = (tokens[inside], valid, sizes, sizes, jnp.asarray(budgets), self.floor)
    if self.mode == "path":
      return counted_path(*arguments)
    return counted_tree(*arguments, keep=self.num_drafts)

  def _padded(self, found: Counted) -> Counted:
    """With ``num_candidates`` rows, however short the text."""
    pad = lambda x: jnp.pad(  # noqa: E731
      x, ((0, 0), (0, self.num_candidates - x.shape[1]), (0, 0))
    )
    return Counted(pad(found.tokens), pad(found.valid), pad(found.weight), found.score)

  def has_draft(self, params, state, context):
    """Whether the end of the text occurred before. (A draft less likely than ``floor`` after every
    match, which takes ten different ones, counts as a draft here.)"""
    size = context.length[:, None] + 1
    index = jnp.arange(context.history.shape[1])
    request = jnp.where(index < size, 0, -1)
    recent = recent_tokens(context.history, size[:, 0], self.lengths[0] + 1)
    matched = match_lengths(context.history, request, recent, index < size - 1)
    return jnp.max(matched, axis=1) >= self.lengths[0]


def match_lengths(
  tokens: Int[Array, "P S"],
  request: Int[Array, "P S"],
  recent: Int[Array, "B D"],
  where: Bool[Array, "B S"] | None = None,
) -> Int[Array, "B S"]:
  """How many tokens up to each place are those of ``recent``, within one request; D - 1 at most.

  One pass over the text per token of the longest match.

  Args:
    tokens, request: P = B texts, or one for all; places with ``request`` -1 never match.
    recent: newest first.
    where: the places asked about; all by default.
  """
  longest, width = recent.shape[1] - 1, tokens.shape[1]
  before = lambda x, fill: jnp.pad(x, ((0, 0), (longest, 0)), constant_values=fill)  # noqa: E731
  texts, requests = before(tokens, -1), before(request, -1)
  shifted = lambda x, j: jax.lax.dynamic_slice_in_dim(x, longest - j, width, axis=1)  # noqa: E731

  def more(carry):
    j, run, _ = carry
    return (j < longest) & jnp.any(run)

  def step(carry):
    j, run, length = carry
    wanted = jax.lax.dynamic_slice_in_dim(recent, j, 1, axis=1)
    run = run & (shifted(texts, j) == wanted) & (shifted(requests, j) == request)
    return j + 1, run, length + run

  shape = (recent.shape[0], width)
  run = jnp.broadcast_to(request >= 0, shape)
  run = run if where is None else run & where
  return jax.lax.while_loop(more, step, (jnp.int32(0), run, jnp.zeros(shape, jnp.int32)))[2]
