# SPDX-License-Identifier: Apache-2.0
"""PEARL (arXiv 2408.11850) on two groups of devices: drafter and target work at the same time.

A round is two compiled functions, and neither reads what the other makes of it:

  drafter: takes in what the last round emitted, settles d, writes n_1 .. n_gamma
  target:  settles d from the last round's n, judges [root, d] and n_1 (``jaxdec.drafting.pearl``)

Between rounds n travels one way, ``int32[B, gamma]``, and the emitted tokens and their number the
other way. The host dispatches rounds without waiting for them and looks at the results now and
then; rounds after the last row has finished emit nothing.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int

from jaxdec.decoding import loop
from jaxdec.decoding.cache import capacity_for
from jaxdec.decoding.executables import Executable, compile_seconds
from jaxdec.decoding.generate import Clock, Generation, arrays
from jaxdec.decoding.request import TextCodec, check, check_prefill, parse_prompts, parse_stops
from jaxdec.decoding.sampling import Sampler
from jaxdec.decoding.stats import Stats, acceptance
from jaxdec.decoding.text import RowText
from jaxdec.decoding.verify import Match
from jaxdec.drafting.base import Accepted, Context, Drafter, Prompt
from jaxdec.drafting.pearl import Pearl, PearlState, Unjudged
from jaxdec.errors import UserError
from jaxdec.mixers.base import write_rows
from jaxdec.models.decoder import Decoder
from jaxdec.models.prefill import choose_chunk, padded


def generate_pearl(
  model: Decoder,
  params: Any,
  prompts,
  *,
  max_new_tokens: int,
  drafter: Pearl,
  drafter_params: Any,
  sampler: Sampler = Sampler(),  # noqa: B008
  stop: Any = ...,
  seed: int | list[int] = 0,
  tokenizer: TextCodec | None = None,
  prefill_chunk: int | None = None,
  interval: int = 8,
) -> Generation:
  """``generate(..., drafter=drafter)`` with the draft model on devices of its own; the same tokens.

  The parameters say where: those of target and drafter must lie on different devices, each on one
  or sharded over a mesh, as in ``jax.device_put(drafter_params, jax.devices()[1])``. Compare its
  speed with what the target alone makes of all those devices.

  Args:
    interval: rounds between looks at what has been emitted. Up to that many are run in vain at the
      end.
    max_new_tokens, sampler, stop, seed, tokenizer, prefill_chunk: see ``generate_stream``.

  Returns:
    Generation. ``stats`` count rounds of the target in which a row was live.

  Raises:
    UserError: the groups share a device, or a mistake in any argument.
  """
  if not isinstance(drafter, Pearl):
    raise UserError(
      f"generate_pearl needs a Pearl drafter, got {type(drafter).__name__}; write "
      "Pearl(model=...), or use generate for other drafters"
    )
  check_prefill(model, prefill_chunk)
  if interval < 1:
    raise UserError(f"interval must be at least 1, got {interval}")
  stops = parse_stops(stop, model.config, tokenizer)
  prompts = parse_prompts(prompts, model.config, tokenizer)
  rule = Match()
  check(prompts, max_new_tokens, model.config, seed, drafter, drafter_params, rule, sampler)
  here, there = _placement(params), _placement(drafter_params)
  if shared := here.device_set & there.device_set:
    raise UserError(
      f"target and drafter are both on {sorted(map(str, shared))}, where they can't run at the "
      "same time; move the drafter, jax.device_put(drafter_params, jax.devices()[1]), or use "
      "generate(drafter=...)"
    )
  compiling, clock, gamma = compile_seconds(), Clock(), drafter.num_drafts
  longest = max(map(len, prompts))
  chunk = choose_chunk(longest, prefill_chunk)
  # Rounds in vain are counted as well: the buffer of counts has room for them.
  capacity = capacity_for(
    padded(longest, chunk), longest, max_new_tokens + interval, gamma, gamma - 1
  )
  data = arrays(prompts, stops, max_new_tokens, seed, capacity)
  history, lengths, request = jax.device_put(data, here)
  own_history, own_lengths, keys = jax.device_put((data[0], data[1], data[2].keys), there)

  draft_state = _start(drafter_params, own_history, own_lengths, drafter=drafter)
  state, output = loop.prefill(
    params, history, lengths, None, model=model, chunk=chunk, capture=(), keep=None
  )
  relay = _Relay(gamma)
  carry = loop.begin(
    params, (), state, output, None, history, lengths, request,
    model=model, drafter=relay, sampler=sampler, warm=False,
  )  # fmt: skip
  root, length = jax.device_put((carry.root, carry.length), there)
  writer = _Writer(draft_state, own_history, root, length)
  batch = len(prompts)
  ahead = jax.device_put(np.zeros((batch, gamma), np.int32), here)
  zeros = np.zeros((batch, gamma), np.int32), np.zeros(batch, np.int32)
  emitted, count = jax.device_put(zeros, there)
  jax.block_until_ready((carry, writer))
  prefill_seconds = clock.lap()

  rows, seen = [RowText(tokenizer, stops.strings) for _ in prompts], [len(p) for p in prompts]
  while True:
    tokens, length, done = jax.device_get((carry.history, carry.length, carry.done))
    for i, row in enumerate(rows):
      row.extend(tokens[i, seen[i] : length[i] + 1].tolist())
      seen[i] = length[i] + 1
    if all(d or row.stopped for d, row in zip(done, rows)):
      break
    for _ in range(interval):
      writer, written = _write(
        writer, drafter_params, keys, emitted, count, drafter=drafter, sampler=sampler
      )
      carry, verdict = _judge(
        carry, params, request, ahead, model=model, relay=relay, sampler=sampler
      )
      ahead = jax.device_put(written, here)
      emitted, count = jax.device_put(verdict, there)
  decode_seconds = clock.lap()

  generated = [row.tokens for row in rows]
  counts, steps = jax.device_get((carry.counts, carry.steps))
  per_step, by_depth, row_steps = acceptance(
    counts[:, :steps], [len(t) for t in generated], gamma - 1
  )
  stats = Stats(
    tokens_per_step=per_step,
    accepted_by_depth=by_depth,
    target_passes=max(row_steps),
    row_steps=row_steps,
    new_tokens=sum(map(len, generated)),
    prefill_seconds=prefill_seconds,
    decode_seconds=decode_seconds,
    compile_seconds=compile_seconds() - compiling,
  )
  text = None if tokenizer is None else [row.text for row in rows]
  return Generation(generated, [len(t) for t in generated], text, stats)


def _placement(params: Any) -> Sharding:
  """Where small arrays go that meet these parameters: on all of their devices."""
  leaves = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
  if not leaves:
    raise UserError("generate_pearl needs parameters on devices; use jax.device_put on them")
  sharding = max((x.sharding for x in leaves), key=lambda s: len(s.device_set))
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec())
  return sharding


class _Relay(Drafter):
  """d as the target's loop sees it: drafts that were made elsewhere.

  State: d in a round, and where all of it passed between rounds.
  """

  name: ClassVar[str] = "pearl"

  def __init__(self, gamma: int):
    self.gamma = gamma

  def __eq__(self, other):
    return type(other) is _Relay and other.gamma == self.gamma

  def __hash__(self):
    return hash(self.gamma)

  @property
  def num_nodes(self) -> int:
    return self.gamma

  def init_state(self, batch, capacity):
    return jnp.zeros(batch, bool)

  def propose(self, params, state, context, rng):
    return state.tree(context.root), state

  def observe(self, params, state, tree, accepted, output, context):
    return state.passed(accepted)


@struct.dataclass
class _Writer:
  """The drafter's group: its state, and the text as it knows it."""

  state: PearlState
  history: Int[Array, "B S"]
  root: Int[Array, "B"]
  length: Int[Array, "B"]


def _start_(params, history, lengths, *, drafter: Pearl):
  # The root is not read before the first round.
  prompt = Prompt(history, lengths, jnp.zeros_like(lengths))
  return drafter.start(params, None, prompt, None, None)


def _write_(writer: _Writer, params, keys, emitted, count, *, drafter: Pearl, sampler: Sampler):
  """The drafter's half of a round, after what the round before emitted: ``writer, n``."""
  context = functools.partial(Context, target=None, sampler=sampler, keys=keys)
  last = jnp.take_along_axis(emitted, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
  root = jnp.where(count > 0, last, writer.root)
  accepted = Accepted(path=None, count=count, next_token=root, tokens=emitted)
  before = context(root=writer.root, length=writer.length, history=writer.history)
  state = drafter.observe(params, writer.state, None, accepted, None, before)
  block = jnp.concatenate([writer.root[:, None], emitted], axis=1)
  history, length = write_rows(writer.history, block, writer.length), writer.length + count
  state = drafter.write_on(params, state, context(root=root, length=length, history=history))
  return _Writer(state, history, root, length), state.ahead


def _judge_(
  carry: loop.Carry, params, request, ahead, *, model: Decoder, relay: _Relay, sampler: Sampler
):
  """The target's half of a round, after what the round before drafted: ``carry, verdict``."""
  unjudged = Unjudged.after(carry.draft, carry.root, ahead)
  new = loop.draft_step(
    carry.replace(draft=unjudged), params, (), request, model, relay, sampler, Match()
  )
  at = carry.length[:, None] + 1 + jnp.arange(relay.gamma)
  return new, (jnp.take_along_axis(new.history, at, axis=1), new.length - carry.length)


_start = Executable("pearl_start", _start_)
_write = Executable("pearl_write", _write_, donate=(0,))
_judge = Executable("pearl_judge", _judge_, donate=(0,))
