# SPDX-License-Identifier: Apache-2.0
"""Hidden Transfer (arXiv 2404.12022): pseudo states of future tokens, made midway in the target.

  p_i = T_i h_t^(l_i)          i = 1..K, the stream at the input of layer l_i, l_1 <= l_2 <= ...

enters layer l_i as one more row at position t + i; it sees what t sees, t itself, and p_1 .. p_i,
and ``W_lm norm(p_i)`` after the last layer guesses ``x_{t+1+i}``. Layers below l_i never compute
it. Only the K matrices are trained, the identity at the start.

Maps are learned one after the other in the paper: each from its own depth alone, those before it
fixed. ``stage = i`` does that for T_i. With ``stage = None`` one run learns all of them under the
same rule: depth i is learned on a group of its own, in which ``T_1 .. T_{i-1}`` are constants.

Decided here: ``l_i = floor(3 L / 4) + (i - 1) max(1, floor(L / 32))``, the last layer at most; the
loss is KL from the target's law on the text.

With ``linked = False`` pseudo states don't see each other. What that costs depends on the target:
the small ones of the tests lose nothing at any depth, since p_1 .. p_{i-1} are linear functions of
a state that p_i is one of, too.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdec.drafting.base import Params, Target
from jaxdec.drafting.objectives import Objective
from jaxdec.drafting.probes import ProbeDrafter, Probes
from jaxdec.errors import UserError
from jaxdec.mixers.base import gather_nodes
from jaxdec.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenTransfer(ProbeDrafter):
  """Pseudo states in the upper layers.

  Attributes:
    num_heads: K. layers: l_1 .. l_K, the layers whose inputs the maps read and feed.
    stage: the one map that learns; None: all, each from its own depth.
    linked: does p_i see p_1 .. p_{i-1}? False: the ablation.
  """

  name: ClassVar[str] = "hidden_transfer"

  num_heads: int = 3
  layers: tuple[int, ...]
  stage: int | None = None
  linked: bool = True
  objective: Objective = "kl"

  def __post_init__(self):
    if len(self.layers) != self.num_heads or list(self.layers) != sorted(self.layers):
      raise UserError(
        f"layers must be {self.num_heads} numbers that don't fall, one for each draft, got "
        f"{self.layers}"
      )
    if self.stage is not None and not 1 <= self.stage <= self.num_heads:
      raise UserError(f"stage must be a draft, 1 to {self.num_heads}, or None, got {self.stage}")
    super().__post_init__()

  @classmethod
  def for_target(cls, config: DecoderConfig, **options) -> HiddenTransfer:
    heads, depth = options.get("num_heads", cls.num_heads), config.num_layers
    if "layers" not in options:
      first, step = 3 * depth // 4, max(1, depth // 32)
      options["layers"] = tuple(min(first + i * step, depth - 1) for i in range(heads))
    if not all(0 <= i < depth for i in options["layers"]):
      raise UserError(
        f"the target has layers 0 to {depth - 1}, but hidden_transfer reads {options['layers']}"
      )
    return super().for_target(config, **options)

  @property
  def capture(self):
    return self.layers  # the prompt's last token: what the first drafts start from

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    del rng, target
    one = nn.LogicallyPartitioned(jnp.eye(self.dim), ("embed", None))
    return {f"map_{i}": one for i in range(1, self.num_heads + 1)}

  def rows(self, params, layer, x, probes: Probes, before):
    """Offset i in order of i; in training its last member is the one that learns T_i."""
    starting = [i for i, at in enumerate(self.layers, 1) if at == layer]
    new = []
    for i in starting:
      here = slice(sum(probes.counts[: i - 1]), sum(probes.counts[:i]))
      anchor = probes.anchor[:, here]
      source = gather_nodes(x, jnp.maximum(anchor, 0))
      if before:
        inside = (anchor >= 0)[..., None]
        source = jnp.where(inside, source, before[i - 1].astype(x.dtype)[:, None])
      matrix = params[f"map_{i}"]
      if self.stage not in (None, i):
        matrix = jax.lax.stop_gradient(matrix)
      learned = source @ matrix.astype(x.dtype)
      fixed = source @ jax.lax.stop_gradient(matrix).astype(x.dtype)
      own = (probes.member[:, here] == i - 1)[..., None]
      new.append(jnp.where(own, learned, fixed))
    return jnp.concatenate(new, axis=1) if new else None

  # Training.

  def training_layout(self):
    """Member e = 0..K-1 is the group whose last offset, e + 1, is learned."""
    depths = range(1, self.num_heads + 1)
    return tuple((i, e) for i in depths for e in range(i - 1, self.num_heads))

  def states(self, hidden, depth, target, batch, slots):
    return hidden[depth, depth - 1][:, :, None]

  def _total(self, values, weights, depths):
    if self.stage is not None:
      values, weights, depths = ([x[self.stage - 1]] for x in (values, weights, depths))
    return super()._total(values, weights, depths)
