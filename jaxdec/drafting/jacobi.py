# SPDX-License-Identifier: Apache-2.0
"""Jacobi decoding: guesses for the next W positions, all corrected in every pass.

The next W tokens solve ``x_t = f(x_{<t})``, t = 1..W. A pass evaluates f at every position for the
guesses there are (section 2 of "Break the Sequential Dependency of LLM Inference Using Lookahead
Decoding", arXiv 2402.02057; Santilli et al., arXiv 2305.10427):

  y_i = f(x_1 .. x_i), i = 0..W;   a = the longest prefix with x_i = y_{i-1}
  emit y_0 .. y_a;   the next guesses are y_{a+1} .. y_W, then tokens of the text at random

At least one token a pass is right, so W tokens take W passes at most. Here f is the draw of the
position with its own noise: sampled text has a fixed point like greedy text.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxdec.drafting.base import Context, Drafter
from jaxdec.drafting.tree import chain
from jaxdec.errors import UserError
from jaxdec.mixers.base import gather_nodes

UNKNOWN = -1  # a position without a guess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jacobi(Drafter):
  """Attributes:

  num_drafts: W, guesses verified and corrected in every pass.
  """

  num_drafts: int = 8

  name: ClassVar[str] = "jacobi"

  def __post_init__(self):
    if self.num_drafts < 1:
      raise UserError(f"jacobi needs num_drafts >= 1, got {self.num_drafts}")

  @property
  def num_nodes(self) -> int:
    return self.num_drafts + 1

  def init_state(self, batch, capacity):
    return jnp.full((batch, self.num_drafts), UNKNOWN, jnp.int32)

  def start(self, params, state, prompt, output, target):
    return jnp.full_like(state, UNKNOWN)

  def propose(self, params, state, context, rng):
    guesses = jnp.where(state == UNKNOWN, text_tokens(context, self.num_drafts), state)
    return chain(context.root, guesses), state

  def observe(self, params, state, tree, accepted, output, context):
    position = context.length[:, None] + 1 + jnp.arange(self.num_nodes)
    drawn = context.sampler.draw(output.logits, context.keys, position)
    return jnp.where(
      accepted.count[:, None] > 0, later(drawn, accepted.count, self.num_drafts, UNKNOWN), state
    )


def text_tokens(context: Context, count: int) -> Int[Array, "B n"]:
  """Tokens of the text so far, drawn uniformly."""
  u = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(fill_keys(context))
  size = context.length[:, None] + 1
  at = jnp.minimum((u * size).astype(jnp.int32), size - 1)
  return jnp.take_along_axis(context.history, at, axis=1)


def fill_keys(context: Context) -> Key[Array, "B"]:
  """Keys for guesses out of nothing: the FILL noise of the root's position."""
  from jaxdec.decoding.sampling import FILL, position_keys  # which imports this package

  return position_keys(context.keys, context.length, FILL)


def later(x: Array, start: Int[Array, "B"], width: int, fill: float) -> Array:
  """``x[b, start[b] : start[b] + width]``; ``fill`` beyond the end."""
  at = start[:, None] + jnp.arange(width, dtype=jnp.int32)
  inside = at < x.shape[1]
  taken = gather_nodes(x, jnp.minimum(at, x.shape[1] - 1))
  return jnp.where(inside.reshape(inside.shape + (1,) * (x.ndim - 2)), taken, fill)
