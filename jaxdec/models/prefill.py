# SPDX-License-Identifier: Apache-2.0
"""Reading whole prompts in chunks: one compiled chunk body, a data-dependent number of chunks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdec.models.config import Capture
from jaxdec.models.decoder import Decoder, DecoderState, Embeddings

CHUNKS = (16, 64, 128, 256)  # each ladder step is one compilation; a prompt is padded to its chunk


@struct.dataclass
class Prefix:
  """Embeddings (of an image, say) in place of a span of each prompt's tokens, at its positions.

  Attributes:
    values: right-padded. start: position of the first. count: how many; 0: a text-only row.
  """

  values: Float[Array, "B N D"]
  start: Int[Array, "B"]
  count: Int[Array, "B"]

  def embeddings(self, positions: Int[Array, "#B T"]) -> Embeddings:
    """What ``Decoder`` takes for tokens at ``positions``."""
    index = positions - self.start[:, None]
    inside = (index >= 0) & (index < self.count[:, None])
    index = jnp.clip(index, 0, self.values.shape[1] - 1)
    return jnp.take_along_axis(self.values, index[..., None], axis=1), inside


def choose_chunk(longest: int, limit: int | None = None) -> int:
  """The smallest ladder chunk that holds the prompt, else the largest one up to ``limit``."""
  ladder = [c for c in CHUNKS if limit is None or c <= limit] or [limit]
  return next((c for c in ladder if c >= longest), ladder[-1])


def padded(longest: int, chunk: int) -> int:
  """Prompt length rounded up to whole chunks."""
  return -(-longest // chunk) * chunk


def read_prompt(
  model: Decoder,
  params: Any,
  state: DecoderState,
  tokens: Int[Array, "B P"],
  lengths: Int[Array, "B"],
  *,
  chunk: int,
  capture: Capture | tuple[int, ...] = (),
  keep: int | None = None,
  prefix: Prefix | None = None,
  start: Int[Array, "B"] | None = None,
) -> tuple[DecoderState, Float[Array, "B T D"], tuple[Float[Array, "B T D"], ...]]:
  """Feeds right-padded prompts to an empty state, ``chunk`` tokens at a time.

  With ``start`` the state holds that many tokens already, and the prompts come after them.

  The LM head is never run: the caller unembeds the one row it wants.

  Args:
    tokens: ``P`` is at least the longest prompt rounded up to whole chunks (unread beyond that).
    lengths: at least 1 each. The state's capacity must be at least the rounded length.
    capture: layer inputs to record.
    keep: None returns hidden and features at the last valid position of each row (T = 1); a number
      T, a multiple of ``chunk``, returns the first T positions (undefined beyond ``lengths``).
    prefix: read in place of the tokens it covers.

  Returns:
    state, hidden (post final norm), features.
  """
  batch = tokens.shape[0]
  rows = jnp.arange(batch)
  last = lengths - 1
  width = 1 if keep is None else keep
  shapes = (jax.ShapeDtypeStruct((batch, width, model.config.dim), model.dtype),) * (
    1 + len(capture)
  )
  buffers = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)

  def read(i, carry):
    state, buffers = carry
    at = i * chunk
    piece = jax.lax.dynamic_slice_in_dim(tokens, at, chunk, axis=1)
    position = at + jnp.arange(chunk, dtype=jnp.int32)
    embeddings = None if prefix is None else prefix.embeddings(position[None])
    valid = position < lengths[:, None]
    position = jnp.where(valid, position if start is None else position + start[:, None], -1)
    out = model.apply(
      {"params": params}, piece, state, position,
      method="extend", capture=capture, logits=False, embeddings=embeddings,
    )  # fmt: skip

    def record(buffer, x):
      x = x.astype(buffer.dtype)
      if keep is not None:
        return jax.lax.dynamic_update_slice_in_dim(buffer, x, at, axis=1)
      ends_here = (last // chunk == i)[:, None]
      return jnp.where(ends_here, x[rows, last % chunk], buffer[:, 0])[:, None]

    return out.state, tuple(map(record, buffers, (out.hidden, *out.features)))

  chunks = (jnp.max(lengths) + chunk - 1) // chunk
  state, buffers = jax.lax.fori_loop(0, chunks, read, (state, buffers))
  return state, buffers[0], buffers[1:]
