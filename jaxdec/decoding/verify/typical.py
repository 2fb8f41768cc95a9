# SPDX-License-Identifier: Apache-2.0
"""Rule ``typical_lossy``: the target's law is not kept."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxdec.decoding.verify.base import Rule, longest_path, verdict_at
from jaxdec.decoding.verify.match import Match
from jaxdec.drafting.selection import argmax


@dataclasses.dataclass(frozen=True)
class TypicalLossy(Rule):
  """NOT lossless. Accept draft x where ``p(x) > min(epsilon, delta * exp(-H(p)))``, H in nats.

  Keeps the longest accepted path, among those the most probable one, then emits the argmax of p
  (``sample_next``: a draw from p instead). ``epsilon`` near 1 with a large ``delta`` accepts
  nothing uncertain.
  """

  epsilon: float = 0.09
  delta: float = 0.3
  sample_next: bool = False

  name: ClassVar[str] = "typical_lossy"
  lossless: ClassVar[bool] = False

  def __call__(self, tree, logits, sampler, keys, length):
    if sampler.greedy:
      return Match()(tree, logits, sampler, keys, length)
    log_p = sampler.log_probs(logits)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
    threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
    rows = jnp.arange(tree.tokens.shape[0])[:, None]
    p_node = p[rows, tree.parent, tree.tokens]
    ok = tree.valid & (p_node > threshold[rows, tree.parent])
    best = longest_path(tree, ok, jnp.log(p_node))
    chosen = logits[rows[:, 0], best]
    position = length + tree.depth[rows[:, 0], best] + 1
    final = sampler.draw(chosen, keys, position) if self.sample_next else argmax(chosen)
    return verdict_at(tree, best, final)
