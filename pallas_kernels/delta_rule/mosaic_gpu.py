# SPDX-License-Identifier: Apache-2.0
"""Slot of the Hopper kernel."""

from __future__ import annotations

from pallas_kernels._dispatch import Unsupported


def delta_rule(*args, **kwargs):
  raise Unsupported(
    "delta_rule: the Mosaic GPU (Hopper) kernel is not implemented yet; use implementation='xla'."
  )
