# SPDX-License-Identifier: Apache-2.0
"""A sampler whose settings are data, one set a row: rows of a batch may ask for different laws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdec.decoding.sampling import (
  DRAFT,
  Sampler,
  gumbel,
  inverse,
  keep_top_k,
  keep_top_p,
  position_keys,
)
from jaxdec.drafting.selection import argmax


@struct.dataclass
class RowSampler:
  """``Sampler`` with arrays for settings; row b draws exactly what its own ``Sampler`` draws.

  New settings compile nothing. A filter runs only while some row wants it (a branch at run time).

  Attributes:
    argmax_rows: rows of temperature 0. scale: 1 / temperature (1 where that is 0).
    top_k, top_p: inf keeps every token. log_min_p: -inf keeps every token.
  """

  argmax_rows: Bool[Array, "B"]
  scale: Float[Array, "B"]
  top_k: Float[Array, "B"]
  top_p: Float[Array, "B"]
  log_min_p: Float[Array, "B"]

  greedy: ClassVar[bool] = False  # of the whole batch, at trace time: not known

  @classmethod
  def of(cls, samplers: Sequence[Sampler]) -> RowSampler:
    """One row a sampler, as NumPy arrays."""

    def rows(value, dtype=np.float32):
      return np.asarray([value(s) for s in samplers], dtype)

    inf = np.float32(np.inf)
    return cls(
      argmax_rows=rows(lambda s: s.greedy, np.bool_),
      scale=rows(lambda s: 1 if s.greedy else inverse(s.temperature)),
      top_k=rows(lambda s: inf if s.greedy or s.top_k is None else s.top_k),
      top_p=rows(lambda s: inf if s.greedy or s.top_p in (None, 1) else s.top_p),
      log_min_p=rows(lambda s: -inf if s.greedy or not s.min_p else np.log(np.float32(s.min_p))),
    )

  def process(self, logits: Float[Array, "B *T V"]) -> Float[Array, "B *T V"]:
    """``Sampler.process``; greedy rows keep their logits, so that drafters can rank by them."""
    wide = lambda x: x.reshape(x.shape + (1,) * (logits.ndim - 1))  # noqa: E731
    z = logits.astype(jnp.float32)
    z = (z - jnp.max(z, axis=-1, keepdims=True)) * wide(self.scale)
    for keep, mass in ((keep_top_k, self.top_k), (keep_top_p, self.top_p)):
      wanted = jnp.any(mass < jnp.inf)
      z = jax.lax.cond(wanted, keep, lambda z, mass: z, z, wide(mass))
    return jnp.where(z >= wide(self.log_min_p), z, -jnp.inf)

  def log_probs(self, logits: Float[Array, "B *T V"]) -> Float[Array, "B *T V"]:
    """``Sampler.log_probs``."""
    z = self.process(logits)
    best = jnp.arange(z.shape[-1]) == argmax(logits)[..., None]
    here = self.argmax_rows.reshape(-1, *(1,) * (z.ndim - 1))
    return jax.nn.log_softmax(jnp.where(here & ~best, -jnp.inf, z), axis=-1)

  def draw(
    self, logits: Float[Array, "B *T V"], keys: Key[Array, "B"], positions: Int[Array, "B *T"]
  ) -> Int[Array, "B *T"]:
    """``Sampler.draw``."""
    return self._draw(logits, keys, positions, None)

  def draw_independently(
    self, logits: Float[Array, "B *T V"], keys: Key[Array, "B"], positions: Int[Array, "B *T"]
  ) -> Int[Array, "B *T"]:
    """``Sampler.draw_independently``."""
    return self._draw(logits, keys, positions, DRAFT)

  def noise(
    self,
    keys: Key[Array, "B"],
    positions: Int[Array, "B *T"],
    size: int,
    purpose: int | None = None,
  ) -> Float[Array, "B *T V"]:
    """``Sampler.noise``; 0 in greedy rows."""
    noise = gumbel(position_keys(keys, positions, purpose), size)
    here = self.argmax_rows.reshape(-1, *(1,) * (noise.ndim - 1))
    return jnp.where(here, 0.0, noise)

  def _draw(self, logits, keys, positions, purpose):
    best = argmax(logits)
    here = self.argmax_rows.reshape(-1, *(1,) * (best.ndim - 1))

    def sampled(logits):
      noise = self.noise(keys, positions, logits.shape[-1], purpose)
      return jnp.where(here, best, argmax(self.process(logits) + noise))

    return jax.lax.cond(jnp.all(self.argmax_rows), lambda logits: best, sampled, logits)
