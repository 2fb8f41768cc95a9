# SPDX-License-Identifier: Apache-2.0
"""Shared prefixes: what prompts have in common is read once, held once, and met once a pass.

A query attends to [shared prefix | its row's own keys] as two attentions merged by log-sum-exp. In
the prefix's, the queries of all rows meet its keys in one matrix product, so its keys and values
are read once a pass, not once a row. Prefixes may branch, to any depth: level l has G_l of them,
each shared by B / G_l consecutive rows, and each reads what comes before it like any prompt. The
state of a recurrent layer after a prefix is one matrix, copied to the rows that go on from it.

Source: Hydragen (arXiv 2402.05099), sections 3.1 (decomposition) and 3.3 (hierarchies).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.decoding.cache import bucket
from jaxdec.decoding.executables import Executable
from jaxdec.decoding.request import TextCodec, parse_prompts
from jaxdec.drafting.base import TargetOutput
from jaxdec.errors import UserError
from jaxdec.mixers.attention import KVState, SharedKV
from jaxdec.models.config import DecoderConfig
from jaxdec.models.decoder import Decoder, DecoderState
from jaxdec.models.prefill import choose_chunk, padded, read_prompt

SHORTEST = 128  # a common beginning shorter than this is not worth a second attention


@dataclasses.dataclass(frozen=True)
class Sharing:
  """Token ids of the shared prefixes: ``levels[l][g]``, coarse to fine."""

  levels: tuple[tuple[tuple[int, ...], ...], ...]

  def of(self, row: int, batch: int) -> list[int]:
    """All that comes before the row's own tokens."""
    return [t for level in self.levels for t in level[row * len(level) // batch]]


def common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
  """The longest beginning of all prompts that leaves each a token of its own."""
  shortest = min(map(len, prompts)) - 1
  rows = np.asarray([p[:shortest] for p in prompts])
  same = np.all(rows == rows[:1], axis=0)
  return list(prompts[0][: shortest if same.all() else int(np.argmin(same))])


def parse(
  shared_prefix: Any, prompts: Any, config: DecoderConfig, tokenizer: TextCodec | None
) -> tuple[list[list[int]], Sharing | None]:
  """Whole prompts, and what of them is shared.

  Args:
    shared_prefix: None; True: what the prompts have in common, where that is at least ``SHORTEST``
      tokens of two or more rows; a text or token ids that come before all prompts; or a list of
      levels, each a list of those.
    prompts: whole where ``shared_prefix`` is None or True, else what comes after it.
  """
  if shared_prefix is None:
    return parse_prompts(prompts, config, tokenizer), None
  if shared_prefix is True:
    rows = parse_prompts(prompts, config, tokenizer)
    common = common_beginning(rows)
    worth = len(rows) > 1 and len(common) >= SHORTEST
    return rows, Sharing(((tuple(common),),)) if worth else None
  if isinstance(shared_prefix, str) or _is_ids(shared_prefix):
    shared_prefix = [[shared_prefix]]
  try:
    levels = [list(level) for level in shared_prefix]
  except TypeError:
    raise UserError(
      "shared_prefix must be True, a text, token ids, or a list of levels, each a list of those, "
      f"got {shared_prefix!r}"
    ) from None
  # What follows a text is no beginning of one: its BOS, if the tokenizer gives one, goes.
  later = dataclasses.replace(config, bos_id=None)
  rows = [_bare(p, config) for p in zip(prompts, parse_prompts(prompts, later, tokenizer))]
  parsed, groups = [], 1
  for i, level in enumerate(levels):
    if not level or len(level) % groups or len(rows) % len(level):
      raise UserError(
        f"shared_prefix: level {i} has {len(level)} prefixes, which must be a multiple of the "
        f"{groups} before it and a divisor of the {len(rows)} prompts"
      )
    groups = len(level)
    try:
      ids = parse_prompts(level, later if i else config, tokenizer)
    except UserError as error:
      raise UserError(f"shared_prefix, level {i}: {error}") from None
    parsed.append(tuple(tuple(_bare(p, config) if i else p[1]) for p in zip(level, ids)))
  sharing = Sharing(tuple(parsed))
  return [[*sharing.of(i, len(rows)), *row] for i, row in enumerate(rows)], sharing


def _is_ids(value) -> bool:
  try:
    array = np.asarray(value)
  except ValueError:  # ragged
    return False
  return array.ndim == 1 and array.size > 0 and np.issubdtype(array.dtype, np.integer)


def _bare(pair, config: DecoderConfig) -> list[int]:
  given, ids = pair
  bos = isinstance(given, str) and config.bos_id is not None and ids[:1] == [config.bos_id]
  return ids[1:] if bos else ids


def branch(parent: DecoderState, fresh: DecoderState) -> DecoderState:
  """The state of rows that go on from ``parent``'s, G to B: row b from row ``b G / B``.

  Caches are not copied: the parent's become a level that the rows share.
  """

  def layer(old, new):
    times = new.length.shape[0] // old.length.shape[0]
    if isinstance(old, KVState):
      shared = (*old.shared, SharedKV(old.k, old.v, old.own))
      return new.replace(length=jnp.repeat(old.length, times), shared=shared)
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), old)

  return DecoderState(tuple(map(layer, parent.layers, fresh.layers)))


def _read(
  params,
  parent: DecoderState | None,
  tokens,
  lengths,
  *,
  model: Decoder,
  capacity: int,
  chunk: int,
  capture,
) -> tuple[DecoderState, TargetOutput]:
  state, start = model.init_state(tokens.shape[0], capacity), None
  if parent is not None:
    state = branch(parent, state)
    start = state.length
  state, hidden, features = read_prompt(
    model, params, state, tokens, lengths, chunk=chunk, capture=capture, start=start
  )
  return state, TargetOutput(hidden, features)


_EXECUTABLE = Executable("shared_prefix", _read)


def prefill(
  params: Any,
  prompts: Sequence[Sequence[int]],
  sharing: Sharing,
  *,
  model: Decoder,
  capacity: int,
  chunk: int | None = None,
  capture: Any = (),
) -> tuple[DecoderState, TargetOutput]:
  """Reads prefixes level by level, then what each prompt has of its own.

  Args:
    prompts: whole prompts.
    capacity: of each row's own cache: for its own tokens, padded to whole chunks.
    chunk: bound on the tokens read per pass. capture: as in ``read_prompt``.

  Returns:
    The state, and the target's outputs at the last position of each prompt.
  """
  state = None
  for texts in sharing.levels:
    state, _ = _read_padded(params, state, texts, None, chunk, model=model, capture=())
  own = [p[len(sharing.of(i, len(prompts))) :] for i, p in enumerate(prompts)]
  return _read_padded(params, state, own, capacity, chunk, model=model, capture=capture)


def _read_padded(params, parent, texts, capacity, limit, **static):
  longest = max(map(len, texts))
  chunk = choose_chunk(longest, limit)
  size = bucket(padded(longest, chunk))
  tokens = np.zeros((len(texts), size), np.int32)
  for i, text in enumerate(texts):
    tokens[i, : len(text)] = text
  lengths = np.asarray([len(t) for t in texts], np.int32)
  return _EXECUTABLE(
    params, parent, tokens, lengths, capacity=capacity or size, chunk=chunk, **static
  )
