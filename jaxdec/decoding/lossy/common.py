# SPDX-License-Identifier: Apache-2.0
"""What the decoders of this room share: a request read into a state, and rows that branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdec.decoding import loop
from jaxdec.decoding.cache import capacity_for
from jaxdec.decoding.generate import arrays
from jaxdec.decoding.request import TextCodec, check, check_prefill, parse_prompts, parse_stops
from jaxdec.decoding.sampling import Sampler
from jaxdec.errors import UserError
from jaxdec.models.decoder import Decoder, DecoderState
from jaxdec.models.prefill import choose_chunk, padded

# Purposes of noise, apart from those of ``jaxdec.decoding.sampling`` (which lie above these).
TRIAL, PARTICLE, ROUND, HOST = (2**32 - 1 - i for i in range(64, 68))


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
  check_prefill(model, prefill_chunk)
  longest = max(map(len, prompts))
  chunk = choose_chunk(longest, prefill_chunk)
  capacity = capacity_for(padded(longest, chunk), longest, max_new_tokens, 1, 0)
  history, lengths, request = arrays(prompts, stops, max_new_tokens, seed, capacity)
  state, output = loop.prefill(
    params, history, lengths, None, model=model, chunk=chunk, capture=(), keep=None
  )
  return Reading(prompts, state, output.hidden[:, 0], history, lengths, request.keys, request.stop)


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
