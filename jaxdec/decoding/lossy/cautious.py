# SPDX-License-Identifier: Apache-2.0
"""Cautious Next Token Prediction (arXiv 2507.03038): where the model is unsure, try several spans.

With H the entropy in nats of the law of the next token (the sampler's: after temperature, top-k,
top-p and min-p),

  n = 1 + floor((N - 1) * clip((H - H_low) / (H_high - H_low), 0, 1))

spans are drawn independently from here, each up to its first punctuation mark (included), a stop
token or ``span`` tokens; the one of least mean negative log-likelihood is kept whole. n = 1 is an
ordinary draw of one token. The law of the text is therefore not the model's: it prefers spans that
the model finds likely.

Not settled by the paper, chosen here: spans are capped; marks are recognised by what a token's
decoded text ends in, so merged tokens count; of equal spans the first is kept. Every span that is
tried has noise of its own, and a single draw has the noise of plain sampling: N = 1 gives its
tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.decoding.executables import Executable
from jaxdec.decoding.lossy import common
from jaxdec.decoding.lossy.common import TRIAL
from jaxdec.decoding.request import TextCodec
from jaxdec.decoding.sampling import Sampler, position_keys
from jaxdec.drafting.selection import argmax
from jaxdec.errors import UserError
from jaxdec.mixers.base import write_rows
from jaxdec.models.decoder import Decoder, DecoderState

MARKS = ".,\n?!:;)]}"


@dataclasses.dataclass(frozen=True)
class Cautious:
  """Attributes:

  tokens: new token ids of each prompt, ending with the stop token if one was met.
  text: their text; None without a tokenizer.
  spans: ``(tokens, trials)`` of every span of each row, in order; trials = 1: an ordinary draw.
  passes: model passes after the prompts.
  """

  tokens: list[list[int]]
  text: list[str] | None
  spans: list[list[tuple[int, int]]]
  passes: int


@struct.dataclass
class _Carry:
  """Every token so far is in the state; ``logits`` are those of the next, number ``count``."""

  state: DecoderState
  logits: Float[Array, "B V"]
  out: Int[Array, "B W"]
  count: Int[Array, "B"]
  done: Bool[Array, "B"]
  trials: Int[Array, "B T"]  # at a span's first token: how many were tried; else 0
  passes: Int[Array, ""]


def generate_cautious(
  model: Decoder,
  params: Any,
  prompts,
  *,
  max_new_tokens: int,
  sampler: Sampler = Sampler(temperature=0.8, top_p=0.95),  # noqa: B008
  max_trials: int = 10,
  entropy: tuple[float, float] = (0.01, 1.5),
  span: int = 32,
  nll: Literal["processed", "raw"] = "processed",
  ends: Any = None,
  stop: Any = ...,
  seed: int | list[int] = 0,
  tokenizer: TextCodec | None = None,
  prefill_chunk: int | None = None,
) -> Cautious:
  """Samples, trying several spans where the next token is uncertain and keeping the likeliest.

  Args:
    model, params, prompts, max_new_tokens, stop, seed, tokenizer, prefill_chunk: as of ``generate``
      (``stop``: ids only). Every mixer kind is served.
    sampler: the law spans are drawn from; greedy decoding has nothing to try.
    max_trials: N; as many rows are decoded per prompt while any prompt is uncertain.
    entropy: ``(H_low, H_high)`` in nats.
    span: cap on a span's tokens.
    nll: whether spans are compared under the sampler's law or the model's own.
    ends: ``bool [V]``, tokens that end a span; None: those ending in one of ``MARKS``, which takes
      a tokenizer.

  Raises:
    UserError: a mistake in any argument, before anything is compiled.
  """
  low, high = map(float, entropy)
  if not 0 <= low < high < float("inf"):
    raise UserError(f"entropy must be (low, high) with 0 <= low < high, got {entropy}")
  if max_trials < 1 or span < 1:
    raise UserError(
      f"max_trials and span must be at least 1, got max_trials {max_trials}, span {span}"
    )
  if nll not in ("processed", "raw"):
    raise UserError(f"nll must be 'processed' or 'raw', got {nll!r}")
  vocab = model.config.vocab_size
  if ends is None:
    if tokenizer is None:
      raise UserError(
        "finding punctuation needs a tokenizer; pass tokenizer=... or ends, a bool for each token"
      )
    ends = span_ends(tokenizer, vocab)
  ends = np.asarray(ends)
  if ends.shape != (vocab,) or ends.dtype != bool:
    raise UserError(
      f"ends must be {vocab} bools, one for each token, got {ends.dtype} of shape {ends.shape}"
    )
  r = common.read(
    model,
    params,
    prompts,
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    stop=stop,
    seed=seed,
    tokenizer=tokenizer,
    prefill_chunk=prefill_chunk,
  )
  c = _run(
    params,
    r.state,
    r.hidden,
    r.lengths,
    r.keys,
    r.stop,
    jnp.asarray(ends),
    np.float32([low, high]),
    model=model,
    sampler=sampler,
    trials=int(max_trials),
    span=min(int(span), int(max_new_tokens)),
    budget=int(max_new_tokens),
    raw=nll == "raw",
  )
  out, count, trials, passes = jax.device_get(c)
  tokens = [row[:n].tolist() for row, n in zip(out, count)]
  spans = []
  for row, n in zip(trials, count):
    at = np.flatnonzero(row)
    spans.append(list(zip(np.diff([*at, n]).tolist(), row[at].tolist())))
  return Cautious(tokens, common.decode_all(tokenizer, tokens), spans, int(passes))


def span_ends(tokenizer: TextCodec, vocab_size: int, marks: str = MARKS) -> np.ndarray:
  """``bool [V]``: tokens whose decoded text ends in one of ``marks``."""
  return np.asarray([tokenizer.decode([t])[-1:] in tuple(marks) for t in range(vocab_size)])


def num_trials(
  entropy: Float[Array, "*B"], bounds: Float[Array, "2"], most: int
) -> Int[Array, "*B"]:
  """How many spans to try: 1 up to the lower bound, ``most`` from the upper one on."""
  share = jnp.clip((entropy - bounds[0]) / (bounds[1] - bounds[0]), 0.0, 1.0)
  return 1 + jnp.floor((most - 1) * share).astype(jnp.int32)


def _cautious(
  params,
  state,
  hidden,
  lengths,
  keys,
  stop,
  ends,
  bounds,
  *,
  model: Decoder,
  sampler: Sampler,
  trials: int,
  span: int,
  budget: int,
  raw: bool,
):
  batch = lengths.shape[0]
  first = jnp.arange(batch) * trials  # row of a prompt's first trial

  def cost(logits, token):
    """Negative log-likelihood of the tokens drawn."""
    log_p = jax.nn.log_softmax(logits) if raw else sampler.log_probs(logits)
    return -jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]

  def try_spans(c: _Carry, number):
    """The best of ``number [B]`` spans: the state that holds all but its last token, tokens, count.

    Where one is tried it is the single token of plain sampling.
    """
    at = lengths + c.count  # position of the spans' first token
    own = common.branch_keys(position_keys(keys, at, TRIAL), trials).ravel()
    at, many, used = common.repeat_rows((at, number > 1, c.count), trials)
    tried = (jnp.arange(batch * trials) % trials) < jnp.repeat(number, trials)
    room = budget - used

    def goes_on(token, length, on):
      return on & many & ~(ends[token] | common.is_stop(token, stop)) & (length < room)

    logits = common.repeat_rows(c.logits, trials)
    plain = common.repeat_rows(sampler.draw(c.logits, keys, lengths + c.count), trials)
    token = jnp.where(many, sampler.draw(logits, own, at), plain)
    tokens = jnp.zeros((batch * trials, span), jnp.int32).at[:, 0].set(token)
    length = jnp.ones_like(token)

    def step(carry):
      i, state, tokens, token, length, total, on = carry
      position = jnp.where(on, at + i - 1, -1)
      state, logits = common.extend(model, params, state, token, position)
      token = jnp.where(on, sampler.draw(logits, own, at + i), token)
      total = total + jnp.where(on, cost(logits, token), 0.0)
      tokens = jnp.where(on[:, None] & (jnp.arange(span) == i), token[:, None], tokens)
      length = length + on
      return i + 1, state, tokens, token, length, total, goes_on(token, length, on)

    start = (
      jnp.int32(1),
      common.repeat_rows(c.state, trials),
      tokens,
      token,
      length,
      cost(logits, token),
      goes_on(token, length, tried),
    )
    alive = lambda carry: (carry[0] < span) & jnp.any(carry[-1])  # noqa: E731
    i, state, tokens, _, length, total, _ = jax.lax.while_loop(alive, step, start)
    mean = jnp.where(tried, total / length, jnp.inf).reshape(batch, trials)
    best = first + argmax(-mean)
    return (*common.take_rows((state, tokens, length), best), i - 1)

  def one_token(c: _Carry, number):
    token = sampler.draw(c.logits, keys, lengths + c.count)
    tokens = jnp.zeros((batch, span), jnp.int32).at[:, 0].set(token)
    return c.state, tokens, jnp.ones_like(token), jnp.int32(0)

  def step(c: _Carry):
    log_p = sampler.log_probs(c.logits)
    entropy = -jnp.sum(jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0.0), axis=-1)
    number = jnp.where(c.done, 1, num_trials(entropy, bounds, trials))
    if trials == 1 or sampler.greedy:
      state, tokens, length, passes = one_token(c, number)
    else:
      # The branch copies every row's state for its trials: not where nobody has any.
      unsure = jnp.any(number > 1)
      state, tokens, length, passes = jax.lax.cond(unsure, try_spans, one_token, c, number)
    length = jnp.where(c.done, 0, length)
    last = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    count = c.count + length
    done = c.done | common.is_stop(last, stop) | (count >= budget)
    state, logits = common.extend(
      model, params, state, last, jnp.where(done, -1, lengths + count - 1)
    )
    here = (jnp.arange(budget) == c.count[:, None]) & ~c.done[:, None]
    return _Carry(
      state=state,
      logits=logits,
      out=write_rows(c.out, tokens, c.count),
      count=count,
      done=done,
      trials=jnp.where(here, number[:, None], c.trials),
      passes=c.passes + passes + 1,
    )

  c = _Carry(
    state=state,
    logits=common.unembed(model, params, hidden),
    out=jnp.zeros((batch, budget + span), jnp.int32),
    count=jnp.zeros(batch, jnp.int32),
    done=jnp.zeros(batch, bool),
    trials=jnp.zeros((batch, budget), jnp.int32),
    passes=jnp.int32(0),
  )
  c = jax.lax.while_loop(lambda c: ~jnp.all(c.done), step, c)
  return c.out, c.count, c.trials, c.passes


_run = Executable("cautious", _cautious)
