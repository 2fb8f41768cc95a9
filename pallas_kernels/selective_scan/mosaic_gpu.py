# SPDX-License-Identifier: Apache-2.0
"""The slot of the Hopper kernel."""

from __future__ import annotations

from pallas_kernels._dispatch import Unsupported


def selective_scan(*args, **kwargs):
  raise Unsupported(
    "selective_scan: the Mosaic GPU (Hopper) kernel is not implemented yet; "
    "use implementation='xla'."
  )
