# SPDX-License-Identifier: Apache-2.0
"""How layers compute when a sequence is split over devices, as data. Loads no array library."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxdec.errors import UserError, nearest

Exchange = Literal["gather", "scan", "chain"]
Method = Literal["allgather", "ring", "ulysses", "usp", "ring_self_attention"]
Layout = Literal["contiguous", "zigzag"]

EXCHANGES = ("gather", "scan", "chain")
METHODS = ("allgather", "ring", "ulysses", "usp", "ring_self_attention")
LAYOUTS = ("contiguous", "zigzag")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
  """Raises ``UserError`` unless ``value`` is one of ``known``."""
  if value not in known:
    raise UserError(
      f"{name}={value!r}{nearest(str(value), known)} is not one of {', '.join(known)}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceConfig:
  """The sequence-parallel algorithm of each kind of layer.

  Attributes:
    linear: how recurrent layers exchange states: ``gather`` (LASP-2, arXiv 2502.07563: one
      all-gather), ``scan`` (log-step permutes), ``chain`` (LASP-1, arXiv 2404.02882, with
      ``slices=1``; pipelined slices as in ZeCO, arXiv 2507.01004, with more).
    attention: how softmax layers do: ``allgather`` of keys and values (LASP-2H), ``ring``
      (arXiv 2310.01889), ``ulysses`` (arXiv 2309.14509), ``usp`` (both, arXiv 2405.07719), or the
      baseline ``ring_self_attention`` (arXiv 2105.13120).
    layout: which tokens a shard holds: ``contiguous``, or ``zigzag`` (blocks r and 2W-1-r of 2W),
      which balances causal softmax layers.
    slices: into how many pieces ``chain`` cuts a state. ulysses_degree: ranks that trade heads
      under ``usp``; the rest of the axis is a ring.
    axis: the mesh axis.
  """

  linear: Exchange = "gather"
  attention: Method = "allgather"
  layout: Layout = "contiguous"
  slices: int = 1
  ulysses_degree: int = 2
  axis: str = "seq"

  def __post_init__(self):
    check_choice("linear", self.linear, EXCHANGES)
    check_choice("attention", self.attention, METHODS)
    check_choice("layout", self.layout, LAYOUTS)
    for name in ("slices", "ulysses_degree"):
      if getattr(self, name) < 1:
        raise UserError(f"SequenceConfig: {name} must be at least 1, got {getattr(self, name)}")
