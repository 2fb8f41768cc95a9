# SPDX-License-Identifier: Apache-2.0
"""Dovetail's drafter (arXiv 2412.18934): EAGLE, deeper, with Dynamic Gating Fusion for the linear.

  u = W_1 f_t;   v = SiLU(W_2 RMS(E[x_{t+1}]));   z = sigmoid(W_z [u ; v])
  g = z * u + (1 - z) * v                         read by the first layer, without input norm
  f^_{t+1} = Layers(g)_t                          1 + m layers

Trained with EAGLE's loss and noise. The paper drafts EAGLE-2's trees, small ones, since its target
runs on a CPU, where a pass gets slower with every node; ``jaxdec.drafting.budget.choose_budget``
finds the size from measured passes.

``gated=False`` puts EAGLE's ``W_fc [e ; f]`` in the fusion's place: the ablation, which is EAGLE
with as many layers. On the small counting target of the tests the fusion is not ahead of it (two
layers, 60 steps).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxdec.drafting.eagle import EagleLayers, FeatureDrafter, FeatureLayers
from jaxdec.mixers.norms import Dense, RMSNorm


class GatedLayers(FeatureLayers):
  """Dynamic gating fusion before the layers."""

  def setup(self):
    super().setup()
    self.embed_norm = RMSNorm(self.norm)
    self.state_in, self.embed_in = (
      Dense(self.dim, ("embed", None), dtype=self.dtype) for _ in range(2)
    )
    xavier = (2 / (3 * self.dim)) ** 0.5
    self.gate = Dense(self.dim, (None, "embed"), dtype=self.dtype, init_std=xavier)

  def fuse(self, features, embedded):
    u = self.state_in(features)
    v = jax.nn.silu(self.embed_in(self.embed_norm(embedded)))
    z = jax.nn.sigmoid(self.gate(jnp.concatenate([u, v], axis=-1)))
    return z * u + (1 - z) * v


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dovetail(FeatureDrafter):
  """Dovetail's drafter. ``num_layers``: 1 + m, of up to 6 in the paper. ``gated``: the fusion."""

  name: ClassVar[str] = "dovetail"

  num_layers: int = 2
  gated: bool = True

  @property
  def network(self) -> FeatureLayers:
    return (GatedLayers if self.gated else EagleLayers)(**self._shape)
