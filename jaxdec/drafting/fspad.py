# SPDX-License-Identifier: Apache-2.0
"""FSPAD (arXiv 2408.15562): EAGLE with feature sampling and partial alignment distillation.

Feature sampling lets the token choose, in a wider space, what an uncertain feature means:

  u_t = W_down( SiLU(W_g e) * (W_u f) ) + W_fc [e ; f] + b        e = E[x_{t+1}], f = f_t

Partial alignment splits the layer's output x into a view that is aligned with the target's state
and fed on, ``N x``, and one that the LM head reads, ``M x``. The loss is EAGLE's:
``SmoothL1(N x, f_{t+1}) + 0.1 CE(p, W_lm M x)``; its weights are the objective's.

No code is public, so widths and starts are ours: inner width 2D without biases, ``W_g = 0`` and
``M = N = I`` at the start, where FSPAD is EAGLE exactly. The paper drafts EAGLE-2's tree
(``tree=DynamicTree(...)``).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdec.drafting.eagle import Eagle, EagleLayers
from jaxdec.mixers.norms import Dense


class SplitLayers(EagleLayers):
  """EAGLE's layer behind feature sampling, with two views of its output."""

  sampling: bool = True
  split: bool = True

  def setup(self):
    super().setup()
    wide, dtype = 2 * self.dim, self.dtype
    self.gate = Dense(wide, ("embed", "mlp"), dtype=dtype, init_std=0.0)
    self.up = Dense(wide, ("embed", "mlp"), dtype=dtype)
    self.down = Dense(self.dim, ("mlp", "embed"), dtype=dtype)
    self.aligned, self.read_view = (View(dtype) for _ in range(2))

  def fuse(self, features, embedded):
    u = super().fuse(features, embedded)
    if not self.sampling:
      return u
    return u + self.down(jax.nn.silu(self.gate(embedded)) * self.up(features))

  def feature(self, x):
    return self.aligned(x) if self.split else x

  def readout(self, x):
    return self.read_view(x) if self.split else x


class View(nn.Module):
  """``x W``, square, the identity at the start."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    identity = nn.with_logical_partitioning(lambda rng, d: jnp.eye(d), ("embed", None))
    kernel = self.param("kernel", identity, x.shape[-1])
    return x.astype(self.dtype) @ kernel.astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fspad(Eagle):
  """FSPAD. ``sampling``, ``split``: its two parts; without both it is EAGLE."""

  name: ClassVar[str] = "fspad"

  sampling: bool = True
  split: bool = True

  @property
  def network(self) -> SplitLayers:
    return SplitLayers(
      **self._shape, fuse_bias=self.fuse_bias, sampling=self.sampling, split=self.split
    )
