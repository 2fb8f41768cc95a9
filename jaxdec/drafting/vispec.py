# SPDX-License-Identifier: Apache-2.0
"""ViSpec (arXiv 2509.15235): EAGLE that reads an image as one vector, and remembers another.

A resampler with ``num_queries`` queries reads the image's embeddings. All its outputs but the last
stand for the image in the layer's input stream; the last, v, goes to all text after the image:

  f' = W_i [f_t ; v] + b_i      W_i = [I | 0], b_i = 0 at the start; v = 0 before any image
  x = W_fc [E[x_{t+1}] ; f'] + b,   draft = Layer(x)

so that a new drafter is EAGLE on text. Drafted features go through ``W_i`` as well.

Stage 1 trains on text with EAGLE's loss (the default here). Stage 2, on images (``STAGE_2``):
``10 sum_v |q_v - p_v| + 0.1 ListMLE`` over the target's 10 best tokens, and ``mtp_steps`` further
passes that read at slot t what the pass before predicted for it (slot 0: the truth), gradients
flowing through; all passes have the same labels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from jaxdec.drafting.objectives import Term
from jaxdec.drafting.prefix import Compressed, Resampler
from jaxdec.drafting.prefix_drafter import PrefixDrafter, PrefixLayers
from jaxdec.drafting.specvlm import heads
from jaxdec.drafting.trained import TrainedDrafter
from jaxdec.errors import UserError

# Options of the second stage; sum |q - p| is twice the total variation.
STAGE_2: dict[str, Any] = {
  "objective": (Term("tv", 20.0), Term("list_mle", 0.1, 10)),
  "mtp_steps": 1,
}


class ViSpecLayers(PrefixLayers):
  """EAGLE's layer, ``W_i``, and the image adaptor."""

  num_queries: int = 2
  num_heads: int = 1

  def setup(self):
    super().setup()
    self.adaptor = Resampler(self.num_queries, self.num_heads, self.dtype)
    # W_i by its two halves: what it does to the feature, and what it adds of the image.
    identity = nn.with_logical_partitioning(lambda rng, d: jnp.eye(d), ("embed", None))
    zeros = nn.initializers.zeros
    self.keep = self.param("keep", identity, self.dim)
    self.add = self.param(
      "add", nn.with_logical_partitioning(zeros, ("embed", None)), (self.dim, self.dim)
    )
    self.bias = self.param("bias", nn.with_logical_partitioning(zeros, (None,)), (self.dim,))

  def seeing(self, features, image):
    keep, add, bias = (w.astype(features.dtype) for w in (self.keep, self.add, self.bias))
    return features @ keep + image.astype(features.dtype) @ add + bias

  def compress(self, x, count, question, rng=None):
    out = self.adaptor(x, count)
    left = jnp.where(count > 0, self.num_queries - 1, 0)
    return Compressed(out.values[:, :-1], left), out.values[:, -1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViSpec(PrefixDrafter):
  """ViSpec. ``mtp_steps``: further passes in training; their rows in the metrics follow depth 1."""

  name: ClassVar[str] = "vispec"

  num_queries: int = 2
  mtp_steps: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.num_queries < 2 or self.mtp_steps < 0:
      raise UserError(
        "num_queries must be at least 2 and mtp_steps at least 0, got "
        f"{self.num_queries} and {self.mtp_steps}"
      )
    if self.mtp_steps and self.rollouts > 1:
      raise UserError("ViSpec trains either further passes (mtp_steps) or rollouts, not both")

  @property
  def network(self) -> ViSpecLayers:
    return ViSpecLayers(
      **self._shape,
      fuse_bias=self.fuse_bias,
      num_queries=self.num_queries,
      num_heads=heads(self.dim, self.attention),
    )

  def teacher_forced(self, params, target, output, batch, rng=None):
    if rng is None or not self.mtp_steps:
      return super().teacher_forced(params, target, output, batch, rng)
    features, fed, segments = self._inputs(params, target, output, batch, rng)
    passes = []
    for _ in range(1 + self.mtp_steps):
      x = self._apply(params, features, fed, batch["positions"], segments, 1, method="rollout")[0]
      passes.append(x[:, :-2])
      features = jnp.concatenate([features[:, :1], x[:, :-1]], axis=1)
    return [tuple(passes)]

  def examples(self, params, target, output, batch, rng=None):
    for example in super().examples(params, target, output, batch, rng):
      passes = example.states if isinstance(example.states, tuple) else (example.states,)
      for states in passes:
        yield example.replace(states=states)

  def _total(self, values, weights, depths):
    if len(values) > 1 and depths[1] == 1:  # passes: one mean over all of them
      return TrainedDrafter._total(self, values, weights, depths) / len(values)
    return super()._total(values, weights, depths)
