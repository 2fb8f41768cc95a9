# SPDX-License-Identifier: Apache-2.0
"""Drafts as many tokens as pay, step by step: by what a pass costs here and how likely they are.

A source lists continuations with their probabilities. The best m nodes of them make a batch emit
``E(m) = sum_rows (1 + the nodes' probabilities)`` tokens in ``seconds(m)``, so each step takes

  m = argmax E(m) / seconds(m)   over the compiled sizes, m = 1 (plain decoding) among them

(the objective of Sequoia, arXiv 2402.12374, and of DySpec, arXiv 2410.11744, with probabilities
held to what they promised; see ``Combined``). ``seconds`` are measured (``jaxdec.tuner``), so on a
machine where no draft pays, none is made. The choice depends on past tokens and on clocks read
before: under rule ``match`` the text is plain decoding's.

Looking for drafts costs time too. After a step whose drafts paid, the next one drafts at once;
after that the text is looked at every ``every`` tokens; and where the records say that drafts don't
pay, one is made all the same after 16, 32, ... up to 256 tokens, lest a text that has changed be
missed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.base import Drafter
from jaxdec.drafting.combined import Combined
from jaxdec.drafting.merge import rank_paths
from jaxdec.drafting.source import Source
from jaxdec.drafting.stopping import verify_widths
from jaxdec.errors import UserError

_PROBE, _DOUBLINGS = 16, 4  # tokens until the first trial, and how often that number doubles


@struct.dataclass
class AdaptiveState:
  """The source's state, and what the last step with drafts said.

  Attributes:
    at: length of each row after it. pays: whether its drafts were worth a pass.
    fails: trials in a row that were not.
    idle: rows that had finished by then.
  """

  source: Any
  at: Int[Array, "B"]
  pays: Bool[Array, "B"]
  fails: Int[Array, "B"]
  idle: Bool[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive(Drafter):
  """Attributes:

  source: who guesses. Steps without drafts are not shown to it.
  widths: sizes of verify passes that are compiled, root included; the largest is the source's M.
  seconds: of a plain step, then of a step of each width, drafting included; only ratios matter.
    Measure them (``jaxdec.tuner.adaptive`` makes the drafter).
  margin: how much faster than plain decoding a step must promise to be.
  every: tokens between looks while no draft pays.
  """

  source: Source = dataclasses.field(default_factory=Combined)
  widths: tuple[int, ...]
  seconds: tuple[float, ...]
  margin: float = 1.03
  every: int = 4

  name: ClassVar[str] = "adaptive"
  may_pass: ClassVar[bool] = True

  def __post_init__(self):
    object.__setattr__(self, "widths", tuple(int(w) for w in self.widths))
    object.__setattr__(self, "seconds", tuple(float(s) for s in self.seconds))
    if not isinstance(self.source, Source):
      raise UserError(
        "adaptive needs a source that lists continuations (combined, suffix, prompt_lookup and the "
        f"like), got {getattr(self.source, 'name', type(self.source).__name__)}"
      )
    if not self.widths or self.widths[0] < 2 or self.widths != tuple(sorted(set(self.widths))):
      raise UserError(f"adaptive needs rising widths of at least 2, got {self.widths}")
    if self.widths[-1] != self.source.num_nodes:
      raise UserError(
        f"adaptive's largest width must be its source's {self.source.num_nodes} nodes, got "
        f"{self.widths[-1]}"
      )
    if len(self.seconds) != len(self.widths) + 1 or min(self.seconds) <= 0:
      raise UserError(
        f"adaptive needs {len(self.widths) + 1} positive seconds, of a plain step and of each "
        f"width, got {self.seconds}"
      )
    if self.margin < 1 or self.every < 1:
      raise UserError(
        f"adaptive needs margin and every of at least 1, got {self.margin:g}, {self.every}"
      )

  @property
  def num_nodes(self) -> int:
    return self.source.num_nodes

  @property
  def max_depth(self) -> int:
    return self.source.max_depth

  @property
  def capture(self):
    return self.source.capture

  @property
  def needs_prompt_hidden(self) -> bool:
    return self.source.needs_prompt_hidden

  @property
  def trained(self) -> bool:
    return self.source.trained

  def init_params(self, rng, target=None):
    return self.source.init_params(rng, target)

  def init_state(self, batch, capacity):
    zeros = jnp.zeros(batch, jnp.int32)
    return AdaptiveState(
      self.source.init_state(batch, capacity), zeros, zeros > 0, zeros, zeros > 0
    )

  def start(self, params, state, prompt, output, target):
    fresh = jnp.zeros_like(prompt.lengths)
    source = self.source.start(params, state.source, prompt, output, target)
    return AdaptiveState(source, prompt.lengths, fresh == 0, fresh, fresh > 0)

  def has_draft(self, params, state, context):
    since = context.length - state.at
    again = state.pays & (since == 0) & ~state.idle
    # Rows take plain steps together; one that finished among them stays where it was.
    waited = jnp.max(jnp.where(state.idle, 0, since))
    trial = waited >= _PROBE << jnp.max(jnp.minimum(state.fails, _DOUBLINGS))
    due = (waited > 0) & (waited % self.every == 0) | trial

    def look():
      # Whether there is a guess must not depend on noise.
      found = self.source.candidates(params, state.source, context, jax.random.key(0))
      _, worth = self._ranked(found, context)
      worthwhile = self._choose(worth, state.idle)[1]
      return worthwhile | (trial & jnp.any(found.valid, axis=(1, 2)))

    skip = jnp.any(again) | ~due
    return again | jax.lax.cond(skip, lambda: jnp.zeros_like(again), look)

  def propose(self, params, state, context, rng):
    found, source = self.source.listed(params, state.source, context, rng)
    tree, worth = self._ranked(found, context)
    width, pays = self._choose(worth, state.idle)
    index = jnp.arange(self.num_nodes)
    tree = tree.replace(valid=tree.valid & (index < width))
    fails = jnp.where(pays, 0, jnp.where(context.length > state.at, state.fails + 1, state.fails))
    rows = jnp.broadcast_to(pays, state.pays.shape)
    return tree, state.replace(source=source, pays=rows, fails=fails)

  def verify(self, params, tree, context):
    return verify_widths(super().verify, params, tree, context, self.widths)

  def observe(self, params, state, tree, accepted, output, context):
    source = self.source.observe(params, state.source, tree, accepted, output, context)
    idle = accepted.count == 0
    at = jnp.where(idle, state.at, context.length + accepted.count)
    return state.replace(source=source, at=at, idle=idle)

  def _ranked(self, found, context):
    return rank_paths(context.root, found.tokens, found.valid, found.weight, self.num_nodes)

  def _choose(
    self, worth: Float[Array, "B M"], idle: Bool[Array, "B"]
  ) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The size that pays best, and whether it beats plain decoding."""
    gain = jnp.cumsum(jnp.sum(jnp.where(idle[:, None], 0.0, worth), axis=0))
    sizes = jnp.asarray(self.widths)
    rate = gain[sizes - 1] / jnp.asarray(self.seconds[1:])
    best = jnp.argmax(rate)
    return sizes[best], rate[best] > self.margin * gain[0] / self.seconds[0]
