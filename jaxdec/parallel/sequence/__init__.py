# SPDX-License-Identifier: Apache-2.0
"""One sequence on many devices: layers as functions usable inside ``jax.shard_map``."""

from __future__ import annotations

from jaxdec.parallel.sequence.attention import attention, communicated_bytes
from jaxdec.parallel.sequence.config import SequenceConfig
from jaxdec.parallel.sequence.halo import halo, next_token, short_convolution, token_shift
from jaxdec.parallel.sequence.layout import from_zigzag, to_zigzag, token_index, zigzag_batch
from jaxdec.parallel.sequence.linear import linear_attention
from jaxdec.parallel.sequence.selective_scan import selective_scan
from jaxdec.parallel.sequence.summary import payload_elements

__all__ = [
  "SequenceConfig",
  "attention",
  "communicated_bytes",
  "from_zigzag",
  "halo",
  "linear_attention",
  "next_token",
  "payload_elements",
  "selective_scan",
  "short_convolution",
  "to_zigzag",
  "token_index",
  "token_shift",
  "zigzag_batch",
]
