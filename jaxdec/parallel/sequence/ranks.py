# SPDX-License-Identifier: Apache-2.0
"""Which run of tokens lies on which rank, and how arrays travel between ranks in that order."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Plan:
  """An exchange. ``runs``: of a shard, 2 for zigzag; ``reverse``: from the last rank to the first.

  ``invariant``: final states are typed as equal on all ranks (``check_vma=True``), and so are their
  gradients; otherwise each rank holds its own share of those.
  """

  axis: str
  exchange: str
  runs: int = 1
  reverse: bool = False
  slices: int = 1
  invariant: bool = False

  @property
  def ranks(self) -> int:
    return lax.axis_size(self.axis)

  @property
  def blocks(self) -> int:
    return self.runs * self.ranks

  @property
  def position(self) -> jax.Array:
    """Of this rank among the ranks."""
    rank = lax.axis_index(self.axis)
    return self.ranks - 1 - rank if self.reverse else rank

  @property
  def own(self) -> jax.Array:
    """``[runs]``: of this rank's runs among all."""
    rank = lax.axis_index(self.axis)
    blocks = jnp.stack([rank, self.blocks - 1 - rank][: self.runs])
    return self.blocks - 1 - blocks if self.reverse else blocks

  @property
  def back(self) -> Plan:
    return dataclasses.replace(self, reverse=not self.reverse)

  def permute(self, x: jax.Array, distance: int, senders: range | None = None) -> jax.Array:
    """``x`` of the rank ``distance`` before; zeros where there is none that sends."""
    last = self.ranks - 1
    hops = [(i, i + distance) for i in senders or range(self.ranks - distance)]
    if self.reverse:
      hops = [(last - i, last - j) for i, j in hops]
    return lax.ppermute(x, self.axis, hops)

  def in_order(self, gathered: jax.Array) -> jax.Array:
    """``[W,runs,..]`` of all ranks as ``[blocks,..]`` in the order the exchange goes."""
    blocks = gathered[:, 0]
    if self.runs == 2:
      blocks = jnp.concatenate([blocks, jnp.flip(gathered[:, 1], 0)])
    return jnp.flip(blocks, 0) if self.reverse else blocks
