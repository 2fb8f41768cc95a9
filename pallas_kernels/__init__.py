# SPDX-License-Identifier: Apache-2.0
"""Kernels for decoding fast and reading long, on jax alone.

Every op is a function with ``implementation="auto" | "reference" | "xla" | "mosaic_tpu" |
"mosaic_gpu"`` (or a sequence of names), arrays ``[B,T,N,H]`` and its own gradients.
"""

from pallas_kernels._dispatch import Unsupported, current_target, target
from pallas_kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.tree_attention import tree_attention

__all__ = [
  "BlockPattern",
  "Unsupported",
  "block_sparse_attention",
  "current_target",
  "delta_rule",
  "linear_attention",
  "linear_cross_entropy",
  "selective_scan",
  "target",
  "tree_attention",
]
