# SPDX-License-Identifier: Apache-2.0
"""The losses of the training tasks (defined beside the drafters, whose ``loss`` needs them too)."""

from __future__ import annotations

from jaxdec.drafting.losses import (
  cross_entropy,
  label_rank,
  masked_mean,
  overlap,
  soft_cross_entropy,
)

__all__ = ["cross_entropy", "label_rank", "masked_mean", "overlap", "soft_cross_entropy"]
