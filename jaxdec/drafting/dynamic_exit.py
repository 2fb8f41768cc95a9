# SPDX-License-Identifier: Apache-2.0
"""DEL (arXiv 2504.05598): early exit whose layer and draft length are chosen anew every round.

Every verify pass passes through all layers anyway, so what *each* exit would have drafted can be
read off it: the shadow tokens ``argmax W_lm norm(h^l)`` at the rows whose context was right (the
root and the accepted drafts), compared with the tokens the target took there. With m_l matches in n
trials of a round,

  M_l <- w M_l + m_l,   C <- w C + n,   alpha_l = M_l / C
  (E, d) = argmax_{l,d}  (1 - alpha_l^{d+1}) / (1 - alpha_l) / (d (l + c) + L + c)

the expected tokens per layer run (c: cost of the LM head in layers, 0 in the paper). Besides,
drafting stops after a draft whose top-1 probability lies below the midpoint of its discounted means
over matched and over mismatched shadow tokens of that layer.

Our choices where the paper leaves them open: w = 0.95 a round; the first estimates come from the
last 32 tokens of the prompt; no stopping until both classes hold 4 trials; at temperature > 0 a
shadow token is drawn as a draft would be. A batch shares one choice (its rows advance together).
The choice depends on past rounds only, and the target decides what is emitted: lossless. Exit and
length are data, so one program serves all of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdec.drafting.base import Context, Drafter
from jaxdec.drafting.early_exit import (
  EarlyExitTree,
  check_layers,
  drawing,
  exit_logits,
  first_nodes,
  round_cost,
  speculate,
  top_probability,
  verify_from_exit,
)
from jaxdec.drafting.selection import argmax
from jaxdec.errors import UserError

WINDOW = 64  # prompt tokens read again for the first estimates, which the second half gives
FEWEST = 4.0  # trials of either class before a threshold is used
BOUNDS = 0.01, 0.99  # of alpha


@struct.dataclass
class ExitStatistics:
  """Discounted sums over rounds, one entry for each of J exits, and what was done so far.

  Attributes:
    matched: M. trials: C. hit_sum, miss_sum: top-1 probabilities summed over matched and over
      mismatched trials.
    rounds: rounds seen. chosen: how many rounds drafted d tokens with exit j.
  """

  matched: Float[Array, "J"]
  trials: Float[Array, ""]
  hit_sum: Float[Array, "J"]
  miss_sum: Float[Array, "J"]
  rounds: Int[Array, ""]
  chosen: Int[Array, "J D"]

  @property
  def alpha(self) -> Float[Array, "J"]:
    """Estimated acceptance of each exit."""
    return jnp.clip(self.matched / jnp.maximum(self.trials, 1e-6), *BOUNDS)

  @property
  def threshold(self) -> Float[Array, "J"]:
    """Top-1 probability below which drafting stops; 0 while there are too few trials."""
    missed = self.trials - self.matched
    hit_mean = self.hit_sum / jnp.maximum(self.matched, 1e-6)
    miss_mean = self.miss_sum / jnp.maximum(missed, 1e-6)
    known = (self.matched >= FEWEST) & (missed >= FEWEST)
    return jnp.where(known, (hit_mean + miss_mean) / 2, 0.0)


def choose(
  alpha: Float[Array, "J"],
  exits: tuple[int, ...],
  num_layers: int,
  max_drafts: int,
  head: float = 0.0,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
  """Number of the exit and draft length of the most tokens per layer run; ties: the shorter draft,
  then the earlier exit."""
  d = jnp.arange(max_drafts + 1, dtype=jnp.float32)[:, None]
  tokens = (1 - alpha ** (d + 1)) / (1 - alpha)
  rate = tokens / round_cost(num_layers, jnp.asarray(exits, jnp.float32), d, head)
  best = argmax(rate.reshape(-1))
  return best % len(exits), best // len(exits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicExit(Drafter):
  """DEL.

  Attributes:
    exits: candidate layers; None: 1 .. L-1.
    max_drafts: longest draft.
    widths: numbers of nodes that verify passes are compiled for, besides ``max_drafts + 1``; a pass
      takes the least that holds the draft (one program holds them all).
    discount: w. interval: rounds from one look at the shadow tokens to the next: a look costs J
      rows of the LM head for each node accepted.
    head_layers: c, what a pass of the LM head costs in layers.
    stopping: stop drafting at unsure drafts.
    draws: see ``EarlyExit``.
  """

  exits: tuple[int, ...] | None = None
  max_drafts: int = 12
  widths: tuple[int, ...] = (1, 3, 6)
  discount: float = 0.95
  interval: int = 1
  head_layers: float = 0.0
  stopping: bool = True
  draws: Literal["greedy", "shared"] = "shared"

  name: ClassVar[str] = "del"

  def __post_init__(self):
    if self.max_drafts < 1 or self.interval < 1 or not 0 < self.discount <= 1:
      raise UserError(
        "del needs max_drafts >= 1, interval >= 1 and discount in (0, 1], got "
        f"{self.max_drafts}, {self.interval} and {self.discount}"
      )
    if any(w < 1 for w in self.widths):
      raise UserError(f"widths must be at least 1, got {self.widths}")
    if self.draws not in ("greedy", "shared"):
      raise UserError(f"del draws 'greedy' or 'shared', got {self.draws!r}")

  @property
  def num_nodes(self) -> int:
    return self.max_drafts + 1

  def candidates(self, target) -> tuple[int, ...]:
    """The exits in use.

    Raises:
      UserError: one the target doesn't have.
    """
    num_layers = check_layers(target)
    exits = tuple(range(1, max(num_layers, 2))) if self.exits is None else self.exits
    if not exits or list(exits) != sorted(set(exits) & set(range(1, num_layers + 1))):
      raise UserError(f"exits must ascend within 1..{num_layers}, the target's layers, got {exits}")
    return exits

  def start(self, params, state, prompt, output, target) -> ExitStatistics:
    if state:  # statistics of an earlier text
      return state
    exits = self.candidates(target)
    zeros = jnp.zeros(len(exits))
    chosen = jnp.zeros((len(exits), self.max_drafts + 1), jnp.int32)
    statistics = ExitStatistics(zeros, jnp.float32(0), zeros, zeros, jnp.int32(0), chosen)
    width = min(WINDOW, prompt.tokens.shape[1])
    index = jnp.arange(width, dtype=jnp.int32)
    at = jnp.maximum(prompt.lengths - width, 0)[:, None] + index
    real = at < prompt.lengths[:, None]
    tokens = jnp.take_along_axis(prompt.tokens, at, axis=1, mode="clip")
    out = target.model.apply(
      {"params": target.params},
      tokens,
      jnp.broadcast_to(index, tokens.shape),
      real.astype(jnp.int32),
      capture=exits,
    )
    recent = real & (at >= prompt.lengths[:, None] - WINDOW // 2)
    return self._learn(
      statistics, target, out.features, argmax(out.logits), recent, lambda x: argmax(x)
    )

  def propose(self, params, state: ExitStatistics, context: Context, rng):
    exits, num_layers = self.candidates(context.target), context.target.model.config.num_layers
    j, drafts = choose(state.alpha, exits, num_layers, self.max_drafts, self.head_layers)
    tree = speculate(
      context,
      jnp.asarray(exits)[j],
      exits[-1],
      drafts,
      self.max_drafts,
      drawing(context, self.draws),
      state.threshold[j] if self.stopping else None,
    )
    made = jnp.max(jnp.sum(tree.valid, axis=1)) - 1
    return tree, state.replace(chosen=state.chosen.at[j, made].add(1))

  def verify(self, params, tree: EarlyExitTree, context: Context):
    exits = self.candidates(context.target)

    def narrow(width):
      out = verify_from_exit(first_nodes(tree, width), context, exits)
      widen = lambda x, axis: _widened(x, self.num_nodes, axis)  # noqa: E731
      rows = jax.tree.map(lambda x: widen(x, 1), out.replace(pending=None))
      return rows.replace(pending=jax.tree.map(lambda x: widen(x, 2), out.pending))

    return self._at_width(jnp.sum(tree.valid, axis=1), narrow)

  def observe(self, params, state, tree, accepted, output, context):
    draw = drawing(context, self.draws)
    right = jnp.arange(tree.tokens.shape[1]) < accepted.count[:, None]  # contexts
    position = context.length[:, None] + tree.depth + 1

    def learn(width):
      streams, tokens, trials, at = jax.tree.map(
        lambda x: x[:, :width], (output.features, accepted.tokens, right, position)
      )
      return self._learn(
        state, context.target, streams, tokens, trials, lambda logits: draw(logits, at)
      )

    due = state.rounds % self.interval == 0
    state = jax.lax.cond(due, lambda: self._at_width(accepted.count, learn), lambda: state)
    return state.replace(rounds=state.rounds + 1)

  def _at_width(self, needed: Int[Array, "B"], run):
    """``run(width)`` of the least compiled width that every row's ``needed`` nodes fit in."""
    widths = sorted({w for w in self.widths if w < self.num_nodes} | {self.num_nodes})
    index = jnp.sum(jnp.max(needed) > jnp.asarray(widths[:-1], jnp.int32))
    return jax.lax.switch(index, [lambda w=w: run(w) for w in widths])

  def _learn(self, state, target, streams, tokens, trials, draw) -> ExitStatistics:
    """One round's trials ``[B,T]``: the shadow tokens of each exit against ``tokens``."""

    def of_exit(stream):
      logits = exit_logits(target, stream)
      hit, sure = (draw(logits) == tokens) & trials, top_probability(logits)
      return jnp.sum(hit), jnp.sum(hit * sure), jnp.sum((trials & ~hit) * sure)

    matched, hits, misses = jax.lax.map(of_exit, jnp.stack(streams))
    keep = self.discount
    return state.replace(
      matched=keep * state.matched + matched,
      trials=keep * state.trials + jnp.sum(trials),
      hit_sum=keep * state.hit_sum + hits,
      miss_sum=keep * state.miss_sum + misses,
    )


def _widened(x: Array, width: int, axis: int) -> Array:
  """Filled up with zeros, which no node that counts reads."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, width - x.shape[axis])
  return jnp.pad(x, padding)


def measured_cost(
  state: ExitStatistics, exits: tuple[int, ...], num_layers: int, head: float = 0.0
) -> Any:
  """Layers run by all rounds so far (``round_cost`` of what was really drafted)."""
  chosen = np.asarray(state.chosen)
  cost = round_cost(num_layers, np.asarray(exits)[:, None], np.arange(chosen.shape[1]), head)
  return float(np.sum(chosen * cost))
