# SPDX-License-Identifier: Apache-2.0
"""SpecDec++ (arXiv 2405.19715): the draft model says when to stop.

A head on the draft model's last state, which has just read the draft ``Y_i``, guesses the chance
``c_i`` that the target accepts it. With h the threshold a round is

  draw Y_1, Y_2;  P = c_1;  while 1 - P <= h: draw Y_{i+1}, P <- P c_i

so every draft is verified, the last one too, whatever it is (``drafting/stopping.py`` says why). A
drafted end of text ends the round as well. The loop over draft passes stops when all rows have.

The head learns on texts X of the target: at each position ``Y_i ~ q(.|X_{<i})`` is drawn, its label
is ``min(1, p(Y_i) / q(Y_i))``, and the draft model reads ``Z_i``: ``X_i`` with probability r, which
gives no loss, else ``Y_i``, so that the head meets contexts the draft model made.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdec.drafting.base import Params
from jaxdec.drafting.draft_model import DraftModel
from jaxdec.drafting.stopping import (
  acceptance_logit,
  acceptance_loss,
  calibration_error,
  init_head,
  verify_widths,
)
from jaxdec.drafting.tree import Tree, chain
from jaxdec.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecDec(DraftModel):
  """A draft model with an acceptance head: ``drafter_params = {"model": ..., "head": ...}``.

  Attributes:
    num_drafts: most drafts of a round. At least two are made.
    threshold: h, the predicted chance of any rejection that ends a round: 0 drafts two, 1 drafts
      ``num_drafts``.
    num_blocks: residual blocks of the head.
    widths: sizes of trees the target verifies, see ``jaxdec.drafting.stopping.verify_widths``.
  """

  name: ClassVar[str] = "specdec"

  num_drafts: int = 20
  threshold: float = 0.3
  num_blocks: int = 3
  widths: tuple[int, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.threshold <= 1:
      raise UserError(f"threshold is a probability, got {self.threshold}; use 0 to 1")
    if any(not 1 <= w <= self.num_nodes for w in self.widths):
      raise UserError(f"widths must lie in 1..{self.num_nodes}, got {self.widths}")

  def init_head(self, rng: jax.Array) -> Params:
    """Fresh parameters of the head, with logical axis names."""
    return init_head(rng, self.model.config.dim, self.num_blocks)

  def init_params(self, rng, target=None):
    model_rng, head_rng = jax.random.split(rng)
    return {
      "model": super().init_params(model_rng, target),
      "head": nn.unbox(self.init_head(head_rng)),
    }

  def start(self, params, state, prompt, output, target):
    state = super().start(params["model"], state, prompt, output, target)
    return state.replace(idle=jnp.zeros(prompt.root.shape, bool))

  def observe(self, params, state, tree, accepted, output, context):
    # Rows that have finished must not keep the others drafting.
    state = super().observe(params, state, tree, accepted, output, context)
    return state.replace(idle=accepted.count == 0)

  def propose(self, params, state, context, rng):
    tree, _, state = self.draft(params, state, context)
    return tree, state

  def draft(self, params, state, context) -> tuple[Tree, Float[Array, "B G"], Any]:
    """The round: its tree, ``c_i`` by draft (1 where not known), and the state after it."""
    batch, most = context.root.shape[0], self.num_drafts
    ends = jnp.asarray(self.model.config.eos_ids or (-1,), jnp.int32)
    caught_up, logits = self._catch_up(params["model"], state, context)
    token, law = self._draw(context, logits, context.length + 1)

    def put(buffer, x, i):
      return jax.lax.dynamic_update_slice_in_dim(buffer, x[:, None].astype(buffer.dtype), i, axis=1)

    def empty(*shape, fill=0.0, dtype=jnp.float32):
      return jnp.full((batch, most, *shape), fill, dtype)

    def go_on(carry):
      i, _, _, live, *_ = carry
      return (i < most) & jnp.any(live)

    def extend(carry):
      i, decoder, token, live, survival, tokens, laws, chances, made = carry
      position = context.length + i
      out = self._extend(params["model"], token[:, None], decoder, position[:, None])
      chance = self.chance(params, out.hidden[:, 0])
      token, law = self._draw(context, out.logits[:, 0], position + 1)
      survival = survival * chance
      tokens, made = put(tokens, token, i), put(made, live, i)
      laws = laws if law is None else put(laws, law, i)
      chances = put(chances, chance, i - 1)
      ended = jnp.any(token[:, None] == ends, axis=1)
      live = live & (1 - survival <= self.threshold) & ~ended
      return i + 1, out.state, token, live, survival, tokens, laws, chances, made

    live = ~jnp.any(token[:, None] == ends, axis=1) & ~state.idle
    carry = (
      jnp.int32(1),
      caught_up,
      token,
      live,
      jnp.ones(batch),
      put(empty(dtype=jnp.int32), token, 0),
      None if law is None else put(empty(self.vocab_size), law, 0),
      empty(fill=1.0),
      put(empty(fill=False, dtype=bool), jnp.ones(batch, bool), 0),
    )
    fed, decoder, _, _, _, tokens, laws, chances, made = jax.lax.while_loop(go_on, extend, carry)
    tree = chain(context.root, tokens, valid=made, draft_probs=laws)
    return tree, chances, self._after(state, context, caught_up, decoder, fed)

  def chance(self, params, hidden: Float[Array, "B D"]) -> Float[Array, "B"]:
    """``c``: the predicted chance that the draft these states have just read is accepted."""
    return jax.nn.sigmoid(acceptance_logit(params["head"], hidden))

  def verify(self, params, tree, context):
    return verify_widths(super().verify, params, tree, context, self.widths)

  def head_loss(
    self,
    head: Params,
    draft_params: Params,
    target_logits: Float[Array, "B T V"],
    batch: dict[str, Array],
    rng: jax.Array,
    sampler: Any,
    *,
    mix: float = 0.15,
    rejection_weight: float = 6.0,
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The head's loss on texts of the target, and metrics.

    Args:
      head: the head's parameters; ``draft_params`` the draft model's, which don't learn.
      target_logits: of the texts ``batch["tokens"]``; the draft model's are computed here.
      sampler: the law decoding will use; greedy: drafts are the argmax, labels 0 or 1.
      mix: r, the share of positions where the draft model reads the text itself.

    Returns:
      The loss, and ``ece``, the calibration error, ``accepted`` and ``predicted``, the mean label
      and guess, ``weight``, the number of labelled drafts.
    """
    tokens, mask = batch["tokens"], batch["loss_mask"][:, 1:] > 0

    def read(tokens):
      return self.model.apply(
        {"params": draft_params}, tokens, batch["positions"], batch["segment_ids"]
      )

    draw_rng, mix_rng = jax.random.split(rng)
    logits = read(tokens).logits[:, :-1]
    log_q, log_p = sampler.log_probs(logits), sampler.log_probs(target_logits[:, :-1])
    drafts = jax.random.categorical(draw_rng, log_q)
    pick = lambda x: jnp.take_along_axis(x, drafts[..., None], axis=-1)[..., 0]  # noqa: E731
    accepted = jnp.minimum(1.0, jnp.exp(pick(log_p) - pick(log_q)))
    same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    used = mask & same & (jax.random.uniform(mix_rng, drafts.shape) >= mix)
    mixed = jnp.where(used, drafts, tokens[:, 1:])
    states = read(jnp.concatenate([tokens[:, :1], mixed], axis=1)).hidden[:, 1:]
    guess = acceptance_logit(head, jax.lax.stop_gradient(states))
    weights = used.astype(jnp.float32)
    accepted, predicted = jax.lax.stop_gradient(accepted), jax.nn.sigmoid(guess)
    count = jnp.maximum(jnp.sum(weights), 1.0)
    metrics = {
      "ece": calibration_error(predicted, accepted, weights),
      "accepted": jnp.sum(accepted * weights) / count,
      "predicted": jnp.sum(predicted * weights) / count,
      "weight": jnp.sum(weights),
    }
    return acceptance_loss(guess, accepted, weights, rejection_weight), metrics
