# SPDX-License-Identifier: Apache-2.0
"""RMSNorm (arXiv 1910.07467) in its two checkpoint conventions, and the dense layer of blocks."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class NormConfig:
  """RMSNorm. ``unit_offset`` scales by ``1 + weight`` (Gemma), computed wholly in float32."""

  eps: float = 1e-6
  unit_offset: bool = False


def rms_norm(
  x: Float[Array, "... D"], weight: Float[Array, "D"], config: NormConfig
) -> Float[Array, "... D"]:
  """``x / sqrt(mean(x^2) + eps) * weight``; statistics in float32, result in x's dtype."""
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.eps)
  if config.unit_offset:
    return (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
  return normed.astype(x.dtype) * weight.astype(x.dtype)


class RMSNorm(nn.Module):
  """Holds ``scale [D]``, stored as in checkpoints (``unit_offset`` adds its 1 at run time)."""

  config: NormConfig
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    init = nn.initializers.zeros if self.config.unit_offset else nn.initializers.ones
    scale = self.param(
      "scale", nn.with_logical_partitioning(init, (None,)), (x.shape[-1],), self.param_dtype
    )
    return rms_norm(x, scale, self.config)


class Dense(nn.Module):
  """``x @ kernel (+ bias)`` with logical axis names on its parameters; computes in ``dtype``."""

  features: int
  axes: tuple[str | None, str | None]
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  init_std: float | None = None  # None: 1 / sqrt(fan-in)

  @nn.compact
  def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    std = self.init_std if self.init_std is not None else x.shape[-1] ** -0.5
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(nn.initializers.normal(std), self.axes),
      (x.shape[-1], self.features),
      self.param_dtype,
    )
    out = x.astype(self.dtype) @ kernel.astype(self.dtype)
    if self.use_bias:
      bias = self.param(
        "bias",
        nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]),
        (self.features,),
        self.param_dtype,
      )
      out = out + bias.astype(self.dtype)
    return out
