# SPDX-License-Identifier: Apache-2.0
"""SpecVLM (arXiv 2509.11815): EAGLE with an input norm and an elastic compressor of the image.

  x = W_fc [E[x_{t+1}] ; f_t] + b,  or a compressed vector of the image
  draft = Layer(x), with its input norm

The compressor (``jaxdec.drafting.prefix.Elastic``) reads the image's embeddings; its gate the mean
embedding of the prompt's text, which stands for the question. Trained online: the target runs in
the same step and its states and logits are never stored, the loss being EAGLE's,
``SmoothL1(f^, f) + 0.1 CE(p, q)``. The paper drafts EAGLE-2's tree (``tree=DynamicTree(...)``).

The paper gives ratios; where the vectors enter, that pruning is evenly spaced in use and that the
gate is one linear layer is our choice.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from jaxdec.drafting.prefix import Elastic
from jaxdec.drafting.prefix_drafter import PrefixDrafter, PrefixLayers
from jaxdec.errors import UserError


class SpecVLMLayers(PrefixLayers):
  """EAGLE's layer behind a norm, and the elastic compressor."""

  compressor: Elastic | None = None

  def compress(self, x, count, question, rng=None):
    out = self.compressor(x, count, question, rng)
    return out, jnp.zeros_like(x[:, 0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecVLM(PrefixDrafter):
  """SpecVLM.

  Attributes:
    compression: ``gate`` (default), ``concat`` or ``mix``; see ``Elastic``, also for the others.
  """

  name: ClassVar[str] = "specvlm"

  compression: Literal["mix", "concat", "gate"] = "gate"
  ratio: int = 3
  coarse: int = 20
  queries: int = 2

  def __post_init__(self):
    super().__post_init__()
    if self.compression not in ("mix", "concat", "gate"):
      raise UserError(f"compression must be mix, concat or gate, got {self.compression!r}")
    if min(self.ratio, self.coarse, self.queries) < 1:
      raise UserError(
        "ratio, coarse and queries must be at least 1, got "
        f"{self.ratio}, {self.coarse} and {self.queries}"
      )

  @property
  def network(self) -> SpecVLMLayers:
    compressor = Elastic(
      self.compression, self.ratio, self.coarse, self.queries, heads(self.dim, self.attention),
      jnp.dtype(self.dtype), parent=None,
    )  # fmt: skip
    return SpecVLMLayers(
      **self._shape, fuse_bias=self.fuse_bias, input_norm=True, compressor=compressor
    )


def heads(dim: int, attention) -> int:
  """Heads of a cross-attention of the model's width: the layer's, where they divide it."""
  return attention.num_heads if dim % attention.num_heads == 0 else 1
