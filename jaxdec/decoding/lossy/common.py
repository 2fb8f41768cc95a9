# SPDX-License-Identifier: Apache-2.0
"""What the decoders of this room share: a request read into a state, and rows that branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdec.decoding import loop
from jaxdec.decoding.cache import capacity_for
from jaxdec.decoding.request import TextCodec, check, parse_prompts, parse_stops
from jaxdec.decoding.sampling import Sampler, request_keys
from jaxdec.errors import UserError
from jaxdec.models.decoder import Decoder, DecoderState
from jaxdec.models.prefill import choose_chunk, padded

# Purposes of noise, apart from those of ``jaxdec.decoding.sampling`` (which lie above these).
TRIAL, PARTICLE, ROUND, HOST = (2**32 - 1 - i for i in range(64, 68))

STOP_SLOTS = 8  # stop ids are padded to a multiple of this, so that adding one compiles nothing


@dataclasses.dataclass(frozen=True)
class Reading:
  """Prompts read by a model.

  Attributes:
    prompts: their token ids.
    state: holds every token of the prompts.
    hidden: what the LM head reads at each prompt's last token.
    history: the prompts, right-padded to the state's capacity.
    lengths: their lengths. keys: request keys. stop: stop ids, padded with -1.
  """

  prompts: list[list[int]]
  state: DecoderState
  hidden: Float[Array, "B D"]
  history: Int[Array, "B S"]
  lengths: Int[Array, "B"]
  keys: Key[Array, "B"]
  stop: Int[Array, "J"]


def read(
  model: Decoder,
  params: Any,
  prompts,
  *,
  max_new_tokens: int,
  sampler: Sampler = Sampler(),  # noqa: B008
  stop: Any = ...,
  seed: int | list[int] = 0,
  tokenizer: TextCodec | None = None,
  prefill_chunk: int | None = None,
) -> Reading:
  """Checks a request and reads its prompts; the arguments are those of ``generate``.

  Raises:
    UserError: a mistake in any argument, before anything is compiled.
  """
  config = model.config
  prompts = parse_prompts(prompts, config, tokenizer)
  stops = parse_stops(stop, config, tokenizer)
  if stops.strings:
    raise UserError(
      f"stop takes token ids here, got the string {stops.strings[0]!r}; only generate() stops at "
      "strings, cut the text afterwards"
    )
  check(prompts, max_new_tokens, config, seed, None, None, None, sampler)
  if model.layout != "unrolled":
    raise UserError("decoding needs the unrolled layout; convert with jaxdec.models.unstack_layers")
  if prefill_chunk is not None and prefill_chunk < 1:
    raise UserError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
  batch, longest = len(prompts), max(map(len, prompts))
  chunk = choose_chunk(longest, prefill_chunk)
  capacity = capacity_for(padded(longest, chunk), longest, max_new_tokens, 1, 0)
  history = np.zeros((batch, capacity), np.int32)
  for i, prompt in enumerate(prompts):
    history[i, : len(prompt)] = prompt
  history = jnp.asarray(history)
  lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
  state, output = loop.prefill(
    params, history, lengths, None, model=model, chunk=chunk, capture=(), keep=None
  )
  slots = max(STOP_SLOTS, -(-len(stops.ids) // STOP_SLOTS) * STOP_SLOTS)
  seed = int(seed) if isinstance(seed, (int, np.integer)) else [int(s) for s in seed]
  return Reading(
    prompts=prompts,
    state=state,
    hidden=output.hidden[:, 0],
    history=history,
    lengths=lengths,
    keys=request_keys(seed, batch),
    stop=jnp.asarray([*stops.ids, *[-1] * (slots - len(stops.ids))], jnp.int32),
  )


def unembed(model: Decoder, params, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
  """Logits of the token after each prompt."""
  return model.apply({"params": params}, hidden, method="unembed")


def extend(
  model: Decoder, params, state: DecoderState, tokens: Int[Array, "R"], position: Int[Array, "R"]
) -> tuple[DecoderState, Float[Array, "R V"]]:
  """Reads one token per row (position -1: none): state, logits of the next."""
  out = model.apply({"params": params}, tokens[:, None], state, position[:, None], method="extend")
  return out.state, out.logits[:, 0]


def is_stop(tokens: Int[Array, "..."], stop: Int[Array, "J"]) -> Bool[Array, "..."]:
  """Which tokens are stop ids."""
  return jnp.any(tokens[..., None] == stop, axis=-1)


def repeat_rows(tree: Any, times: int) -> Any:
  """Every leaf ``[B, ...] -> [B * times, ...]``; the copies of a row are neighbours."""
  return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def take_rows(tree: Any, index: Int[Array, "R"]) -> Any:
  """Rows ``index`` of every leaf: reordered, dropped or repeated."""
  return jax.tree.map(lambda x: jnp.take(x, index, axis=0), tree)


def branch_keys(keys: Key[Array, "B"], branches: int) -> Key[Array, "B n"]:
  """``fold_in(key, j)``: independent noise for n branches of each row."""
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  return fold(keys, jnp.arange(branches))


def decode_all(tokenizer: TextCodec | None, tokens: list) -> list | None:
  """Texts of (nested) lists of token lists; None without a tokenizer."""
  if tokenizer is None:
    return None
  return [
    decode_all(tokenizer, row) if row and isinstance(row[0], list) else tokenizer.decode(row)
    for row in tokens
  ]
