# SPDX-License-Identifier: Apache-2.0
"""Kernels for decoding fast and reading long, on jax alone.

Every op is a function with ``implementation="auto" | "reference" | "xla" | "mosaic_tpu" |
"mosaic_gpu"`` (or a sequence of names), arrays ``[B,T,N,H]`` and its own gradients.
"""

from pallas_kernels._dispatch import Unsupported, target

__all__ = ["Unsupported", "target"]
