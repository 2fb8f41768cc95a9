# SPDX-License-Identifier: Apache-2.0
"""What implementations of the recurrences outside of this package need of its arithmetic."""

from pallas_kernels._numerics import MASKED, RESET, accumulator, coarse_fine, log_decays

__all__ = ["MASKED", "RESET", "accumulator", "coarse_fine", "log_decays"]
