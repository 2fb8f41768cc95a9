# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and their context extensions.

Hugging Face layout: the two halves of a head are rotated against each other (not even/odd pairs).
Scalings: ``linear`` (arXiv 2306.15595), ``dynamic`` NTK, ``llama3`` (Llama 3.1's ramp) and
``yarn`` (arXiv 2309.00071). ``rotary_fraction`` < 1 rotates only the first part of each head.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Fields named as in Hugging Face's ``rope_parameters``; unused ones are None."""

  theta: float = 10_000.0
  kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
  rotary_fraction: float = 1.0
  factor: float = 1.0
  original_max_length: int | None = None
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
  """Inverse frequencies ``[R/2]`` (R rotated widths) and the factor on cos and sin.

  ``dynamic`` is evaluated at the original length, where it equals the default: longer sequences
  change the frequencies of keys already cached, which no cached decoder can honour, so positions
  beyond ``original_max_length`` are refused by ``max_length`` instead.
  """
  width = int(head_dim * config.rotary_fraction)
  exponent = np.arange(0, width, 2, dtype=np.float64) / width
  inv = 1.0 / config.theta**exponent
  if config.kind in ("default", "dynamic"):
    return inv.astype(np.float32), 1.0
  if config.kind == "linear":
    return (inv / config.factor).astype(np.float32), 1.0
  if config.kind == "llama3":
    return _llama3(config, inv).astype(np.float32), 1.0
  return _yarn(config, inv, width)


def _llama3(config: RopeConfig, inv: np.ndarray) -> np.ndarray:
  original = config.original_max_length
  low, high = config.low_freq_factor, config.high_freq_factor
  wavelength = 2 * math.pi / inv
  smooth = (original / wavelength - low) / (high - low)
  blended = (1 - smooth) * inv / config.factor + smooth * inv
  out = np.where(wavelength > original / low, inv / config.factor, inv)
  medium = (wavelength <= original / low) & (wavelength >= original / high)
  return np.where(medium, blended, out)


def _yarn(config: RopeConfig, inv: np.ndarray, width: int) -> tuple[np.ndarray, float]:
  original = config.original_max_length

  def correction_dim(rotations: float) -> float:
    return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

  low, high = correction_dim(config.beta_fast), correction_dim(config.beta_slow)
  if config.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
  inv = inv / config.factor * ramp + inv * (1 - ramp)

  def mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

  attention_factor = config.attention_factor
  if attention_factor is None:
    if config.mscale and config.mscale_all_dim:
      attention_factor = mscale(config.factor, config.mscale) / mscale(
        config.factor, config.mscale_all_dim
      )
    else:
      attention_factor = mscale(config.factor)
  return inv.astype(np.float32), float(attention_factor)


def apply_rope(
  x: Float[Array, "B T N H"], positions: Int[Array, "B T"], config: RopeConfig
) -> Float[Array, "B T N H"]:
  """Rotates the heads of ``x`` to their absolute positions, in float32."""
  inv, factor = inverse_frequencies(config, x.shape[-1])
  angle = positions.astype(jnp.float32)[..., None, None] * inv
  cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
  width = 2 * inv.shape[0]
  rotated, rest = x[..., :width].astype(jnp.float32), x[..., width:]
  a, b = jnp.split(rotated, 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
  return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out
