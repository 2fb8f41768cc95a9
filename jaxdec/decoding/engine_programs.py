# SPDX-License-Identifier: Apache-2.0
"""What the engine runs on the device: a few programs, compiled once each, whatever comes and goes.

* ``read``: one chunk of one prompt, in a batch of one with a state of its own (``Reader``);
* ``seat``: the prompt is read: draw its first token and write its rows into a slot;
* ``advance``: passes of the decode loop over all slots;
* ``reset``: empty the reader's state; ``resume``: fill it with the beginning of a slot's.

Slots and the reader share nothing, so that an unfinished prompt costs the decoding rows nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.decoding import loop
from jaxdec.decoding.executables import Executable
from jaxdec.decoding.row_sampler import RowSampler
from jaxdec.decoding.verify import Match
from jaxdec.drafting.base import Drafter, Prompt, Target, TargetOutput
from jaxdec.mixers.attention import KVState
from jaxdec.models.decoder import Decoder, DecoderState


@struct.dataclass
class Slots:
  """All rows: what changes and what doesn't. A free slot is a row that is done."""

  carry: loop.Carry
  request: loop.Request
  sampler: RowSampler


@struct.dataclass
class Reader:
  """A prompt that is being read: the target's state, and hidden states and captured features."""

  state: DecoderState
  outputs: tuple[Float[Array, "1 T D"], ...]


@struct.dataclass
class Report:
  """What ``advance`` did: row b emitted ``tokens[b, :count[b]]`` in ``passes[b]`` passes."""

  tokens: Int[Array, "R W"]
  count: Int[Array, "R"]
  passes: Int[Array, "R"]
  done: Bool[Array, "R"]


def empty_slots(
  model: Decoder, draft: Any, slots: int, capacity: int, passes: int, stops: int
) -> Slots:
  """No request anywhere; ``draft`` is the drafter's state of that many rows."""
  row = lambda dtype: jnp.zeros(slots, dtype)  # noqa: E731
  carry = loop.Carry(
    state=model.init_state(slots, capacity),
    draft=draft,
    history=jnp.zeros((slots, capacity), jnp.int32),
    root=row(jnp.int32),
    length=row(jnp.int32),
    done=jnp.ones(slots, bool),
    steps=jnp.int32(0),
    counts=jnp.zeros((slots, passes), jnp.int32),
  )
  request = loop.Request(
    keys=jnp.stack([jax.random.key(0)] * slots),
    limit=row(jnp.int32),
    stop=jnp.full((slots, stops), -1, jnp.int32),
  )
  sampler = RowSampler(row(bool), *(row(jnp.float32) for _ in range(4)))
  return Slots(carry, request, sampler)


def _outputs(model: Decoder, drafter: Drafter | None, batch: int, capacity: int):
  """Room for what the target says of prompts; of every position only for drafters that read it."""
  width = capacity if drafter is not None and drafter.needs_prompt_hidden else 1
  captured = 0 if drafter is None else len(drafter.capture)
  shape = (batch, width, model.config.dim)
  return tuple(jnp.zeros(shape, model.dtype) for _ in range(1 + captured))


def empty_reader(model: Decoder, drafter: Drafter | None, capacity: int) -> Reader:
  """Room for one prompt."""
  return Reader(model.init_state(1, capacity), _outputs(model, drafter, 1, capacity))


def can_share(model: Decoder) -> bool:
  """Whether the state of a text holds those of its beginnings (a sum over the past doesn't)."""
  return all(isinstance(s, KVState) for s in jax.eval_shape(lambda: model.init_state(1, 8)).layers)


def _read(
  params, reader: Reader, tokens, start, count, *, model: Decoder, capture, keep: bool
) -> Reader:
  """Reads ``tokens [1, C]``, of which ``count`` count, at position ``start``."""
  index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
  out = model.apply(
    {"params": params}, tokens, reader.state, jnp.where(index < count, start + index, -1)[None],
    method="extend", capture=capture, logits=False,
  )  # fmt: skip

  def record(buffer, x):
    x = x.astype(buffer.dtype)
    if keep:
      return jax.lax.dynamic_update_slice_in_dim(buffer, x, start, axis=1)
    return jax.lax.dynamic_slice_in_dim(x, count - 1, 1, axis=1)

  return Reader(out.state, tuple(map(record, reader.outputs, (out.hidden, *out.features))))


def _reset(reader: Reader) -> Reader:
  """An empty state; caches need only forget their length."""

  def empty(state):
    if isinstance(state, KVState):
      return state.replace(length=jnp.zeros_like(state.length))
    return jax.tree.map(jnp.zeros_like, state)

  return reader.replace(state=DecoderState(tuple(map(empty, reader.state.layers))))


def _resume(reader: Reader, slots: Slots, slot, length) -> Reader:
  """The state of the first ``length`` tokens of a slot's text."""

  def row(state):
    state = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), state)
    return state.replace(length=jnp.broadcast_to(length, state.length.shape).astype(jnp.int32))

  return reader.replace(state=DecoderState(tuple(map(row, slots.carry.state.layers))))


def _started(params, draft_params, *, model: Decoder, drafter: Drafter, batch: int, capacity: int):
  """The drafter's state after a prompt of one token: its shapes are those after any prompt."""
  hidden, *features = _outputs(model, drafter, batch, capacity)
  width = hidden.shape[1] if drafter.needs_prompt_hidden else capacity
  zeros = jnp.zeros(batch, jnp.int32)
  return drafter.start(
    draft_params,
    drafter.init_state(batch, capacity),
    Prompt(jnp.zeros((batch, width), jnp.int32), zeros + 1, zeros),
    TargetOutput(hidden, tuple(features)),
    Target(model, params, model.init_state(batch, capacity)),
  )


def draft_rows(
  params, draft_params, model: Decoder, drafter: Drafter | None, slots: int, capacity: int
) -> tuple[Any, tuple[int, ...]]:
  """A drafter's state for ``slots`` rows, and the axis of rows of each of its arrays.

  The axis is -1 for what rows share, such as a table of what followed each token: the engine keeps
  one for all its requests, which all learn from each other's texts.
  """
  if drafter is None:
    return (), ()
  static = dict(model=model, drafter=drafter, capacity=capacity)
  one, two = (
    jax.eval_shape(lambda *p, n=n: _started(*p, **static, batch=n), params, draft_params)
    for n in (1, 2)
  )
  axes = tuple(
    next((i for i in range(a.ndim) if a.shape[i] != b.shape[i]), -1)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two))
  )
  leaves, tree = jax.tree.flatten(started(params, draft_params, **static, batch=1))
  rows = [x if axis < 0 else jnp.repeat(x, slots, axis) for x, axis in zip(leaves, axes)]
  return tree.unflatten(rows), axes


def _seat(
  slots: Slots,
  params,
  draft_params,
  reader: Reader,
  history,
  lengths,
  request: loop.Request,
  sampler: RowSampler,
  slot,
  *,
  model: Decoder,
  drafter: Drafter | None,
  axes: tuple[int, ...],
) -> tuple[Slots, Int[Array, "1"], Bool[Array, "1"]]:
  """Everything of one request (a batch of one) into row ``slot``; also its first token, and whether
  that was its last. ``axes``: see ``draft_rows``."""
  c = slots.carry
  hidden, *features = reader.outputs
  warm = bool(axes) and max(axes) < 0  # rows share all of it: go on from what was learned
  one = loop.begin.function(
    params,
    draft_params,
    reader.state,
    TargetOutput(hidden, tuple(features)),
    c.draft if warm else None,
    history,
    lengths,
    request,
    model=model,
    drafter=drafter,
    sampler=sampler,
    warm=warm,
  )

  def put(all_rows, row, axis=0):
    row = row.astype(all_rows.dtype)
    return jax.lax.dynamic_update_slice_in_dim(all_rows, row, slot, axis)

  def put_all(all_rows, row):
    return jax.tree.map(put, all_rows, row)

  old, tree = jax.tree.flatten(c.draft)
  rows = [
    (mine if warm else shared) if axis < 0 else put(shared, mine, axis)
    for shared, mine, axis in zip(old, jax.tree.leaves(one.draft), axes, strict=True)
  ]
  carry = c.replace(
    state=put_all(c.state, one.state),
    draft=tree.unflatten(rows),
    history=put(c.history, one.history),
    root=put(c.root, one.root),
    length=put(c.length, one.length),
    done=put(c.done, one.done),
  )
  # Keys are an extended type, for which there is no update of a slice.
  keys = jnp.where(jnp.arange(c.done.shape[0]) == slot, request.keys, slots.request.keys)
  request = loop.Request(
    keys, put(slots.request.limit, request.limit), put(slots.request.stop, request.stop)
  )
  return Slots(carry, request, put_all(slots.sampler, sampler)), one.root, one.done


def _advance(
  slots: Slots,
  params,
  draft_params,
  wanted,
  stopped,
  eager,
  *,
  model: Decoder,
  drafter: Drafter | None,
) -> tuple[Slots, Report]:
  """Up to ``wanted`` passes; where ``eager`` until a row is done. ``stopped`` rows are done."""
  c = slots.carry
  c = c.replace(done=c.done | stopped, counts=jnp.zeros_like(c.counts))
  length, done, until = c.length, c.done, c.steps + wanted

  def go_on(c):
    return (c.steps < until) & ~jnp.all(c.done) & ~(eager & jnp.any(c.done & ~done))

  c = loop.passes(
    c, params, draft_params, slots.request, go_on, model, drafter, slots.sampler, Match()
  )
  width = c.counts.shape[1] * (1 if drafter is None else drafter.max_depth + 1)
  at = jnp.minimum(length[:, None] + 1 + jnp.arange(width), c.history.shape[1] - 1)
  report = Report(
    tokens=jnp.take_along_axis(c.history, at, axis=1),
    count=c.length - length,
    passes=jnp.sum(c.counts > 0, axis=1, dtype=jnp.int32),
    done=c.done,
  )
  return slots.replace(carry=c), report


started = Executable("engine_started", _started)
read = Executable("engine_read", _read, donate=(1,))
reset = Executable("engine_reset", _reset, donate=(0,))
resume = Executable("engine_resume", _resume, donate=(0,))
seat = Executable("engine_seat", _seat, donate=(0,))
advance = Executable("engine_advance", _advance, donate=(0,))
