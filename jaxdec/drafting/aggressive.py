# SPDX-License-Identifier: Apache-2.0
"""Input-guided aggressive decoding (arXiv 2205.10350): draft the rest of the source.

Edits mostly copy. Where the output so far ends in tokens that stand at one place only in the source
``s``, the draft is what follows there, to the end of the source:

  i = the least of 1..ngram_max for which the last i output tokens occur exactly once in s
  f = the end of that occurrence;  draft s[f:], up to ``num_drafts`` tokens

No such i: no draft, and the step is plain decoding. An output of one token that is the source's
first is taken for the beginning of a copy, wherever else it occurs. The source is a span of the
prompt. After a draft that was right throughout, the next step goes on with the copy by itself.

Generalized aggressive decoding (arXiv 2203.16487) verifies blocks of a non-autoregressive drafter
instead, which fills masks in parallel: ``masked_mtp``, ``ppd`` and ``dflash`` are such drafters.
Its strict form is rule ``match``, its relaxed one (GAD++) rule ``gad_lossy``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxdec.drafting.prompt_lookup import continuations
from jaxdec.drafting.source import Candidates, Source
from jaxdec.errors import UserError


@struct.dataclass
class Span:
  """The source's place in each text, ``begin <= t < end``, and the prompt's length."""

  begin: Int[Array, "B"]
  end: Int[Array, "B"]
  prompt: Int[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggressive(Source):
  """Attributes:

  num_drafts: most tokens drafted in a step.
  ngram_max: most output tokens looked for.
  source: the source is ``prompt[start:stop]``: negative numbers count from the prompt's end, None
    is its end. (0, None): the whole prompt.
  """

  num_drafts: int = 32
  ngram_max: int = 3
  source: tuple[int, int | None] = (0, None)

  name: ClassVar[str] = "aggressive"
  may_pass: ClassVar[bool] = True

  def __post_init__(self):
    object.__setattr__(self, "source", tuple(self.source))
    if self.num_drafts < 1 or self.ngram_max < 1 or len(self.source) != 2:
      raise UserError(
        "aggressive needs num_drafts >= 1, ngram_max >= 1 and source=(start, stop), got "
        f"num_drafts={self.num_drafts}, ngram_max={self.ngram_max}, source={self.source}"
      )

  @property
  def num_nodes(self) -> int:
    return self.num_drafts + 1

  @property
  def num_candidates(self) -> int:
    return 1

  def init_state(self, batch, capacity):
    return Span(*jnp.zeros((3, batch), jnp.int32))

  def start(self, params, state, prompt, output, target):
    length = prompt.lengths
    begin, end = (
      length if at is None else jnp.clip(length + at if at < 0 else at, 0, length)
      for at in self.source
    )
    return Span(jnp.broadcast_to(begin, length.shape), jnp.broadcast_to(end, length.shape), length)

  def candidates(self, params, state, context, rng):
    """One continuation. One occurrence says 1/2, as in prompt lookup: the next may be new."""
    start, found = find_place(context.history, context.length + 1, state, self.ngram_max)
    tokens, valid = continuations(
      context.history, state.end, start[:, None], found[:, None], self.num_drafts
    )
    return Candidates(tokens, valid, jnp.full(tokens.shape, 0.5))


def find_place(
  history: Int[Array, "B S"], size: Int[Array, "B"], span: Span, ngram_max: int
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
  """Where in the text the copy goes on, and whether there is such a place.

  Args:
    size: tokens known; the output is ``history[b, span.prompt[b] : size[b]]``.
  """
  width = history.shape[1]
  index = jnp.arange(width, dtype=jnp.int32)
  run = (index >= span.begin[:, None]) & (index < span.end[:, None])
  emitted = size - span.prompt
  # Before anything was emitted the whole source is the draft; the first token may already agree.
  first = jnp.take_along_axis(history, jnp.minimum(span.begin, width - 1)[:, None], axis=1)[:, 0]
  root = jnp.take_along_axis(history, size[:, None] - 1, axis=1)[:, 0]
  found = (emitted == 1) & (span.begin < span.end) & (root == first)
  place = jnp.where(found, span.begin + 1, 0)
  for i in range(ngram_max):
    wanted = jnp.take_along_axis(history, jnp.maximum(size - 1 - i, 0)[:, None], axis=1)
    shifted = jnp.pad(history, ((0, 0), (i, 0)), constant_values=-1)[:, :width]
    inside = index - i >= span.begin[:, None]
    run = run & inside & (shifted == wanted) & (emitted > i)[:, None]
    # Longer matches are among the shorter ones: once unique, or none, is for good.
    unique = (jnp.sum(run, axis=1) == 1) & ~found
    place = jnp.where(unique, jnp.argmax(run, axis=1).astype(jnp.int32) + 1, place)
    found = found | unique
  return place, found
