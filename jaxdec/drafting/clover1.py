# SPDX-License-Identifier: Apache-2.0
"""Clover (arXiv 2405.00263): Medusa heads joined by a state that takes in each drafted token.

With ``h_t`` the target's post-norm state and AD the attention block of one key of ``clover``:

  z = Layer(h)                        augmenting block: one decoder layer, causal over t, cached
  s_k = AD_k(s_{k-1}, E[x_{t+k}])     s_0 = z_t; k = 1..K: regressive connection, attention decoder
  y_k = s_k + SiLU(A_k s_k + b_k)     logits W y_k, for x_{t+1+k}

The paper leaves sizes of the attention decoder open: here it is that of Clover-2 (cosine weights),
one for each head, and W is the target's own LM head, frozen. Layer and A_k start so that every
state is ``h_t`` but for what AD adds: a fresh head is the LM head.

With ``top_p`` and ``tree=DynamicTree(...)`` the tree is Clover's own (``clover_tree``).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdec.drafting.base import Params, Target
from jaxdec.drafting.clover import Clover2, TokenAttention, near_identity
from jaxdec.drafting.clover_tree import expand_clover
from jaxdec.drafting.dynamic_tree import DynamicTree
from jaxdec.drafting.objectives import Objective
from jaxdec.drafting.trained import embed
from jaxdec.errors import UserError
from jaxdec.mixers import NormConfig
from jaxdec.mixers.norms import Dense
from jaxdec.models.config import LayerConfig, MLPConfig
from jaxdec.models.decoder import Block


class CloverModule(nn.Module):
  """Parameters, and the same ways through them as ``Clover2Module``."""

  layer: LayerConfig
  num_layers: int
  num_heads: int
  depths: int
  dim: int
  norm: NormConfig
  dtype: jnp.dtype

  def setup(self):
    self.blocks = [
      Block(self.layer, self.dim, self.norm, self.dtype) for _ in range(self.num_layers)
    ]
    self.attend = [
      TokenAttention(self.num_heads, self.norm, self.dtype) for _ in range(self.depths)
    ]
    self.residual = [
      Dense(self.dim, ("embed", None), True, self.dtype, init_std=0.0) for _ in range(self.depths)
    ]

  def begin(self, h, e, positions, segment_ids=None):
    """``s_1`` over whole sequences of (state t, token t + 1)."""
    for block in self.blocks:
      h = block(h, positions, segment_ids)
    return self.attend[0](h, e)

  def read(self, h, e, caches, positions):
    """``s_1`` of the next slots, and the caches that hold them (position -1: padding)."""
    new = []
    for block, cache in zip(self.blocks, caches):
      h, cache = block.extend(h, cache, positions)
      new.append(cache)
    return self.attend[0](h, e), tuple(new)

  def first(self, s):
    """``y_1``."""
    return self._head(s, 1)

  def next(self, s, e, depth: int):
    """``s_k, y_k`` from ``s_{k-1}`` and the token drafted last."""
    s = self.attend[depth - 1](s, e)
    return s, self._head(s, depth)

  def _head(self, s, depth):
    return s + jax.nn.silu(self.residual[depth - 1](s))

  def __call__(self, h, e, positions):
    """Touches every parameter (for ``init``)."""
    s = self.begin(h, e, positions)
    return self.first(s), [self.next(s, e, k) for k in range(2, self.depths + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clover(Clover2):
  """Clover. Settings as in ``Clover2``; every depth has weights of its own, so K bounds the depth.

  Attributes:
    top_p: with it a ``DynamicTree`` grows by Clover's rule, of which this is the nucleus; None: by
      EAGLE-2's. ratio: least probability of a candidate, relative to the likeliest's.
    depth_decay: Medusa's.
  """

  name: ClassVar[str] = "clover"

  num_layers: int = 1
  num_heads: int = 4
  objective: Objective = "hard"
  depth_decay: float = 0.8
  top_p: float | None = None
  ratio: float = 0.25

  def __post_init__(self):
    super().__post_init__()
    if self.top_p is None:
      return
    if not (0 < self.top_p <= 1 and 0 <= self.ratio <= 1):
      raise UserError(
        f"top_p must lie in (0, 1] and ratio in [0, 1], got {self.top_p} and {self.ratio}"
      )
    tree = self.tree
    if not isinstance(tree, DynamicTree) or tree.num_nodes > 1 + tree.width * tree.max_depth:
      raise UserError(
        "Clover's tree, top_p, needs a DynamicTree of at most width drafts a level, num_nodes <= "
        f"1 + width * max_depth; got tree={tree}"
      )

  @property
  def capture(self) -> tuple[int, ...]:
    return ()

  @property
  def depth_limit(self) -> int:
    return self.num_heads

  @property
  def module(self) -> nn.Module:
    return CloverModule(
      LayerConfig(self.attention, MLPConfig(self.hidden_dim)),
      self.num_layers,
      self.num_splits,
      self.num_heads,
      self.dim,
      NormConfig(self.eps),
      jnp.dtype(self.dtype),
    )

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    params = self._init_module(rng)
    for i in range(self.num_layers):
      block = params[f"blocks_{i}"]
      for branch, name in (("mixer", "o"), ("mlp", "down")):
        block[branch][name] = jax.tree.map(jnp.zeros_like, block[branch][name])
    return near_identity(params, jax.random.fold_in(rng, 1), self.init_noise)

  def _features(self, output):
    return output.hidden.astype(self.dtype)

  def _embed(self, target, tokens):
    return embed(target, tokens, self.dtype)

  def propose(self, params, state, context, rng):
    if self.top_p is None:
      return super().propose(params, state, context, rng)
    logits, carry = self.first(params, state, context)
    tree = expand_clover(
      self.step(params, state, context), carry, logits, context.root, self.tree, top_p=self.top_p,
      ratio=self.ratio, perturb=self._noise(context), ids=self.draft_ids,
    )  # fmt: skip
    return tree, state
