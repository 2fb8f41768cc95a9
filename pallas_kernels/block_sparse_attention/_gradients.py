# SPDX-License-Identifier: Apache-2.0
"""The gradient rule around a forward and a backward pass, the same for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def with_gradients(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
  """``f(q, k, v, lists) -> (out, lse, block_max)`` with gradients for q, k and v.

  With P the attention map, ``D_i = sum_h dout_ih out_ih - dlse_i`` and ``dP = dout v^T``, the
  gradient of the logits is ``dS = P (dP - D)`` (FlashAttention-2, arXiv 2307.08691, Algorithm 2;
  the cotangent of the log-sum-exp only shifts D). ``block_max`` has no gradient.

  Args:
    forward: ``(q, k, v, lists) -> (out [B,T,N,Hv], lse [B,N,T], block_max or None)``.
    backward: ``(q, k, v, lists, lse, dout, D [B,N,T]) -> (dq, dk, dv)``, of any float dtype. Rows
      with ``lse = -inf`` saw nothing and have D = 0.
    lists: a pytree of arrays of integers or booleans.
  """

  @jax.custom_vjp
  def f(q, k, v, lists):
    return forward(q, k, v, lists)

  def keep(q, k, v, lists):
    out, lse, block_max = forward(q, k, v, lists)
    return (out, lse, block_max), (q, k, v, lists, out, lse)

  def pull(kept, cotangents):
    q, k, v, lists, out, lse = kept
    dout, dlse, _ = cotangents
    product = dout.astype(lse.dtype) * out.astype(lse.dtype)
    delta = jnp.sum(product, axis=-1).swapaxes(1, 2) - dlse
    delta = jnp.where(lse > -jnp.inf, delta, 0.0)
    gradients = backward(q, k, v, lists, lse, dout, delta)
    return (*(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v))), None)

  f.defvjp(keep, pull)
  return f
