# SPDX-License-Identifier: Apache-2.0
"""Recursive speculative decoding (arXiv 2402.14160): trees sampled without replacement.

``RsdC``: constant branching factors ``b_1, ..., b_D``; the children of a node at depth ``l - 1``
are its first ``b_l`` draws. ``RsdS``: stochastic beam search (arXiv 1903.06059) of width W, which
draws W *sequences* without replacement. With ``phi`` the log-probability of a sequence and G its
perturbed value (0 at the root), the children of a beam have, for every token,

  g = phi + log q + Gumbel,   Z = max g,   v = G - g + log(1 - exp(g - Z))
  G' = G - max(v, 0) - log(1 + exp(-|v|))       (g, given that the largest of them is G)

and the W largest ``G'`` of all beams are kept. A node without a kept child stays, as a leaf. What
is cut off are values: given the siblings before it, a draw's value is independent of its token,
so rule ``without_replacement`` keeps the target's law.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxdec.drafting.sampled_tree import Draws, Kept, SampledTree
from jaxdec.drafting.selection import argmax
from jaxdec.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RsdC(SampledTree):
  """Constant branching factors.

  Attributes:
    branching: children of each node, by depth of the children; sets the depth.
    replacement: draw siblings independently (SpecInfer's trees, arXiv 2305.09781, for rule
      ``multi_round``). Repeated siblings are nodes of their own.
  """

  branching: tuple[int, ...] = (3, 2, 1)
  replacement: bool = False
  depth: int = dataclasses.field(init=False, default=0)

  name: ClassVar[str] = "rsd_c"

  def __post_init__(self):
    object.__setattr__(self, "branching", tuple(self.branching))
    if not self.branching or not all(1 <= n <= self.vocab_size for n in self.branching):
      raise UserError(
        f"branching must be one number per level, each from 1 to the vocabulary's "
        f"{self.vocab_size}, got {self.branching}"
      )
    if self.replacement and self.draws != "sampled":
      raise UserError("independent siblings need noise of their own; set draws='sampled'")
    object.__setattr__(self, "depth", len(self.branching))
    super().__post_init__()

  @property
  def num_nodes(self) -> int:
    return 1 + sum(math.prod(self.branching[: i + 1]) for i in range(self.depth))

  @property
  def distinct_siblings(self) -> bool:
    return not self.replacement

  def fan(self, level):
    return self.branching[level - 1]

  def draw(self, context, log_q, level):
    if not self.replacement or context.sampler.greedy:
      return super().draw(context, log_q, level)
    b, n, vocab = log_q.shape
    k = self.fan(level)
    noise = self.noise(context, level, n * k, vocab).reshape(b, n, k, vocab)
    perturbed = log_q[:, :, None] + noise
    tokens = argmax(perturbed)
    chosen = jnp.take_along_axis(log_q, tokens, axis=-1)
    return Draws(tokens, chosen, jnp.max(perturbed, axis=-1))

  def keep(self, level, draws, carry):
    b, n, k = draws.tokens.shape
    index = jnp.broadcast_to(jnp.arange(n * k), (b, n * k))
    return Kept(index, jnp.ones((b, n * k), bool))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RsdS(SampledTree):
  """Stochastic beam search.

  Attributes:
    width: W, sequences kept per level.
  """

  width: int = 4

  name: ClassVar[str] = "rsd_s"

  def __post_init__(self):
    super().__post_init__()
    if self.width < 1:
      raise UserError(f"rsd_s needs width >= 1, got {self.width}")

  @property
  def num_nodes(self) -> int:
    return 1 + sum(beam_widths(self.width, self.fan(1), self.depth))

  def fan(self, level):
    return min(self.width, self.vocab_size)

  def keep(self, level, draws, carry):
    b, n, k = draws.tokens.shape
    phi, best = carry if carry is not None else (jnp.zeros((b, 1)), jnp.zeros((b, 1)))
    phi, best = phi[..., None], best[..., None]
    child_phi = phi + draws.log_q
    # The largest of all tokens' values is the first draw's.
    value = conditioned(phi + draws.perturbed, best)
    # The order of the draws where rounding would change it.
    value = jax.lax.cummin(value, axis=2).reshape(b, n * k)
    value, index = jax.lax.top_k(value, min(self.width, n * k))
    child_phi = jnp.take_along_axis(child_phi.reshape(b, n * k), index, axis=1)
    return Kept(index, value > -jnp.inf, (child_phi, value))


def beam_widths(width: int, fan: int, depth: int) -> list[int]:
  """Nodes per level of a beam of ``width`` that has fewer where there are fewer."""
  sizes = [1]
  for _ in range(depth):
    sizes.append(min(width, sizes[-1] * fan))
  return sizes[1:]


def conditioned(g, largest):
  """Gumbel values ``g [..., K]``, descending, given that their maximum is ``largest [..., 1]``.

  In a form that keeps small differences (arXiv 1903.06059, appendix B.3); -inf stays -inf.
  """
  possible = (g > -jnp.inf) & (largest > -jnp.inf)
  safe = jnp.where(possible, g, 0.0)
  top = jnp.where(possible, g[..., :1], 0.0)
  base = jnp.where(possible, largest, 0.0)
  v = base - safe + jnp.log1p(-jnp.exp(safe - top))
  value = base - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
  return jnp.where(possible, value, -jnp.inf)
