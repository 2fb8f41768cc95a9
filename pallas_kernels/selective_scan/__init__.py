# SPDX-License-Identifier: Apache-2.0
"""The selective scan of Mamba: a diagonal recurrence whose step sizes depend on the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _checks
from pallas_kernels._dispatch import Op
from pallas_kernels._numerics import accumulator, segment_starts
from pallas_kernels.selective_scan._common import TPUConfig, XLAConfig

__all__ = ["TPUConfig", "XLAConfig", "selective_scan"]

_OP = Op(
  "selective_scan",
  "pallas_kernels.selective_scan",
  {"xla": XLAConfig, "mosaic_tpu": TPUConfig},
)


def selective_scan(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None = None,
  *,
  z: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] = "auto",
  config: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """The recurrence of Mamba-1, per channel d and state s:

  ``h_t[d,s] = exp(dt_t[d] A[d,s]) h_{t-1}[d,s] + dt_t[d] B_t[s] x_t[d]``,
  ``y_t[d] = sum_s C_t[s] h_t[d,s] + D[d] x_t[d]``, and ``out = y silu(z)`` if ``z`` is given.

  ``dt`` is positive already (softplus is the caller's). A token with ``dt = 0`` leaves the state as
  it was: that is how to pad. Arithmetic is float32 throughout. Gradients of all eight arrays; the
  backward pass keeps the states at chunk starts and recomputes the others.

  Mamba-2 (arXiv 2405.21060) has one decay per head and so is made of matrix products: that is
  ``linear_attention`` with ``q = C``, ``k = B``, ``v = dt x``, ``log_decay = dt A``, ``scale = 1``.

  Args:
    x, dt: ``[B,T,D]``. A: ``[D,S]``, negative. B, C: ``[B,T,S]``. D: ``[D]``. z: ``[B,T,D]``.
    initial_state: ``[B,D,S]``; None: zeros.
    segment_ids: int ``[B,T]``; the state is forgotten before a token whose id differs from the
      previous one's (never before the first).
    chunk_size: tokens between kept states; None: chosen by the implementation.
    implementation, config: see ``pallas_kernels``; ``XLAConfig`` or ``TPUConfig``.

  Returns:
    out ``[B,T,D]`` in ``x``'s dtype, final state ``[B,D,S]`` float32.

  Raises:
    ValueError: shapes or chunk_size don't fit.
    NotImplementedError: the named implementation can't run this call.

  Source: "Mamba" (arXiv 2312.00752, algorithm 2; B by Euler's rule as in its code).

  >>> import jax.numpy as jnp
  >>> x, dt = jnp.ones((1, 4, 2)), jnp.full((1, 4, 2), 0.5)
  >>> A, B = -jnp.ones((2, 3)), jnp.ones((1, 4, 3))
  >>> out, state = selective_scan(x, dt, A, B, B)
  >>> out.shape, state.shape, out[0, 0].tolist()  # 3 states, each dt * x after one token
  ((1, 4, 2), (1, 2, 3), [1.5, 1.5])
  """
  name = "selective_scan"
  sizes = _checks.shapes(
    name,
    x=(x, "B T D"),
    dt=(dt, "B T D"),
    A=(A, "D S"),
    B=(B, "B T S"),
    C=(C, "B T S"),
    D=(D, "D"),
    z=(z, "B T D"),
    initial_state=(initial_state, "B D S"),
    segment_ids=(segment_ids, "B T"),
  )
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"{name}: chunk_size is at least 1, got {chunk_size}; None to choose.")
  if sizes["T"] == 0:
    wide = accumulator(x)
    shape = tuple(sizes[letter] for letter in "BDS")
    state = jnp.zeros(shape, wide) if initial_state is None else initial_state.astype(wide)
    return jnp.zeros_like(x), state
  return _OP(
    x, dt, A, B, C, D, z, initial_state,
    None if segment_ids is None else segment_starts(segment_ids),
    chunk_size=chunk_size,
    implementation=implementation,
    config=config,
  )  # fmt: skip
