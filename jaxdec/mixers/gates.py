# SPDX-License-Identifier: Apache-2.0
"""Initial values of the decay ``g = -exp(A_log) * softplus(a(x) + dt_bias)`` of recurrent mixers.

As in Mamba-2 (arXiv 2405.21060) and Gated DeltaNet (arXiv 2412.06464); checkpoints rely on both.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def init_a_log(key, shape, dtype):
  """``log A`` with A uniform in [1, 16]."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def init_dt_bias(key, shape, dtype):
  """Inverse softplus of a step drawn log-uniformly from [1e-3, 1e-1]."""
  step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
  return step + jnp.log(-jnp.expm1(-step))
