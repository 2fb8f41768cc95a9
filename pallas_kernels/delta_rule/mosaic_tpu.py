# SPDX-License-Identifier: Apache-2.0
"""TPU kernels of the delta rule."""

from __future__ import annotations

from pallas_kernels._dispatch import Unsupported, require_tpu


def delta_rule(q, k, v, beta, log_decay, state, *, scale, chunk_size=None, config=None):
  require_tpu("delta_rule")
  raise Unsupported("delta_rule: one token is a single pass over the state; use 'xla'.")
