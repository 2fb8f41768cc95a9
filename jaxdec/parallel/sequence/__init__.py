# SPDX-License-Identifier: Apache-2.0
"""One sequence on many devices: layers as functions usable inside ``jax.shard_map``."""

from __future__ import annotations

from jaxdec.parallel.sequence.config import SequenceConfig

__all__ = ["SequenceConfig"]
