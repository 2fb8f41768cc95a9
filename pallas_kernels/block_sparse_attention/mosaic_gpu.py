# SPDX-License-Identifier: Apache-2.0
"""The slot of the Hopper kernel."""

from __future__ import annotations

from typing import Any, NoReturn

from pallas_kernels._dispatch import Unsupported


def block_sparse_attention(*args: Any, **kwargs: Any) -> NoReturn:
  raise Unsupported(
    "block_sparse_attention: the Mosaic GPU (Hopper) kernel is not implemented yet; use "
    "implementation='xla'."
  )


block_sparse_attention_gradients = block_sparse_attention
