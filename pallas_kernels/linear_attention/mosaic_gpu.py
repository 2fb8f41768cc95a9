# SPDX-License-Identifier: Apache-2.0
"""The slot of the Hopper kernel."""

from __future__ import annotations

from pallas_kernels._dispatch import Unsupported


def linear_attention(q, k, v, g, state, *, scale, chunk_size=None, config=None):
  raise Unsupported(
    "linear_attention: the Mosaic GPU (Hopper) kernel is not implemented yet; use "
    "implementation='xla'."
  )
