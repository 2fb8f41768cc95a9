# SPDX-License-Identifier: Apache-2.0
"""Linear attention with scalar, channel or no decay, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _checks
from pallas_kernels._dispatch import Op
from pallas_kernels._numerics import accumulator, log_decays
from pallas_kernels.linear_attention._configs import TPUConfig, XLAConfig
from pallas_kernels.linear_attention._sequences import repeat_heads

__all__ = ["TPUConfig", "XLAConfig", "linear_attention"]

_OP = Op("linear_attention", __name__, {"xla": XLAConfig, "mosaic_tpu": TPUConfig})


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  log_decay: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  scale: float | None = None,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] = "auto",
  config: XLAConfig | TPUConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention without softmax, as a recurrence over a matrix state, in chunks.

  Per head, with the log-decay ``g_t <= 0`` a number or a vector over H::

    S_t = exp(g_t) * S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

  This is linear attention (2006.16236: no decay, feature maps applied by the caller), RetNet
  (2307.08621) and Lightning Attention (2401.04658: a fixed decay a head), GLA (2312.06635) and
  HGRN2 (2404.07904: channel decay).

  Mamba-2 / SSD (2405.21060) with its ``x [B,T,N,P]``, ``dt [B,T,N]``, ``A [N]``, ``B`` and
  ``C [B,T,groups,state]`` is ``q=C, k=B, v=dt[..., None] * x, log_decay=dt * A, scale=1.0``, and
  ``D[:, None] * x`` is added by the caller. The groups are heads of q and k: nothing is repeated.

  N is the largest of all head counts; each divides it, and head n of N uses head ``n // (N / K)``
  of an array that has K.

  Args:
    q, k: ``[B,T,heads,H]``. v: ``[B,T,heads,Hv]``.
    log_decay: ``[B,T,heads]`` or ``[B,T,heads,H]``, where B and T may be 1; None: no decay. At most
      0. Anything below -100 (-inf too) forgets everything and has no gradient.
    initial_state: ``[B,heads,H,Hv]``, before the first token, of whose segment it is; None: zeros.
    segment_ids: int ``[B,T]``. The state is forgotten where the id differs from the token before,
      so documents next to each other need different ids.
    scale: factor on q; None: ``H ** -0.5``.
    chunk_size: tokens that are handled as one matrix product, a power of two: a matter of speed and
      rounding only. None: chosen for the platform.
    implementation: see ``pallas_kernels``.
    config: block sizes of one implementation.

  Padding: tokens with ``k = v = 0`` and ``log_decay = 0`` in the segment of the last real token
  leave the state unchanged.

  Returns:
    ``out [B,T,N,Hv]`` in the dtype of q, and ``final_state [B,N,H,Hv]``, the state after the last
    token, in float32. Both may be differentiated by q, k, v, log_decay and initial_state.

  Raises:
    ValueError: shapes that don't fit, or a chunk size that isn't a power of two.
    NotImplementedError: a named implementation can't run this call.

  Source: Transformers are SSMs (2405.21060), section 6; Gated Linear Attention (2312.06635),
  section 4.

  >>> import jax.numpy as jnp
  >>> q = k = v = jnp.ones((1, 3, 2, 4))
  >>> out, state = linear_attention(q, k, v, log_decay=jnp.full((1, 1, 2), -jnp.inf), scale=1.0)
  >>> float(out[0, 2, 0, 0]), state.shape
  (4.0, (1, 2, 4, 4))
  """
  name = "linear_attention"
  decay_axes = jnp.ndim(log_decay) if log_decay is not None else 3
  if decay_axes not in (3, 4):
    raise ValueError(
      f"{name}: log_decay has shape {jnp.shape(log_decay)}, expected [B,T,heads] (scalar decay) or "
      "[B,T,heads,H] (channel decay)."
    )
  sizes = _checks.shapes(
    name,
    q=(q, "B T Q H"),
    k=(k, "B T K H"),
    v=(v, "B T V W"),
    log_decay=(log_decay, "#B #T D" if decay_axes == 3 else "#B #T D H"),
    initial_state=(initial_state, "B S H W"),
    segment_ids=(segment_ids, "B T"),
  )
  counts = {"Q": "q", "K": "k", "V": "v", "D": "log_decay", "S": "initial_state"}
  heads = _checks.divides(name, {counts[x]: n for x, n in sizes.items() if x in counts})
  if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
    raise ValueError(f"{name}: chunk_size is {chunk_size}, expected a power of two such as 64.")

  b, t, h, width = (sizes[x] for x in "BTHW")
  dtype = accumulator(jnp.zeros((), jnp.result_type(q, k, v)))
  if initial_state is None:
    state = jnp.zeros((b, heads, h, width), dtype)
  else:
    state = repeat_heads(initial_state.astype(dtype), heads)
  g = None
  if log_decay is not None:
    g = log_decays(log_decay, segment_ids, (b, t, *jnp.shape(log_decay)[2:]))
  elif segment_ids is not None:
    g = log_decays(None, segment_ids, (b, t, 1))
  kwargs: dict[str, Any] = {"scale": _checks.scale_of(scale, h), "chunk_size": chunk_size}
  if t == 0:  # still through the dispatch, which checks names and configs
    q, k, v = (jnp.zeros((b, 1, *x.shape[2:]), x.dtype) for x in (q, k, v))
    out, _ = _OP(q, k, v, None, state, implementation=implementation, config=config, **kwargs)
    return out[:, :0], state
  return _OP(q, k, v, g, state, implementation=implementation, config=config, **kwargs)
