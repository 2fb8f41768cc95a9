# SPDX-License-Identifier: Apache-2.0
"""The definition: float32 logits of every token and word, autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._numerics import accumulator


def logits(hidden: jax.Array, head: jax.Array, temperature: float, logit_cap: float | None):
  """``cap(hidden head^T) / temperature``  # [T,D], [V,D] -> [T,V]"""
  dtype = accumulator(hidden)
  z = jnp.dot(hidden.astype(dtype), head.T.astype(dtype), precision=jax.lax.Precision.HIGHEST)
  if logit_cap is not None:
    z = logit_cap * jnp.tanh(z / logit_cap)
  return z / temperature


def linear_cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array | None,
  teacher_hidden: jax.Array | None,
  teacher_head: jax.Array | None,
  *,
  top_k: int | None,
  temperature: float,
  logit_cap: float | None,
  vocab_block: int | None,
  config: None,
) -> jax.Array:
  """Per-token loss ``[T]``; ``[T,V]`` arrays throughout."""
  del vocab_block, config
  log_q = jax.nn.log_softmax(logits(hidden, head, temperature, logit_cap), axis=-1)
  if labels is not None:
    return -jnp.take_along_axis(log_q, labels[:, None], axis=-1)[:, 0]
  teacher = logits(teacher_hidden, teacher_head, temperature, logit_cap)
  log_p = jax.lax.stop_gradient(jax.nn.log_softmax(teacher, axis=-1))
  if top_k is not None:
    log_p, index = jax.lax.top_k(log_p, top_k)
    log_q = jnp.take_along_axis(log_q, index, axis=-1)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
