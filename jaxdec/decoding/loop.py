# SPDX-License-Identifier: Apache-2.0
"""The decode loop: one ``lax.while_loop`` over verify passes, wholly on the device.

Invariant, per row: the target's state holds ``length`` tokens; ``history[:length + 1]`` are the
prompt and everything emitted; its last token, the root, is not in the state yet. A row is done when
``length`` reaches ``limit`` (prompt + max_new - 1) or a stop id was emitted; a done row keeps
stepping with count 0, which leaves it as it was. Plain decoding is the same loop with M = 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int, Key

from jaxdec.decoding.executables import Executable
from jaxdec.decoding.sampling import DRAFT, Sampler
from jaxdec.decoding.verify import Rule, Verdict
from jaxdec.drafting.base import Accepted, Context, Drafter, Prompt, Target, TargetOutput
from jaxdec.mixers.base import write_rows
from jaxdec.models.decoder import Decoder, DecoderState
from jaxdec.models.prefill import read_prompt


@struct.dataclass
class Carry:
  """What changes while decoding.

  ``counts[b, i]``: tokens row b emitted in step i, modulo the buffer's width (0 once done).
  """

  state: DecoderState
  draft: Any
  history: Int[Array, "B S"]
  root: Int[Array, "B"]
  length: Int[Array, "B"]
  done: Bool[Array, "B"]
  steps: Int[Array, ""]
  counts: Int[Array, "B W"]


@struct.dataclass
class Request:
  """What doesn't. Row data, so new seeds, lengths and stop ids compile nothing."""

  keys: Key[Array, "B"]
  limit: Int[Array, "B"]  # length at which the row is done
  stop: Int[Array, "J"] | Int[Array, "B J"]  # stop ids, of all rows or by row, padded with -1


def _prefill(
  params, history, lengths, prefix=None, *, model: Decoder, chunk: int, capture, keep
) -> tuple[DecoderState, TargetOutput]:
  state, hidden, features = read_prompt(
    model,
    params,
    model.init_state(*history.shape),
    history,
    lengths,
    chunk=chunk,
    capture=capture,
    keep=keep,
    prefix=prefix,
  )
  return state, TargetOutput(hidden, features)


def _begin(
  params,
  draft_params,
  state,
  output: TargetOutput,
  draft,
  history,
  lengths,
  request: Request,
  prefix=None,
  *,
  model: Decoder,
  drafter: Drafter | None,
  sampler: Sampler,
  warm: bool,
) -> Carry:
  """Draws the first token from the prompt's last position and starts the drafter.

  ``draft`` is the drafter's state of an earlier call where ``warm``, else None.
  """
  hidden = output.hidden
  batch, capacity = history.shape
  rows = jnp.arange(batch)
  last = hidden[rows, lengths - 1] if hidden.shape[1] > 1 else hidden[:, 0]
  logits = model.apply({"params": params}, last, method="unembed")
  root = sampler.draw(logits, request.keys, lengths)
  if drafter is None:
    draft = ()
  else:
    if not warm:
      # Hidden from the compiler: it would spend seconds folding attention over an empty cache.
      draft = jax.lax.optimization_barrier(drafter.init_state(batch, capacity))
    prompt = Prompt(
      history[:, : hidden.shape[1]] if drafter.needs_prompt_hidden else history,
      lengths,
      root,
      prefix,
    )
    draft = drafter.start(draft_params, draft, prompt, output, Target(model, params, state))
  history = write_rows(history, root[:, None], lengths)
  done = (lengths >= request.limit) | jnp.any(root[:, None] == request.stop, axis=1)
  return Carry(
    state=state,
    draft=draft,
    history=history,
    root=root,
    length=lengths,
    done=done,
    steps=jnp.int32(0),
    counts=jnp.zeros((batch, capacity), jnp.int32),
  )


def _decode(
  carry: Carry,
  params,
  draft_params,
  request: Request,
  until,
  stopped,
  *,
  model: Decoder,
  drafter: Drafter | None,
  sampler: Sampler,
  rule: Rule,
) -> Carry:
  """Steps until all rows are done or ``carry.steps`` is ``until``; ``stopped`` rows are done."""

  carry = carry.replace(done=carry.done | stopped)

  def go_on(c):
    return (c.steps < until) & ~jnp.all(c.done)

  return passes(carry, params, draft_params, request, go_on, model, drafter, sampler, rule)


def passes(carry, params, draft_params, request, go_on, model, drafter, sampler, rule) -> Carry:
  """Verify passes for as long as ``go_on(carry)``; plain ones where there is nothing to verify."""

  def repeat(step, c, wanted=lambda c: True):
    def body(c):
      return step(c, params, draft_params, request, model, drafter, sampler, rule)

    return jax.lax.while_loop(lambda c: go_on(c) & wanted(c), body, c)

  if drafter is None:
    return repeat(plain_step, carry)
  if not drafter.may_pass:
    return repeat(draft_step, carry)

  def drafts(c):
    context = make_context(c, params, request, model, sampler)
    return jnp.any(drafter.has_draft(draft_params, c.draft, context) & ~c.done)

  # Two loops in turn rather than a branch in one: a branch would copy the target's state.
  def turn(c):
    c = repeat(plain_step, c, lambda c: ~drafts(c))
    return repeat(draft_step, c, drafts)

  return jax.lax.while_loop(go_on, turn, carry)


def plain_step(c: Carry, params, draft_params, request, model, drafter, sampler, rule) -> Carry:
  """One token per row: the baseline every drafter is measured against."""
  position = jnp.where(c.done, -1, c.length)[:, None]
  out = model.apply({"params": params}, c.root[:, None], c.state, position, method="extend")
  token = sampler.draw(out.logits[:, 0], request.keys, c.length + 1)
  tokens, count, done = cut(c, request, token[:, None], jnp.ones_like(c.length))
  return advance(c, out.state, c.draft, tokens, count, done)


def draft_step(c: Carry, params, draft_params, request, model, drafter, sampler, rule) -> Carry:
  """propose -> verify -> decide -> cut -> commit -> observe."""
  context, tree, draft = propose(c, params, draft_params, request, model, drafter, sampler)
  out = drafter.verify(draft_params, tree, context)
  verdict = rule(tree, out.logits, sampler, request.keys, c.length)
  return settle(
    c, params, draft_params, request, model, drafter, context, tree, draft, out, verdict
  )


def make_context(c, params, request, model, sampler) -> Context:
  """What a drafter may look at in this step."""
  return Context(
    root=c.root,
    length=c.length,
    history=c.history,
    target=Target(model, params, c.state),
    sampler=sampler,
    keys=request.keys,
  )


def propose(c, params, draft_params, request, model, drafter, sampler):
  """The drafter's turn: ``context, tree, draft state``."""
  context = make_context(c, params, request, model, sampler)
  # For drafters that want noise of their own; per-row noise comes from context.keys.
  rng = jax.random.fold_in(jax.random.fold_in(request.keys[0], jnp.uint32(DRAFT)), c.steps)
  tree, draft = drafter.propose(draft_params, c.draft, context, rng)
  return context, tree, draft


def settle(
  c, params, draft_params, request, model, drafter, context, tree, draft, out, verdict: Verdict
) -> Carry:
  """Cuts the accepted block, commits it to the target, shows it to the drafter."""
  tokens, count, done = cut(c, request, verdict.tokens, verdict.count)
  state = model.apply(
    {"params": params}, c.state, out.pending, verdict.path, count, method="commit"
  )
  new = advance(c, state, draft, tokens, count, done)
  accepted = Accepted(path=verdict.path, count=count, next_token=new.root, tokens=tokens)
  output = TargetOutput(out.hidden, out.features, out.logits)
  return new.replace(draft=drafter.observe(draft_params, draft, tree, accepted, output, context))


def cut(c: Carry, request: Request, tokens: Int[Array, "B P"], count: Int[Array, "B"]):
  """Cuts a block at the budget and after its first stop id; done rows emit nothing.

  Returns ``tokens, count, done``.
  """
  count = jnp.minimum(count, request.limit - c.length)
  index = jnp.arange(tokens.shape[1])
  stop = jnp.atleast_2d(request.stop)[:, None]
  is_stop = jnp.any(tokens[:, :, None] == stop, axis=-1) & (index < count[:, None])
  first = jnp.min(jnp.where(is_stop, index, tokens.shape[1]), axis=1)
  hit = first < tokens.shape[1]
  count = jnp.where(c.done, 0, jnp.where(hit, first + 1, count)).astype(jnp.int32)
  return tokens, count, c.done | hit | (c.length + count >= request.limit)


def advance(c: Carry, state, draft, tokens, count, done) -> Carry:
  """Writes the emitted tokens and moves the root."""
  last = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
  return Carry(
    state=state,
    draft=draft,
    history=write_rows(c.history, tokens, c.length + 1),
    root=jnp.where(count > 0, last, c.root),
    length=c.length + count,
    done=done,
    steps=c.steps + 1,
    counts=jax.lax.dynamic_update_slice(c.counts, count[:, None], (0, c.steps % c.counts.shape[1])),
  )


prefill = Executable("prefill", _prefill)
begin = Executable("begin", _begin, donate=(2, 4, 5))
decode = Executable("decode", _decode, donate=(0,))
