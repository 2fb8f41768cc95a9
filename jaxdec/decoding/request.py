# SPDX-License-Identifier: Apache-2.0
"""From what a user passes to what the loop needs; every mistake is named before any compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from jaxdec.decoding.sampling import Sampler
from jaxdec.decoding.verify import Rule
from jaxdec.drafting.base import Drafter
from jaxdec.errors import UserError
from jaxdec.models.config import DecoderConfig
from jaxdec.models.prefill import Prefix


class TextCodec(Protocol):
  """What decoding asks of a tokenizer."""

  def encode(self, text: str) -> Sequence[int]: ...

  def decode(self, tokens: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Stops:
  """Where to stop: token ids (checked on the device) and strings (checked on the text)."""

  ids: tuple[int, ...] = ()
  strings: tuple[str, ...] = ()


def parse_stops(stop, config: DecoderConfig, tokenizer: TextCodec | None) -> Stops:
  """``...`` (Ellipsis): the model's EOS ids. None: never. An id, a string, or a sequence of both:
  those and the EOS ids."""
  if stop is None:
    return Stops()
  if stop is ...:
    return Stops(tuple(config.eos_ids))
  items = [stop] if isinstance(stop, (int, str, np.integer)) else list(stop)
  ids, strings = list(config.eos_ids), []
  for item in items:
    if isinstance(item, str):
      if not item:
        raise UserError("stop strings must not be empty; leave them out to stop at EOS only")
      strings.append(item)
    elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
      if not 0 <= item < config.vocab_size:
        raise UserError(f"stop id {item} is outside the vocabulary of {config.vocab_size} tokens")
      ids.append(int(item))
    else:
      raise UserError(f"stop takes token ids and strings, got {type(item).__name__}")
  if strings and tokenizer is None:
    raise UserError("stop strings need a tokenizer; pass tokenizer=... or stop at token ids")
  return Stops(tuple(dict.fromkeys(ids)), tuple(strings))


def parse_prompts(prompts, config: DecoderConfig, tokenizer: TextCodec | None) -> list[list[int]]:
  """Token ids of every prompt. Text gets ``config.bos_id`` in front unless it is there already."""
  if isinstance(prompts, str):
    raise UserError("prompts must be a list; wrap a single prompt: [prompt]")
  rows = [_encode(i, p, config, tokenizer) for i, p in enumerate(prompts)]
  if not rows:
    raise UserError("prompts is empty; pass at least one prompt")
  for i, row in enumerate(rows):
    if not row:
      raise UserError(f"prompt {i} is empty; pass at least one token (for example the BOS token)")
    bad = next((t for t in row if not 0 <= t < config.vocab_size), None)
    if bad is not None:
      raise UserError(
        f"prompt {i} holds token id {bad}, outside the vocabulary of "
        f"{config.vocab_size} tokens; was it encoded with another tokenizer?"
      )
  return rows


def _encode(i: int, prompt, config: DecoderConfig, tokenizer: TextCodec | None) -> list[int]:
  if isinstance(prompt, str):
    if tokenizer is None:
      raise UserError(
        f"prompt {i} is text, which needs a tokenizer; pass tokenizer=... or token ids"
      )
    ids = [int(t) for t in tokenizer.encode(prompt)]
    if config.bos_id is not None and ids[:1] != [config.bos_id]:
      ids = [config.bos_id, *ids]
    return ids
  try:
    array = np.asarray(prompt)
  except Exception as error:
    raise UserError(f"prompt {i} must be text or a list of token ids: {error}") from error
  if array.size and (array.ndim != 1 or not np.issubdtype(array.dtype, np.integer)):
    raise UserError(
      f"prompt {i} must be text or a flat list of integer token ids, got "
      f"{array.dtype} of shape {array.shape}"
    )
  return [int(t) for t in array]


PREFIX_SLOTS = 16  # prefixes are padded to a multiple of this


def parse_prefix(prefix, prompts: list[list[int]], config: DecoderConfig) -> Prefix | None:
  """One ``(start, values [n, D])`` or None per prompt to a padded batch; None where all are."""
  if prefix is None:
    return None
  entries = list(prefix)
  if len(entries) != len(prompts):
    raise UserError(
      f"prefix has {len(entries)} entries for {len(prompts)} prompts; give one each, None for text"
    )
  rows = []
  for i, entry in enumerate(entries):
    try:
      start, values = (0, np.zeros((0, config.dim))) if entry is None else entry
      start, values = int(start), np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
      raise UserError(f"prefix {i} must be None or (start, values [n, D]): {error}") from None
    if values.ndim != 2 or values.shape[1] != config.dim:
      raise UserError(
        f"prefix {i} must hold embeddings [n, {config.dim}], got an array of shape {values.shape}"
      )
    if start < 0 or start + len(values) > len(prompts[i]):
      raise UserError(
        f"prefix {i} stands for the tokens {start}..{start + len(values) - 1} of its prompt, which "
        f"has {len(prompts[i])}; put a placeholder token there for each embedding"
      )
    rows.append((start, values))
  longest = max(len(values) for _, values in rows)
  if not longest:
    return None
  padded = np.zeros((len(rows), -(-longest // PREFIX_SLOTS) * PREFIX_SLOTS, config.dim), np.float32)
  for i, (_, values) in enumerate(rows):
    padded[i, : len(values)] = values
  starts, counts = np.asarray([[start, len(values)] for start, values in rows], np.int32).T
  return Prefix(jnp.asarray(padded), jnp.asarray(starts), jnp.asarray(counts))


def check(
  prompts: list[list[int]],
  max_new_tokens: Any,
  config: DecoderConfig,
  seed,
  drafter: Drafter | None,
  drafter_params,
  rule: Rule,
  sampler: Sampler,
) -> None:
  """The rest of the mistakes: sizes, seeds, and a drafter that doesn't fit."""
  if not isinstance(sampler, Sampler):
    raise UserError(
      f"sampler must be a Sampler, got {type(sampler).__name__}; write Sampler(temperature=...)"
    )
  if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)):
    raise UserError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
  if max_new_tokens < 1:
    raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
  longest = max(map(len, prompts))
  if longest + max_new_tokens > config.max_length:
    raise UserError(
      f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}: together "
      f"{longest + max_new_tokens}, over the model's limit of {config.max_length}; shorten one"
    )
  seeds = [seed] if isinstance(seed, (int, np.integer)) else list(seed)
  if not all(isinstance(s, (int, np.integer)) for s in seeds):
    raise UserError(f"seed must be an integer or a list of integers, got {seed!r}")
  if not isinstance(seed, (int, np.integer)) and len(seeds) != len(prompts):
    raise UserError(
      f"seed has {len(seeds)} entries for {len(prompts)} prompts; give one each, or one "
      "integer for all"
    )
  if drafter is not None:
    _check_drafter(drafter, drafter_params, config, rule, sampler)


def _check_drafter(drafter, params, config, rule, sampler) -> None:
  vocab = getattr(drafter, "vocab_size", None)
  if vocab is not None and vocab != config.vocab_size:
    raise UserError(
      f"drafter {drafter.name!r} has a vocabulary of {vocab} tokens, the target one of "
      f"{config.vocab_size}; both must come from the same tokenizer"
    )
  if drafter.trained and not params:
    raise UserError(
      f"drafter {drafter.name!r} has no parameters; pass drafter_params=... or the folder of "
      "a distilled run"
    )
  if not sampler.greedy:
    _check_rule(drafter, rule)


def check_prefill(model: Any, chunk: int | None = None) -> None:
  """Raises UserError for a model in a layout that doesn't decode, or chunks of no token."""
  if model.layout != "unrolled":
    raise UserError("decoding needs the unrolled layout; convert with jaxdec.models.unstack_layers")
  if chunk is not None and chunk < 1:
    raise UserError(f"prefill_chunk must be at least 1, got {chunk}")


def _check_rule(drafter, rule) -> None:
  sampled = getattr(drafter, "gives_draft_probs", False)
  if rule.needs_draft_probs and not sampled:
    hint = "draws='sampled', or " if hasattr(drafter, "draws") else ""
    raise UserError(
      f"rule {rule.name!r} needs drafts sampled from a known law, which drafter "
      f"{drafter.name!r} does not give; use {hint}rule='match', exact for every drafter"
    )
  if rule.chains_only and drafter.max_depth != drafter.num_nodes - 1:
    raise UserError(
      f"rule {rule.name!r} judges chains, and drafter {drafter.name!r} drafts trees; use "
      "rule='without_replacement', 'multi_round' or 'match', as its siblings are made"
    )
  if not rule.distinct_siblings and getattr(drafter, "distinct_siblings", False):
    raise UserError(
      f"rule {rule.name!r} judges siblings drawn independently, and drafter {drafter.name!r} draws "
      "them without replacement; use rule='without_replacement'"
    )
