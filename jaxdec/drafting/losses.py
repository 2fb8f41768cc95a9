# SPDX-License-Identifier: Apache-2.0
"""Losses and metrics over a vocabulary, in float32.

The two cross-entropies carry their own gradients: one pass ``softmax - label`` over the logits, no
scatter and no copy of the softmax kept for the backward pass, which is what dominates the cost of
training draft heads on a small model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdec.drafting.selection import top_k


def _logsumexp(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
  return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


def _is_label(logits: Float[Array, "... V"], labels: Int[Array, "..."]):
  index = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
  return index == labels[..., None]


def _label_logit(logits: Float[Array, "... V"], labels: Int[Array, "..."]) -> Float[Array, "..."]:
  picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return picked.astype(jnp.float32)


@jax.custom_vjp
def cross_entropy(logits: Float[Array, "... V"], labels: Int[Array, "..."]) -> Float[Array, "..."]:
  """``-log softmax(logits)[label]``, elementwise (no reduction); labels must lie in ``0..V-1``."""
  return _logsumexp(logits) - _label_logit(logits, labels)


def _cross_entropy_fwd(logits, labels):
  lse = _logsumexp(logits)
  return lse - _label_logit(logits, labels), (logits, labels, lse)


def _cross_entropy_bwd(residuals, g):
  logits, labels, lse = residuals
  q = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
  return (g[..., None] * (q - _is_label(logits, labels))).astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


@jax.custom_vjp
def soft_cross_entropy(
  logits: Float[Array, "... V"], teacher_logits: Float[Array, "... V"]
) -> Float[Array, "..."]:
  """``-sum_v p_v log q_v`` with p the teacher's softmax; no gradient reaches the teacher."""
  return _soft_cross_entropy_fwd(logits, teacher_logits)[0]


def _soft_cross_entropy_fwd(logits, teacher_logits):
  lse, teacher_lse = _logsumexp(logits), _logsumexp(teacher_logits)
  p = jnp.exp(teacher_logits.astype(jnp.float32) - teacher_lse[..., None])
  loss = lse - jnp.sum(p * logits, axis=-1)
  return loss, (logits, teacher_logits, lse, teacher_lse)


def _soft_cross_entropy_bwd(residuals, g):
  logits, teacher_logits, lse, teacher_lse = residuals
  q = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
  p = jnp.exp(teacher_logits.astype(jnp.float32) - teacher_lse[..., None])
  return (g[..., None] * (q - p)).astype(logits.dtype), jnp.zeros_like(teacher_logits)


soft_cross_entropy.defvjp(_soft_cross_entropy_fwd, _soft_cross_entropy_bwd)


def kl_divergence(
  logits: Float[Array, "... V"], teacher_logits: Float[Array, "... V"]
) -> Float[Array, "..."]:
  """``sum_v p_v log(p_v / q_v)``: soft cross-entropy less the teacher's own entropy."""
  teacher = jax.lax.stop_gradient(teacher_logits)
  return soft_cross_entropy(logits, teacher) - soft_cross_entropy(teacher, teacher)


def top_k_cross_entropy(
  logits: Float[Array, "... V"], teacher_logits: Float[Array, "... V"], k: int
) -> Float[Array, "..."]:
  """``-sum p_v log q_v`` over the k likeliest tokens of p (HASS, arXiv 2408.15766)."""
  teacher = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
  best, index = top_k(teacher, k)
  p = jnp.exp(best - _logsumexp(teacher)[..., None])
  picked = jnp.take_along_axis(logits.astype(jnp.float32), index, axis=-1)
  return jnp.sum(p * (_logsumexp(logits)[..., None] - picked), axis=-1)


def list_mle(
  logits: Float[Array, "... V"], teacher_logits: Float[Array, "... V"], k: int
) -> Float[Array, "..."]:
  """Negative log-likelihood of the teacher's order of its k best tokens (Plackett-Luce over them):
  ``-sum_i (z_i - logsumexp_{j>=i} z_j)`` (ViSpec, arXiv 2509.15235)."""
  index = top_k(jax.lax.stop_gradient(teacher_logits), k)[1]
  z = jnp.take_along_axis(logits.astype(jnp.float32), index, axis=-1)
  rest = jax.lax.cumlogsumexp(z, axis=z.ndim - 1, reverse=True)
  return jnp.sum(rest - z, axis=-1)


def smooth_l1(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
  """SmoothL1 with beta 1, mean over the last axis; float32."""
  difference = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))
  return jnp.mean(jnp.where(difference < 1, 0.5 * difference**2, difference - 0.5), axis=-1)


def squared_error(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
  """``mean_D (x - y)^2`` in float32. For a consistency loss cut the anchor off before."""
  return jnp.mean(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), axis=-1)


def label_rank(logits: Float[Array, "... V"], labels: Int[Array, "..."]) -> Int[Array, "..."]:
  """How many tokens ``lax.top_k`` would put before the label (0: it is the argmax)."""
  value = jnp.take_along_axis(logits, labels[..., None], axis=-1)
  index = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
  before = (logits > value) | ((logits == value) & (index < labels[..., None]))
  return jnp.sum(before, axis=-1, dtype=jnp.int32)


def total_variation(
  logits: Float[Array, "... V"],
  teacher_logits: Float[Array, "... V"],
  teacher_lse: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
  """``1/2 sum_v |p_v - q_v|``, both laws over the whole vocabulary (``overlap``'s arguments)."""
  lse = _logsumexp(teacher_logits)
  whole = lse if teacher_lse is None else teacher_lse
  p = jnp.exp(teacher_logits.astype(jnp.float32) - whole[..., None])
  q = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  outside = 1 - jnp.exp(lse - whole)  # what p gives to tokens that can't be drafted
  return 0.5 * (jnp.sum(jnp.abs(p - q), axis=-1) + outside)


def overlap(
  logits: Float[Array, "... V"],
  teacher_logits: Float[Array, "... V"],
  teacher_lse: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
  """``sum_v min(p_v, q_v) = 1 - TV(p, q)``: the chance that ratio-rule verification accepts.

  ``teacher_lse`` normalises p where ``teacher_logits`` are cut to a draft vocabulary.
  """
  if teacher_lse is None:
    teacher_lse = _logsumexp(teacher_logits)
  p = jnp.exp(teacher_logits.astype(jnp.float32) - teacher_lse[..., None])
  q = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  return jnp.sum(jnp.minimum(p, q), axis=-1)


def masked_mean(values: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
  """``sum(w x) / max(sum(w), 1)`` in float32."""
  weights = weights.astype(jnp.float32)
  return jnp.sum(values.astype(jnp.float32) * weights) / jnp.maximum(jnp.sum(weights), 1.0)
