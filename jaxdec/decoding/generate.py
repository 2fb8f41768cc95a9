# SPDX-License-Identifier: Apache-2.0
"""``generate``: prompts in, tokens, text and statistics out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.decoding import loop
from jaxdec.decoding import prepack as packing
from jaxdec.decoding import shared_prefix as shared
from jaxdec.decoding.cache import bucket, capacity_for
from jaxdec.decoding.executables import compile_seconds
from jaxdec.decoding.profile import shares
from jaxdec.decoding.request import (
  Stops,
  TextCodec,
  check,
  check_prefill,
  parse_prefix,
  parse_stops,
)
from jaxdec.decoding.sampling import Sampler, request_keys
from jaxdec.decoding.stats import Stats, acceptance
from jaxdec.decoding.text import RowText
from jaxdec.decoding.verify import Rule, get_rule
from jaxdec.drafting.base import Drafter
from jaxdec.drafting.registry import get as get_drafter
from jaxdec.errors import UserError
from jaxdec.models.decoder import Decoder
from jaxdec.models.prefill import choose_chunk, padded

STOP_SLOTS = 8  # stop ids are padded to a multiple of this, so that adding one compiles nothing
TEXT_INTERVAL = 16  # passes between looks at the text where there are stop strings


@dataclasses.dataclass(frozen=True)
class Generation:
  """Attributes:

  tokens: new token ids of each prompt, ending with the stop token if one was met.
  lengths: their numbers.
  text: their text (None without a tokenizer), ending before a stop string if one was met.
  stats: see ``Stats``.
  drafter_state: what the drafter has learned; pass it to the next call for a warm start.
  """

  tokens: list[list[int]]
  lengths: list[int]
  text: list[str] | None
  stats: Stats
  drafter_state: Any = None


@dataclasses.dataclass(frozen=True)
class Piece:
  """A streamed piece of one row: new tokens and their text; ``done`` with the row's last one."""

  row: int
  tokens: list[int]
  text: str | None
  done: bool


def generate(
  model: Decoder, params: Any, prompts, *, stream: Callable[[Piece], None] | None = None, **options
) -> Generation:
  """Continues prompts; speculative decoding changes the speed, not the tokens (lossless rules).

  Args:
    model, params: the decoder (unrolled layout) and its parameters.
    prompts: list of texts or token-id lists, of any lengths.
    stream: called with every ``Piece`` as it comes; the pieces are exactly the final tokens.
    options: keywords of ``generate_stream``, where they are explained: max_new_tokens, sampler,
      drafter, drafter_params, drafter_state, rule, stop, seed, tokenizer, prefix, shared_prefix,
      prepack, prefill_chunk, interval, profile.

  Returns:
    Generation.

  Raises:
    UserError: a mistake in any argument, before anything is compiled.
  """
  if stream is None:
    options.setdefault("interval", None)
  pieces = generate_stream(model, params, prompts, **options)
  while True:
    try:
      piece = next(pieces)
    except StopIteration as end:
      return end.value
    if stream is not None:
      stream(piece)


def generate_stream(
  model: Decoder,
  params: Any,
  prompts,
  *,
  max_new_tokens: int,
  sampler: Sampler = Sampler(),  # noqa: B008
  drafter: Drafter | str | None = None,
  drafter_params: Any = None,
  drafter_state: Any = None,
  rule: Rule | str = "match",
  stop: Any = ...,
  seed: int | list[int] = 0,
  tokenizer: TextCodec | None = None,
  prefix: Any = None,
  shared_prefix: Any = None,
  prepack: bool | Literal["auto"] = False,
  prefill_chunk: int | None = None,
  interval: int | None = 4,
  profile: bool = False,
) -> Iterator[Piece]:
  """``generate`` as an iterator of pieces; its return value is the ``Generation``.

  Args:
    max_new_tokens: never exceeded.
    sampler: the law of the next token; greedy by default.
    drafter: None, a registered name, or a ``Drafter``; with ``drafter_params`` where it has any.
    drafter_state: ``Generation.drafter_state`` of an earlier call with the same drafter.
    rule: a name in ``jaxdec.decoding.RULES``, or a ``Rule``.
    stop: ``...`` the model's EOS ids; None never stops early; ids and strings are added to the
      EOS ids.
    seed: an integer (row i draws from ``fold_in(key(seed), i)``) or one integer per row (each row
      draws what it would alone with that seed). A row depends on its prompt and seed, never on
      its neighbours.
    prefix: embeddings in place of some of the prompts' tokens, such as an image's: for each prompt
      None or ``(start, values [n, D])``, which stands for its tokens ``start .. start + n - 1``
      (any ids, such as the model's image token). What the model would read there, unscaled.
    shared_prefix: what several prompts begin with, read and kept once, the same text with less
      work: a text or token ids, which come before every prompt; True: the common beginning of the
      prompts, where it is long; or a list of levels of prefixes that branch, each a list whose
      entries serve equal numbers of consecutive prompts. See ``jaxdec.decoding.shared_prefix``.
    prepack: read prompts of mixed lengths packed into rows, in one pass, in place of padding them;
      "auto": where that at least halves the work. See ``jaxdec.decoding.prepack``.
    prefill_chunk: bound on the tokens read per prefill pass.
    interval: target passes between pieces; None: as few pieces as possible.
    profile: measure the shares of drafting and verifying after decoding (compiles three more
      programs).
  """
  config = model.config
  drafter, rule = get_drafter(drafter), get_rule(rule)
  prompts, sharing = shared.parse(shared_prefix, prompts, config, tokenizer)
  stops = parse_stops(stop, config, tokenizer)
  check(prompts, max_new_tokens, config, seed, drafter, drafter_params, rule, sampler)
  prefix = parse_prefix(prefix, prompts, config)
  check_prefill(model, prefill_chunk)
  if prepack not in (True, False, "auto"):
    raise UserError(f"prepack must be True, False or 'auto', got {prepack!r}")
  if prefix is not None and (prepack is True or sharing is not None):
    raise UserError("prefix embeddings go with neither prepack nor shared_prefix; leave one out")
  if sharing is not None and prepack is True:
    raise UserError("prompts behind a shared prefix can't be packed; leave out prepack")
  if sharing is not None and drafter is not None and drafter.needs_prompt_hidden:
    if shared_prefix is not True:
      raise UserError(
        f"drafter {drafter.name!r} reads the target's states of every prompt token, and those of a "
        "shared prefix are not kept; leave out shared_prefix"
      )
    sharing = None
  return _run(
    model,
    params,
    prompts,
    stops,
    max_new_tokens,
    sampler,
    drafter,
    drafter_params,
    drafter_state,
    rule,
    seed,
    tokenizer,
    prefix,
    sharing,
    prepack,
    prefill_chunk,
    interval,
    profile,
  )


def _run(
  model,
  params,
  prompts,
  stops,
  max_new_tokens,
  sampler,
  drafter,
  drafter_params,
  drafter_state,
  rule,
  seed,
  tokenizer,
  prefix,
  sharing,
  prepack,
  prefill_chunk,
  interval,
  profile,
):
  compiling = compile_seconds()
  clock = Clock()
  batch, longest = len(prompts), max(map(len, prompts))
  chunk = choose_chunk(longest, prefill_chunk)
  nodes, depth = (drafter.num_nodes, drafter.max_depth) if drafter else (1, 0)
  if prepack == "auto":
    prepack = prefix is None and sharing is None and packing.pays(prompts, padded(longest, chunk))
  room = bucket(longest) if prepack else padded(longest, chunk)
  capacity = capacity_for(room, longest, max_new_tokens, nodes, depth)
  history, lengths, request = arrays(prompts, stops, max_new_tokens, seed, capacity)
  static = dict(model=model, drafter=drafter, sampler=sampler)
  capture = drafter.capture if drafter else ()
  keep = None
  if drafter and drafter.needs_prompt_hidden:
    # Whole chunks in a power-of-two number: few sizes, at most half of them padding.
    keep = chunk * (1 << (padded(longest, chunk) // chunk - 1).bit_length())
    keep = min(keep, capacity // chunk * chunk)
  clock.lap()
  if sharing is not None:
    own = max(len(p) - len(sharing.of(i, batch)) for i, p in enumerate(prompts))
    room = padded(own, choose_chunk(own, prefill_chunk))
    state, output = shared.prefill(
      params,
      prompts,
      sharing,
      model=model,
      capacity=capacity_for(room, own, max_new_tokens, nodes, depth),
      chunk=prefill_chunk,
      capture=capture,
    )
  elif prepack:
    state, output = packing.prefill(
      params, prompts, model=model, capacity=capacity, capture=capture, keep=keep
    )
  else:
    state, output = loop.prefill(
      params, history, lengths, prefix, model=model, chunk=chunk, capture=capture, keep=keep
    )
  warm = None if drafter_state is None else jax.tree.map(jnp.copy, drafter_state)
  carry = loop.begin(
    params,
    drafter_params,
    state,
    output,
    warm,
    history,
    lengths,
    request,
    prefix,
    **static,
    warm=warm is not None,
  )
  jax.block_until_ready(carry)
  prefill_seconds = clock.lap()

  rows = [RowText(tokenizer, stops.strings) for _ in prompts]
  finished, sent = [False] * batch, [0] * batch
  seen = np.asarray([len(p) for p in prompts])
  snapshot = jax.tree.map(jnp.copy, carry) if profile and drafter else None
  if stops.strings:
    interval = min(interval or TEXT_INTERVAL, TEXT_INTERVAL)
  until = 0
  clock.lap()
  while True:
    # Emission first: the prefill's token is there before any pass.
    new_history, new_length, done = jax.device_get((carry.history, carry.length, carry.done))
    for i, row in enumerate(rows):
      if finished[i]:
        continue
      row.extend([int(t) for t in new_history[i, seen[i] : new_length[i] + 1]])
      seen[i] = new_length[i] + 1
      finished[i] = bool(done[i]) or row.stopped
      if finished[i] or (interval is not None and len(row.tokens) > sent[i]):
        yield Piece(i, row.tokens[sent[i] :], row.take(finished[i]), finished[i])
        sent[i] = len(row.tokens)
    if all(finished):
      break
    until = until + interval if interval else capacity
    carry = loop.decode(
      carry,
      params,
      drafter_params,
      request,
      np.int32(until),
      np.asarray(finished),
      **static,
      rule=rule,
    )
  decode_seconds = clock.lap()

  generated = [row.tokens for row in rows]
  counts, steps = jax.device_get((carry.counts, carry.steps))
  per_step, by_depth, row_steps = acceptance(counts[:, :steps], [len(t) for t in generated], depth)
  draft_share = None
  if snapshot is not None:
    draft_share = shares(snapshot, params, drafter_params, request, rule=rule, **static)
  stats = Stats(
    tokens_per_step=per_step,
    accepted_by_depth=by_depth,
    target_passes=max(row_steps),
    row_steps=row_steps,
    new_tokens=sum(map(len, generated)),
    prefill_seconds=prefill_seconds,
    decode_seconds=decode_seconds,
    compile_seconds=compile_seconds() - compiling,
    draft_seconds=None if draft_share is None else draft_share * decode_seconds,
    verify_seconds=None if draft_share is None else (1 - draft_share) * decode_seconds,
  )
  text = None if tokenizer is None else [row.text for row in rows]
  return Generation(
    generated, [len(t) for t in generated], text, stats, carry.draft if drafter else None
  )


def arrays(
  prompts: list[list[int]], stops: Stops, max_new_tokens: int, seed: int | list[int], capacity: int
):
  """What was asked for, on the device: ``history, lengths, request``."""
  history = np.zeros((len(prompts), capacity), np.int32)
  for i, prompt in enumerate(prompts):
    history[i, : len(prompt)] = prompt
  lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
  slots = max(STOP_SLOTS, -(-len(stops.ids) // STOP_SLOTS) * STOP_SLOTS)
  single = isinstance(seed, (int, np.integer))
  request = loop.Request(
    keys=request_keys(int(seed) if single else [int(s) for s in seed], len(prompts)),
    limit=lengths + (max_new_tokens - 1),
    stop=jnp.asarray([*stops.ids, *[-1] * (slots - len(stops.ids))], jnp.int32),
  )
  return jnp.asarray(history), lengths, request


class Clock:
  """Wall time without the time spent compiling."""

  def __init__(self):
    self._start, self._compile = time.perf_counter(), compile_seconds()

  def lap(self) -> float:
    now, compiled = time.perf_counter(), compile_seconds()
    elapsed = (now - self._start) - (compiled - self._compile)
    self._start, self._compile = now, compiled
    return max(elapsed, 0.0)
