# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of parameters (Polyak averaging), which is evaluated instead.

``a_t = d_t a_{t-1} + (1 - d_t) p_t`` with ``d_t = min(d, (1 + t) / (10 + t))``: the average follows
closely while training is young, so that it forgets the initial parameters. Kept in float32 at
least, laid out like the parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def begin(params: Any) -> Any:
  """The average before the first step: the parameters themselves."""
  return jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)


def follow(average: Any, params: Any, decay: float, step: jax.Array) -> Any:
  """The average after the step counted ``step`` (from 0) gave ``params``."""
  t = step.astype(jnp.float32)
  rate = 1.0 - jnp.minimum(decay, (1.0 + t) / (10.0 + t))
  return jax.tree.map(lambda a, p: a + (rate * (p - a)).astype(a.dtype), average, params)
