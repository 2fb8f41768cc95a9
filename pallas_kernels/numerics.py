# SPDX-License-Identifier: Apache-2.0
"""What implementations of the recurrences outside of this package need of its arithmetic."""

from pallas_kernels._numerics import MASKED, RESET, accumulator, coarse_fine, log_decays
from pallas_kernels.linear_attention._sequences import prefix, repeat_heads, suffix, sum_heads

__all__ = [
  "MASKED",
  "RESET",
  "accumulator",
  "coarse_fine",
  "log_decays",
  "prefix",
  "repeat_heads",
  "suffix",
  "sum_heads",
]
