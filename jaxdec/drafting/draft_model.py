# SPDX-License-Identifier: Apache-2.0
"""A small decoder drafts for a large one (arXiv 2211.17192, arXiv 2302.01318).

The draft model keeps its own state. What it read in vain is taken back: attention layers by setting
``length`` (slots beyond it hold no meaning), recurrent layers by going on from the state before the
drafts, which costs them a re-read of the accepted tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from jaxdec.drafting.base import Drafter
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.tree import chain
from jaxdec.errors import UserError
from jaxdec.mixers.attention import AttentionConfig
from jaxdec.models.prefill import padded, read_prompt

_CHUNK = 64  # prompt tokens read per pass of the draft model


@struct.dataclass
class DraftModelState:
  """State of the draft model. ``length``: tokens of the text it has read for good; between drafting
  and verification those read at all. ``idle``: rows that have finished, where that is kept."""

  decoder: Any
  length: Int[Array, "B"]
  idle: Any = None


def unread(state: DraftModelState, length: Int[Array, "B"]) -> DraftModelState:
  """Keeps the first ``length`` tokens that attention layers have read."""
  layers = tuple(layer.replace(length=length) for layer in state.decoder.layers)
  return state.replace(decoder=state.decoder.replace(layers=layers), length=length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftDecoder(Drafter):
  """Base of drafters that draw from a decoder with the target's vocabulary.

  Its parameters are ``drafter_params`` (the same layout as the target's: unrolled).

  Attributes:
    model: the draft ``Decoder``.
    draws: how drafts are made at temperature > 0. ``greedy``: the argmax. ``shared``: with the
      noise the target will use at that position, which raises the match rate to at least
      (1 - TV) / (1 + TV) (arXiv 2408.07978). ``sampled``: with noise of its own, and the law q is
      handed on: what rules that judge drawn drafts need.
  """

  model: Any
  draws: Literal["greedy", "shared", "sampled"] = "shared"

  trained: ClassVar[bool] = True

  def __post_init__(self):
    if self.draws not in ("greedy", "shared", "sampled"):
      raise UserError(f"draws is one of greedy, shared, sampled, got {self.draws!r}")

  @property
  def vocab_size(self) -> int:
    return self.model.config.vocab_size

  @property
  def gives_draft_probs(self) -> bool:
    return self.draws == "sampled"

  @property
  def _window(self) -> int:
    """Most tokens that may have been emitted since the draft model last read."""
    return self.max_depth + 1

  def init_params(self, rng, target=None):
    import flax.linen as nn

    return nn.unbox(self.model.init(rng, jnp.zeros((1, 1), jnp.int32)))["params"]

  def init_state(self, batch, capacity):
    return DraftModelState(
      self.model.init_state(batch, padded(capacity, _CHUNK)), jnp.zeros(batch, jnp.int32)
    )

  def start(self, params, state, prompt, output, target):
    batch, width = prompt.tokens.shape
    room = padded(width, _CHUNK)
    tokens = jnp.pad(prompt.tokens, ((0, 0), (0, room - width)))
    decoder, *_ = read_prompt(
      self.model, params, self.model.init_state(batch, room), tokens, prompt.lengths, chunk=_CHUNK
    )
    return DraftModelState(decoder, prompt.lengths)

  def _extend(self, params, tokens, decoder, positions, **kwargs):
    return self.model.apply(
      {"params": params}, tokens, decoder, positions, method="extend", **kwargs
    )

  def _unembed(self, params, hidden):
    return self.model.apply({"params": params}, hidden, method="unembed")

  def _catch_up(self, params, state, context):
    """Reads what was emitted, the root included: decoder state, logits after it."""
    at = state.length[:, None] + jnp.arange(self._window, dtype=jnp.int32)
    read = at <= context.length[:, None]
    tokens = jnp.take_along_axis(context.history, at, axis=1, mode="clip")
    out = self._extend(params, tokens, state.decoder, jnp.where(read, at, -1), logits=False)
    last = jnp.maximum(jnp.sum(read, axis=1) - 1, 0)
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    return out.state, self._unembed(params, hidden)

  def _forget(self, state, context, caught_up):
    """State to go on from where nothing of what was drafted is kept."""
    length = jnp.maximum(context.length + 1, state.length)
    return state.replace(decoder=caught_up, length=length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftModel(DraftDecoder):
  """A chain of ``num_drafts`` tokens (gamma)."""

  num_drafts: int = 4

  name: ClassVar[str] = "draft_model"

  def __post_init__(self):
    super().__post_init__()
    if self.num_drafts < 1:
      raise UserError(f"{self.name} needs num_drafts >= 1, got {self.num_drafts}")

  @property
  def num_nodes(self) -> int:
    return self.num_drafts + 1

  @property
  def _recurrent(self) -> bool:
    return not all(isinstance(c.mixer, AttentionConfig) for c in self.model.config.layers)

  @property
  def _window(self) -> int:
    return super()._window if self._recurrent else 2

  def propose(self, params, state, context, rng):
    caught_up, logits = self._catch_up(params, state, context)
    first, law = self._draw(context, logits, context.length + 1)

    def extend(carry, i):
      decoder, token = carry
      position = context.length + i
      out = self._extend(params, token[:, None], decoder, position[:, None])
      token, law = self._draw(context, out.logits[:, 0], position + 1)
      return (out.state, token), (token, law)

    (decoder, _), (rest, laws) = jax.lax.scan(
      extend, (caught_up, first), jnp.arange(1, self.num_drafts, dtype=jnp.int32)
    )
    drafts = jnp.concatenate([first[:, None], rest.T], axis=1)
    q = None
    if law is not None:
      q = jnp.concatenate([law[:, None], jnp.moveaxis(laws, 0, 1)], axis=1)
    return chain(context.root, drafts, draft_probs=q), self._after(
      state, context, caught_up, decoder, self.num_drafts
    )

  def _draw(self, context, logits, position):
    """A draft per row from its logits, and the law it was drawn from where rules need it."""
    sampler, keys = context.sampler, context.keys
    if sampler.greedy or self.draws == "greedy":
      return argmax(logits), None
    if self.draws == "shared":
      return sampler.draw(logits, keys, position), None
    law = sampler.log_probs(logits)
    return sampler.draw_independently(logits, keys, position), jnp.exp(law)

  def _after(self, state, context, caught_up, decoder, fed):
    """State to go on from: the root and ``fed - 1`` drafts have been read."""
    if self._recurrent:
      return self._forget(state, context, caught_up)
    return state.replace(decoder=decoder, length=context.length + fed)

  def observe(self, params, state, tree, accepted, output, context):
    if self._recurrent:
      return state
    # Of the drafts that were read the accepted ones stay read.
    return unread(state, jnp.minimum(context.length + accepted.count, state.length))
