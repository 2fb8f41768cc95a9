# SPDX-License-Identifier: Apache-2.0
"""PEARL (arXiv 2408.11850): the draft model writes on while the target verifies.

The text y ends in the root; d are the drafts after it that nobody has judged, none of them (PRE) or
``gamma - 1`` (POST). In a round, at the same time,

  the draft model extends y + d by n_1 .. n_gamma
  the target reads [root, d]: its last row is the law of n_1
  PRE   n_1 passes: y <- y n_1, d <- n_2 .. n_gamma, POST (pre-verify); else y <- y t, stay in PRE
  POST  d and n_1 pass: y <- y d n_1, d <- n_2 .. n_gamma (post-verify);
        else y <- y, those that passed, t; d <- nothing, PRE

with t the target's own token where a draft failed. Neither half needs what the other computes, so
a round takes ``max(gamma draft passes, one target pass)`` instead of their sum, and drafting gets
longer where it goes well. No bonus token: nobody has judged beyond n_1.

Under rule ``match`` a token passes iff it equals t, which is n_1's judgement as well: the token the
target emits after d *is* n_1 or takes its place. A PEARL round is thus a step of the decode loop
over the chain d; that n_1 was right shows in ``observe``. Rows are in modes of their own.

On one device the halves of a round are one after the other, whatever the order: PEARL then costs
more draft passes than ``DraftModel`` for no time saved. It is for two groups of devices, see
``jaxdec.decoding.generate_pearl``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxdec.drafting.base import Accepted
from jaxdec.drafting.draft_model import DraftModel, DraftModelState, unread
from jaxdec.drafting.tree import Tree, chain
from jaxdec.errors import UserError


@struct.dataclass
class Unjudged:
  """The drafts d of every row. ``post``: rows that have any."""

  tokens: Int[Array, "B G-1"]
  post: Bool[Array, "B"]

  @classmethod
  def none(cls, batch: int, gamma: int) -> Unjudged:
    """What a text begins with: PRE."""
    return cls(jnp.zeros((batch, gamma - 1), jnp.int32), jnp.zeros(batch, bool))

  @property
  def count(self) -> Int[Array, "B"]:
    return jnp.where(self.post, self.tokens.shape[1], 0)

  def tree(self, root: Int[Array, "B"]) -> Tree:
    """[root, d]"""
    return chain(root, self.tokens, valid=jnp.broadcast_to(self.post[:, None], self.tokens.shape))

  def passed(self, accepted: Accepted) -> Bool[Array, "B"]:
    """Where all of d was accepted, as far as stops and budgets let it be."""
    return accepted.count == self.count + 1

  @classmethod
  def after(
    cls, passed: Bool[Array, "B"], root: Int[Array, "B"], ahead: Int[Array, "B G"]
  ) -> Unjudged:
    """d of the next round. root: the token emitted where n_1 was judged. ahead: n_1 .. n_gamma."""
    return cls(ahead[:, 1:], passed & (root == ahead[:, 0]))


@struct.dataclass
class PearlState(DraftModelState):
  """``unjudged``: d. ``ahead``: n of the last round."""

  unjudged: Unjudged = None
  ahead: Int[Array, "B G"] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pearl(DraftModel):
  """A draft model whose ``num_drafts`` (gamma) passes fill the time of one target pass.

  gamma is best about ``seconds of a target pass / seconds of a draft pass``. 1 is legal, and plain
  decoding: nothing is ever left unjudged.

  Raises:
    UserError: see ``DraftModel``; or ``draws="sampled"``: rules that judge by probabilities have no
      row to judge n_1 by, rule ``match`` has.
  """

  name: ClassVar[str] = "pearl"

  def __post_init__(self):
    super().__post_init__()
    if self.draws == "sampled":
      raise UserError("pearl's drafts are judged by rule 'match'; draws is greedy or shared")

  @property
  def num_nodes(self) -> int:
    return self.num_drafts

  def init_state(self, batch, capacity):
    state = super().init_state(batch, capacity + self.num_drafts)  # drafts that run ahead of d
    return self._fresh(state.decoder, state.length)

  def start(self, params, state, prompt, output, target):
    tokens = jnp.pad(prompt.tokens, ((0, 0), (0, self.num_drafts)))
    state = super().start(params, state, prompt.replace(tokens=tokens), output, target)
    return self._fresh(state.decoder, state.length)

  def _fresh(self, decoder, length):
    batch = length.shape[0]
    ahead = jnp.zeros((batch, self.num_drafts), jnp.int32)
    return PearlState(decoder, length, None, Unjudged.none(batch, self.num_drafts), ahead)

  def propose(self, params, state, context, rng):
    state = self.write_on(params, state, context)
    # What was written just now is for the next round: the target need not wait for it.
    return state.unjudged.tree(context.root), state

  def write_on(self, params, state: PearlState, context) -> PearlState:
    """The draft model's half of a round: ``ahead``, from y + d whose last token is unread."""
    d, kept = state.unjudged, state.decoder
    decoder, last = kept, context.root
    if self.num_drafts > 1:
      last = jnp.where(d.post, d.tokens[:, -1], last)
    if self._recurrent:
      kept, decoder = self._reread(params, state, context)

    def extend(carry, position):
      decoder, token = carry
      out = self._extend(params, token[:, None], decoder, position[:, None])
      token, _ = self._draw(context, out.logits[:, 0], position + 1)
      return (out.state, token), token

    start = context.length + d.count
    positions = start + jnp.arange(self.num_drafts, dtype=jnp.int32)[:, None]
    (decoder, _), ahead = jax.lax.scan(extend, (decoder, last), positions)
    if self._recurrent:
      return state.replace(decoder=kept, length=context.length, ahead=ahead.T)
    return state.replace(decoder=decoder, length=start + self.num_drafts, ahead=ahead.T)

  def _reread(self, params, state, context):
    """Where nothing read can be taken back: after y without the root, and after all but the last of
    y + d."""
    at = state.length[:, None] + jnp.arange(self._window, dtype=jnp.int32)
    tokens = jnp.take_along_axis(context.history, at, axis=1, mode="clip")
    at = jnp.where(at < context.length[:, None], at, -1)
    kept = self._extend(params, tokens, state.decoder, at, logits=False).state
    if self.num_drafts == 1:
      return kept, kept
    tokens = jnp.concatenate([context.root[:, None], state.unjudged.tokens[:, :-1]], axis=1)
    at = context.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    at = jnp.where(state.unjudged.post[:, None], at, -1)
    return kept, self._extend(params, tokens, kept, at, logits=False).state

  def observe(self, params, state, tree, accepted, output, context):
    passed = state.unjudged.passed(accepted)
    unjudged = Unjudged.after(passed, accepted.next_token, state.ahead)
    if not self._recurrent:
      # Rejected drafts are unread; the token in their place is the root, which nobody has read.
      accepted_length = jnp.minimum(context.length + accepted.count, state.length)
      state = unread(state, jnp.where(unjudged.post, state.length, accepted_length))
    return state.replace(unjudged=unjudged)
