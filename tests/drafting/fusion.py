# SPDX-License-Identifier: Apache-2.0
"""Does what the token adds to a drafter's input depend on the feature?"""

from __future__ import annotations

import jax
import numpy as np


def interaction(drafter, params) -> float:
  """Largest ``fuse(f, e) - fuse(f, e') - fuse(f', e) + fuse(f', e')``: 0 for any linear map."""
  f, e = jax.random.normal(jax.random.key(3), (2, 2, 1, 5, drafter.dim))

  @jax.jit
  def mixed(params):
    def fuse(i, j):
      return drafter.network.apply({"params": params}, f[i], e[j], method="fuse")

    return fuse(0, 0) - fuse(0, 1) - fuse(1, 0) + fuse(1, 1)

  return float(np.max(np.abs(mixed(params))))
