# SPDX-License-Identifier: Apache-2.0
"""Speculative Jacobi decoding (arXiv 2410.01699): Jacobi iterations for sampled tokens.

A window of W drafts keeps the law each of them was drawn from. One pass gives the law p_i of every
position under the drafts before it, and the chain is judged as a sampled draft is:

  accept x_i where u q_i[x_i] < p_i[x_i];  at the first rejection emit a draw of max(p_i - q_i, 0)

Of what was not judged, ``redraw`` (the paper) draws anew, x_i ~ p_i and q_i <- p_i; ``keep``
leaves x_i and q_i as they are. Both are exact under rule ``ratio``: given the text before it, x_i
is a draw of q_i. To keep x_i and call it a draw of p_i would not be. The window moves by the tokens
emitted, row by row; its free end is filled with guesses, whose law is the point they stand on.

The noise of a draw belongs to its position, redrawn or not: a draft changes only as far as its law
does, and laws depend on earlier positions alone. Greedily this is Jacobi decoding, and under rule
``match`` ``jacobi`` is the better choice, since it drafts with the noise of the judgement.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdec.drafting.base import Drafter
from jaxdec.drafting.jacobi import UNKNOWN, fill_keys, later
from jaxdec.drafting.tree import chain
from jaxdec.errors import UserError


@struct.dataclass
class Window:
  """Drafts (UNKNOWN: none yet) and the laws they were drawn from."""

  tokens: Int[Array, "B W"]
  law: Float[Array, "B W V"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeJacobi(Drafter):
  """Attributes:

  num_drafts: W.
  unjudged: ``redraw`` or ``keep``, see above.
  fill: new guesses: ``random`` tokens of the vocabulary, or ``repeat`` the token to the left.
  """

  num_drafts: int = 16
  unjudged: Literal["redraw", "keep"] = "redraw"
  fill: Literal["random", "repeat"] = "random"

  name: ClassVar[str] = "sjd"
  gives_draft_probs: ClassVar[bool] = True

  def __post_init__(self):
    if self.num_drafts < 1:
      raise UserError(f"sjd needs num_drafts >= 1, got {self.num_drafts}")
    if self.unjudged not in ("redraw", "keep") or self.fill not in ("random", "repeat"):
      raise UserError(
        "unjudged must be 'redraw' or 'keep' and fill 'random' or 'repeat', got "
        f"{self.unjudged!r} and {self.fill!r}"
      )

  @property
  def num_nodes(self) -> int:
    return self.num_drafts + 1

  def init_state(self, batch, capacity):
    return ()

  def start(self, params, state, prompt, output, target):
    shape = prompt.root.shape[0], self.num_drafts
    vocab = target.model.config.vocab_size
    return Window(jnp.full(shape, UNKNOWN, jnp.int32), jnp.zeros((*shape, vocab)))

  def propose(self, params, state, context, rng):
    vocab, fresh = state.law.shape[-1], state.tokens == UNKNOWN
    if self.fill == "random":
      draw = lambda key: jax.random.randint(key, (self.num_drafts,), 0, vocab)  # noqa: E731
      guess = jax.vmap(draw)(fill_keys(context))
    else:  # known drafts come first: the last of them, or the root
      known = jnp.sum(~fresh, axis=1, keepdims=True)
      row = jnp.concatenate([context.root[:, None], state.tokens], axis=1)
      guess = jnp.take_along_axis(row, known, axis=1)
    tokens = jnp.where(fresh, guess, state.tokens)
    point = jax.nn.one_hot(tokens, vocab, dtype=jnp.float32)
    law = jnp.where(fresh[..., None], point, state.law)
    return chain(context.root, tokens, draft_probs=law), state

  def observe(self, params, state, tree, accepted, output, context):
    position = context.length[:, None] + 1 + jnp.arange(self.num_nodes)
    drawn = context.sampler.draw_independently(output.logits, context.keys, position)
    law = jnp.exp(context.sampler.log_probs(output.logits))
    if self.unjudged == "keep":  # beyond the last draft there is nothing to keep
      drawn = jnp.concatenate([tree.tokens[:, 1:], drawn[:, -1:]], axis=1)
      law = jnp.concatenate([tree.draft_probs[:, 1:], law[:, -1:]], axis=1)
    # Row i is position length + i + 1; the first ``count`` of them are emitted.
    return Window(
      later(drawn, accepted.count, self.num_drafts, UNKNOWN),
      later(law, accepted.count, self.num_drafts, 0.0),
    )
