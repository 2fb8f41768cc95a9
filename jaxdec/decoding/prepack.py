# SPDX-License-Identifier: Apache-2.0
"""Prepacking: prompts of mixed lengths share rows of the prefill in place of padding.

  lengths 90, 30, 50, 8  ->  [90 . . .]  [50 30 8 .]      two rows of 96, where padding takes four

Positions restart at every prompt, a token sees its own prompt only, and what each prompt left in
the rows (keys and values, or a recurrent state) is gathered into a state of one row a prompt.
Projections and MLPs run on the rows; recurrences run prompt by prompt, since their states end where
a prompt does.

Source: "Prepacking: A Simple Method for Fast Prefilling and Increased Throughput in Large Language
Models" (arXiv 2404.09529). There the last token of a prompt is left to the first decoding step;
here prompts are read whole, so that those of one token are no exception. Bins are filled
first-fit-decreasing, which takes at most 11/9 of the fewest rows plus 6/9 (Dosa 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdec.decoding.cache import bucket
from jaxdec.decoding.executables import Executable
from jaxdec.drafting.base import TargetOutput
from jaxdec.mixers.base import Packing
from jaxdec.models.decoder import Decoder, DecoderState


def first_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
  """Items of ``lengths`` (each at most ``size``) into bins of ``size``: the indices in each bin.

  Longest first, ties by index, each into the first bin with room; indices in a bin are ascending.

  >>> first_fit_decreasing([90, 30, 50, 8], 96)
  [[0], [1, 2, 3]]
  """
  bins, room = [], []
  for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    at = next((j for j, free in enumerate(room) if free >= lengths[i]), len(bins))
    if at == len(bins):
      bins.append([])
      room.append(size)
    bins[at].append(i)
    room[at] -= lengths[i]
  return [sorted(items) for items in bins]


def pack(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, Packing]:
  """Tokens ``[R,T]`` of the packed prompts, and where each lies (NumPy arrays).

  T is the longest prompt and R the rows needed, both rounded up to sizes that are few, because
  every pair of them is a compilation.
  """
  lengths = [len(p) for p in prompts]
  width = bucket(max(lengths))
  bins = first_fit_decreasing(lengths, width)
  rows = len(bins) if len(bins) <= 8 else bucket(len(bins), 8)
  tokens, positions = np.zeros((2, rows, width), np.int32)
  segments = np.full((rows, width), -1, np.int32)
  row, offset = np.zeros((2, len(prompts)), np.int32)
  for r, items in enumerate(bins):
    at = 0
    for i in items:
      here = slice(at, at + lengths[i])
      tokens[r, here], positions[r, here], segments[r, here] = prompts[i], range(lengths[i]), i
      row[i], offset[i], at = r, at, here.stop
  return tokens, Packing(
    positions, segments, row, offset, np.asarray(lengths, np.int32), width=width
  )


def pays(prompts: Sequence[Sequence[int]], padded: int) -> bool:
  """Whether packing at least halves the slots that are computed, ``padded`` a prompt without it."""
  tokens, _ = pack(prompts)
  return 2 * tokens.size <= len(prompts) * padded


def _prefill(
  params, tokens, packing: Packing, *, model: Decoder, capacity: int, capture, keep: int | None
) -> tuple[DecoderState, TargetOutput]:
  """What ``loop.prefill`` gives; ``capacity`` is at least ``packing.width``."""
  state = model.init_state(packing.row.shape[0], capacity)
  out = model.apply(
    {"params": params}, tokens, state, packing, method="read_packed", capture=capture
  )

  def kept(x):
    if keep is None:  # the last position of each prompt
      return x[packing.row, packing.offset + packing.length - 1][:, None]
    x = packing.unpack(x)[:, :keep]
    return jnp.pad(x, ((0, 0), (0, keep - x.shape[1]), (0, 0)))

  hidden, *features = map(kept, (out.hidden, *out.features))
  return out.state, TargetOutput(hidden, tuple(features))


_EXECUTABLE = Executable("prepacked_prefill", _prefill)


def prefill(
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  model: Decoder,
  capacity: int,
  capture: Any = (),
  keep: int | None = None,
) -> tuple[DecoderState, TargetOutput]:
  """Reads prompts packed: the state of one row a prompt, and the target's outputs.

  Args:
    capacity: of the state; at least ``bucket`` of the longest prompt.
    capture, keep: as in ``jaxdec.models.prefill.read_prompt``.
  """
  tokens, packing = pack(prompts)
  return _EXECUTABLE(
    params, tokens, packing, model=model, capacity=capacity, capture=capture, keep=keep
  )
