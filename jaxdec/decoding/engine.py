# SPDX-License-Identifier: Apache-2.0
"""A continuous-batching engine: requests come, share the target's passes, and go.

  engine = Engine(model, params, slots=8, capacity=512)
  id = engine.admit(prompt, max_new_tokens=100, sampler=Sampler(temperature=0.7), seed=3)
  while not engine.idle:
    for event in engine.step():
      ...

Every request gets exactly the tokens that ``generate`` gives it alone with its sampler and seed:
which requests share its passes, when they came and whether they were cancelled changes nothing.
Noise is keyed by request and position, rows of a batch don't see each other, and with a drafter the
rule is ``match``, the one whose output doesn't depend on the drafts.

A step computes at most ``budget`` tokens, by the rules of ``jaxdec.decoding.scheduler``: a pass
over the decoding slots, and pieces of prompts besides. Where no prompt is waiting for a piece, it
is several passes in one program. Passes and pieces are programs of their own, which read the
weights once each; all are compiled by the first requests, and none after them.

Source: Orca (OSDI 2022, iteration-level scheduling) and Sarathi-Serve (arXiv 2403.02310).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from jaxdec.decoding import engine_programs as programs
from jaxdec.decoding import loop
from jaxdec.decoding.cache import bucket
from jaxdec.decoding.request import TextCodec, check, check_prefill, parse_prompts, parse_stops
from jaxdec.decoding.row_sampler import RowSampler
from jaxdec.decoding.sampling import Sampler, request_keys
from jaxdec.decoding.scheduler import Chunk, Scheduler
from jaxdec.decoding.text import RowText
from jaxdec.decoding.verify import Match
from jaxdec.drafting.base import Drafter
from jaxdec.drafting.registry import get as get_drafter
from jaxdec.errors import UserError
from jaxdec.models.decoder import Decoder

Reason = Literal["length", "stop", "cancelled", "refused"]


class QueueFull(UserError):
  """The engine has as many requests waiting as it may have; step it, then try again."""


@dataclasses.dataclass(frozen=True)
class EngineRequest:
  """Arguments of ``Engine.admit``."""

  prompt: Any
  max_new_tokens: int
  sampler: Sampler | None = None
  seed: int = 0
  stop: Any = ...


@dataclasses.dataclass(frozen=True)
class Event:
  """New tokens of a request, and their text; ``done`` with its last ones."""

  id: int
  tokens: list[int]
  text: str | None
  done: bool


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of a request.

  Attributes:
    tokens, text: as in ``Generation``; of a cancelled request, what there was.
    reason: ``length``: max_new_tokens; ``stop``: a stop id or string; ``cancelled``; ``refused``,
      by ``run``: then ``error`` says why.
    passes: target passes it took part in; its first token took none.
    reused: tokens of its prompt whose state was copied from another request's.
    first_token_seconds, seconds: from ``admit`` to the first token and to the end.
  """

  id: int
  tokens: list[int]
  text: str | None
  reason: Reason
  error: str | None = None
  passes: int = 0
  reused: int = 0
  first_token_seconds: float | None = None
  seconds: float = 0.0


@dataclasses.dataclass
class _Live:
  """Host side of a request that is waiting, being read, or decoding."""

  id: int
  prompt: list[int]
  max_new_tokens: int
  sampler: Sampler
  keys: jax.Array
  stop: np.ndarray
  row: RowText
  admitted: float
  sent: int = 0
  passes: int = 0
  reused: int = 0
  first: float | None = None


class Engine:
  """See the module's docstring.

  Args:
    model, params: the decoder (unrolled layout) and its parameters.
    slots: R, requests that decode at the same time.
    capacity: the most tokens a request may have, prompt and ``max_new_tokens`` together. Every slot
      holds keys and values of that many (and of a chunk more) from the start.
    chunk: C, prompt tokens read at a time.
    budget: the most tokens a step computes, at least ``slots * M + chunk`` (M: nodes of the
      drafter's trees, 1 without one). More: prompts are read faster, and a token takes longer while
      they are. None: 512, or what is needed.
    passes: passes a step takes at most where no prompt waits for a piece.
    sampler: of requests that name none.
    drafter, drafter_params: as in ``generate``, for all requests.
    tokenizer: for prompts and stop strings that are text.
    queue: the most requests that may wait for a slot.
    stop_ids: the most stop ids a request may have.
    reuse: whether a prompt that begins like the text in some slot starts from a copy of its state.
      Recurrent layers keep no past states: there only a prompt that continues the *whole* text of
      a finished request does. Off with drafters that read the target's outputs for the whole
      prompt.

  Attributes:
    results: of requests that have ended, by id, until they are taken out: ``results.pop(id)``.

  Raises:
    UserError: arguments that don't fit together.
  """

  def __init__(
    self,
    model: Decoder,
    params: Any,
    *,
    slots: int = 8,
    capacity: int = 512,
    chunk: int = 64,
    budget: int | None = None,
    passes: int = 8,
    sampler: Sampler = Sampler(),  # noqa: B008
    drafter: Drafter | str | None = None,
    drafter_params: Any = None,
    tokenizer: TextCodec | None = None,
    queue: int = 256,
    stop_ids: int = 8,
    reuse: bool = True,
  ):
    check_prefill(model)
    for name, value in {
      "slots": slots, "capacity": capacity, "chunk": chunk, "passes": passes, "queue": queue,
      "stop_ids": stop_ids,
    }.items():  # fmt: skip
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"Engine: {name} must be an integer of at least 1, got {value!r}")
    if capacity > model.config.max_length:
      raise UserError(
        f"Engine: capacity={capacity} is over the model's limit of {model.config.max_length} tokens"
      )
    self._drafter = drafter = get_drafter(drafter)
    nodes, depth = (drafter.num_nodes, drafter.max_depth) if drafter else (1, 0)
    needed = slots * nodes + chunk
    budget = max(512, needed) if budget is None else budget
    if budget < needed:
      raise UserError(
        f"Engine: budget={budget} tokens a step can't hold one pass of {slots} slots of {nodes} "
        f"and a chunk of {chunk}; at least {needed}, or fewer slots, or a smaller chunk"
      )
    self.model, self.capacity, self.passes, self.sampler = model, capacity, passes, sampler
    self._params, self._draft_params = params, drafter_params
    self._tokenizer, self._chunk, self._stop_ids = tokenizer, chunk, stop_ids
    # A chunk may begin at the last prompt position; the drafts of the last pass lie behind the end.
    self._room = bucket(capacity + max(chunk, nodes, depth + 2))
    check([[0]], 1, model.config, 0, drafter, drafter_params, Match(), sampler)
    self._reuse = reuse and not (drafter is not None and drafter.needs_prompt_hidden)
    self._any_beginning = programs.can_share(model)
    draft, self._axes = programs.draft_rows(
      params, drafter_params, model, drafter, slots, self._room
    )
    self._slots = programs.empty_slots(model, draft, slots, self._room, passes, stop_ids)
    self._reader = programs.empty_reader(model, drafter, self._room)
    self._stopped = np.zeros(slots, bool)
    self._texts: list[list[int]] = [[] for _ in range(slots)]  # all but the last is in the state
    self._live: dict[int, _Live] = {}
    self._sources: dict[int, tuple[int, int]] = {}  # id -> (slot, tokens) to copy
    self._ids = 0
    self.results: dict[int, Result] = {}
    self._schedule = Scheduler(
      slots=slots, width=nodes, chunk=chunk, budget=budget, queue=queue, skip=self._skip
    )

  @property
  def idle(self) -> bool:
    """Nothing waits, is read, or decodes."""
    return self._schedule.idle

  @property
  def full(self) -> bool:
    """``admit`` would raise ``QueueFull``."""
    return self._schedule.full

  def admit(
    self,
    prompt: Any,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: Any = ...,
  ) -> int:
    """Takes a request; the arguments mean what they mean in ``generate`` for a batch of one.

    Returns:
      Its id, which events and results carry.

    Raises:
      QueueFull: as many requests as may wait are waiting.
      UserError: a mistake in the request. Nothing has changed for the others.
    """
    config = self.model.config
    sampler = self.sampler if sampler is None else sampler
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool):
      raise UserError(f"seed must be an integer, got {seed!r}")
    (prompt,) = parse_prompts([prompt], config, self._tokenizer)
    stops = parse_stops(stop, config, self._tokenizer)
    check(
      [prompt], max_new_tokens, config, seed, self._drafter, self._draft_params, Match(), sampler
    )
    if len(prompt) + max_new_tokens > self.capacity:
      raise UserError(
        f"the prompt has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}: together "
        f"{len(prompt) + max_new_tokens}, over the engine's capacity of {self.capacity} a request; "
        "shorten one"
      )
    if len(stops.ids) > self._stop_ids:
      raise UserError(
        f"the request has {len(stops.ids)} stop ids (the model's included), the engine takes "
        f"{self._stop_ids}; make it with stop_ids={len(stops.ids)}"
      )
    if self.full:
      raise QueueFull(
        f"the queue holds {self._schedule.bound} requests, its bound; call step() until one has a "
        "slot, or make the engine with a larger queue"
      )
    id = self._new_id()
    padded = [*stops.ids, *[-1] * (self._stop_ids - len(stops.ids))]
    self._live[id] = _Live(
      id=id,
      prompt=prompt,
      max_new_tokens=int(max_new_tokens),
      sampler=sampler,
      keys=request_keys([int(seed)], 1),
      stop=np.asarray([padded], np.int32),
      row=RowText(self._tokenizer, stops.strings),
      admitted=time.perf_counter(),
    )
    self._schedule.submit(id, len(prompt))
    return id

  def cancel(self, id: int) -> Result:
    """Ends a request wherever it is; its result holds the tokens it had.

    Raises:
      UserError: there is no such request, or it has ended.
    """
    if id not in self._live:
      raise UserError(f"request {id} is not running: it has ended, or there never was one")
    return self._finish(self._live[id], "cancelled")

  def step(self) -> list[Event]:
    """Does one step's work; returns what was emitted, slot by slot."""
    plan = self._schedule.plan()
    report = self._advance(bool(plan.chunks)) if plan.decode else None
    seated = [(c, self._seat(c)) for c in plan.chunks if self._read(c)]
    report, firsts = jax.device_get((report, [first for _, first in seated]))
    events = []
    for slot in plan.decode:
      tokens = report.tokens[slot, : report.count[slot]].tolist()
      live = self._live[self._schedule.decoding[slot]]
      live.passes += int(report.passes[slot])
      self._texts[slot] += tokens
      events.append(self._emit(live, tokens, bool(report.done[slot])))
    for (chunk, _), (token, done) in zip(seated, firsts):
      live = self._live[chunk.id]
      self._texts[chunk.slot] = [*live.prompt, *token.tolist()]
      events.append(self._emit(live, token.tolist(), bool(done[0])))
    return events

  def run(self, requests: Iterable[EngineRequest]) -> Iterator[Result]:
    """Serves requests to the end, yielding all results as they come, cancelled ones too.

    ``requests`` is read only as far as the queue has room. Ids count the requests in their order
    (from where the engine's ids are); one that ``admit`` would refuse has a result that says why.
    """
    requests, more = iter(requests), True
    while more or self.results or not self.idle:
      while more and not self.full:
        try:
          request = next(requests)
        except StopIteration:
          more = False
          break
        try:
          self.admit(**{f.name: getattr(request, f.name) for f in dataclasses.fields(request)})
        except UserError as error:
          yield Result(self._new_id(), [], None, "refused", error=str(error))
      self.step()
      while self.results:
        yield self.results.pop(next(iter(self.results)))

  def _new_id(self) -> int:
    self._ids += 1
    return self._ids - 1

  def _advance(self, reading: bool) -> programs.Report:
    """One pass if prompts are read in this step, else several, until a wanted slot is free."""
    stopped, self._stopped = self._stopped, np.zeros_like(self._stopped)
    self._slots, report = programs.advance(
      self._slots,
      self._params,
      self._draft_params,
      np.int32(1 if reading else self.passes),
      stopped,
      np.bool_(self._schedule.queue),
      model=self.model,
      drafter=self._drafter,
    )
    return report

  def _read(self, chunk: Chunk) -> bool:
    """Reads a piece of a prompt; returns whether it was the last one."""
    live = self._live[chunk.id]
    if chunk.first:
      slot, live.reused = self._sources.pop(chunk.id, (0, 0))
      if live.reused:
        self._reader = programs.resume(
          self._reader, self._slots, np.int32(slot), np.int32(live.reused)
        )
      else:
        self._reader = programs.reset(self._reader)
    tokens = np.zeros((1, self._chunk), np.int32)
    tokens[0, : chunk.count] = live.prompt[chunk.start : chunk.start + chunk.count]
    self._reader = programs.read(
      self._params,
      self._reader,
      tokens,
      np.int32(chunk.start),
      np.int32(chunk.count),
      model=self.model,
      capture=() if self._drafter is None else self._drafter.capture,
      keep=self._drafter is not None and self._drafter.needs_prompt_hidden,
    )
    return chunk.last

  def _seat(self, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Moves the prompt that was read into its slot; its first token, and whether that is all."""
    live = self._live[chunk.id]
    length = len(live.prompt)
    history = np.zeros((1, self._room), np.int32)
    history[0, :length] = live.prompt
    self._stopped[chunk.slot] = False
    self._slots, token, done = programs.seat(
      self._slots,
      self._params,
      self._draft_params,
      self._reader,
      history,
      np.asarray([length], np.int32),
      loop.Request(live.keys, np.asarray([length + live.max_new_tokens - 1], np.int32), live.stop),
      RowSampler.of([live.sampler]),
      np.int32(chunk.slot),
      model=self.model,
      drafter=self._drafter,
      axes=self._axes,
    )
    return token, done

  def _emit(self, live: _Live, tokens: list[int], done: bool) -> Event:
    live.row.extend(tokens)
    live.first = time.perf_counter() if live.first is None else live.first
    done = done or live.row.stopped
    event = Event(live.id, live.row.tokens[live.sent :], live.row.take(done), done)
    live.sent = len(live.row.tokens)
    if done:
      stopped = live.row.stopped or live.row.tokens[-1] in live.stop
      self._finish(live, "stop" if stopped else "length")
    return event

  def _finish(self, live: _Live, reason: Reason) -> Result:
    slot = self._schedule.release(live.id)
    if slot is not None:
      self._stopped[slot] = True
    del self._live[live.id]
    self._sources.pop(live.id, None)
    result = Result(
      live.id,
      live.row.tokens,
      live.row.text,
      reason,
      passes=live.passes,
      reused=live.reused,
      first_token_seconds=None if live.first is None else live.first - live.admitted,
      seconds=time.perf_counter() - live.admitted,
    )
    self.results[live.id] = result
    return result

  def _skip(self, id: int, slot: int) -> int:
    """Prompt tokens whose state some slot holds already, where copying it saves a chunk.

    ``slot`` is the one the request gets: from here on its text is no source for others.
    """
    prompt, best, source = self._live[id].prompt, 0, 0
    for other, text in enumerate(self._texts if self._reuse else ()):
      held = len(text) - 1  # the last token is not in the state
      common = _common(prompt[:-1], text[:held])  # the last prompt token is read for its logits
      if not self._any_beginning and (other in self._schedule.decoding or common < held):
        continue
      if common > best:
        best, source = common, other
    self._texts[slot] = []
    whole, rest = (-(-n // self._chunk) for n in (len(prompt), len(prompt) - best))
    if rest == whole:
      return 0
    self._sources[id] = (source, best)
    return best


def _common(a: list[int], b: list[int]) -> int:
  """Length of the longest common beginning."""
  n = min(len(a), len(b))
  different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
  return int(different[0]) if different.size else n
