# SPDX-License-Identifier: Apache-2.0
"""Chooses how to draft on this machine, for this model and such prompts: ``drafter="auto"``.

Three things are measured, each in the loop that will use it:

1. ``seconds``: a plain step, and a step whose verify pass has m nodes, for some sizes m;
2. the drafting of a source, as what its steps take beyond those of as many idle nodes;
3. every way to draft that was asked for, and ``Adaptive`` with the seconds above for each source,
   against plain decoding on the prompts, in turn (``jaxdec.bench``).

The fastest wins, plain decoding unless one is ``MARGIN`` times as fast. ``Adaptive`` then goes on
choosing, step by step. The output is plain decoding's whatever is chosen.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from jaxdec import bench
from jaxdec.decoding import Sampler, generate
from jaxdec.drafting.adaptive import Adaptive
from jaxdec.drafting.base import Drafter
from jaxdec.drafting.combined import Combined
from jaxdec.drafting.source import Source
from jaxdec.drafting.suffix import Suffix
from jaxdec.drafting.token_recycling import TokenRecycling
from jaxdec.drafting.tree import chain
from jaxdec.errors import UserError

MARGIN = 1.03  # how much faster than plain decoding drafting must be
LOOKING = 0.02  # share of plain decoding's time that looking for drafts in vain may take
WIDTHS = (3, 6, 11, 16)
_STEPS = 32  # a timed run; long enough that the clock's call doesn't count

Tick = Callable[[str], None]


def default_sources(width: int) -> dict[str, Source]:
  """What needs no training, for trees of ``width`` nodes."""
  suffix = Suffix(num_drafts=width - 1)
  recycled = (suffix, TokenRecycling(size=width))
  return {
    "suffix": Combined(sources=(suffix,), size=width, corrects=True),
    "suffix + token_recycling": Combined(sources=recycled, size=width),
  }


@dataclasses.dataclass(frozen=True)
class Idle(Drafter):
  """A chain whose drafts are computed and never accepted: what a step of M nodes costs."""

  size: int
  name: ClassVar[str] = "idle"

  @property
  def num_nodes(self) -> int:
    return self.size

  def propose(self, params, state, context, rng):
    drafts = jnp.zeros((context.root.shape[0], self.size - 1), jnp.int32)
    return chain(context.root, drafts, jnp.zeros(drafts.shape, bool)), state


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What was measured and chosen.

  Attributes:
    name: of the choice; ``bench.BASELINE``: don't draft.
    drafter, params: for ``generate``; None: don't draft.
    seconds: of a step, by the nodes of its verify pass (1: plain decoding).
    drafting: seconds that a source takes in a step.
    rows: of ``jaxdec.bench``, plain decoding first.
  """

  name: str
  drafter: Drafter | None
  params: Any
  seconds: Mapping[int, float]
  drafting: Mapping[str, float]
  rows: Sequence[Mapping[str, Any]]

  def explain(self) -> str:
    """The measurements and the reason, in a few lines."""
    plain = self.seconds[1]
    passes = ", ".join(f"{m} nodes {s / plain:.2f}" for m, s in sorted(self.seconds.items()))
    lines = [f"a verify pass, in plain steps: {passes}"]
    lines += [
      f"drafting by {name}: {s / plain:.2f} plain steps" for name, s in self.drafting.items()
    ]
    lines += [
      f"{row['drafter']}: {row['tokens_per_step']:.2f} tokens a step, "
      f"{row['speedup']:.2f} x plain decoding"
      for row in self.rows[1:]
    ]
    if self.drafter is None:
      lines.append(f"chosen: plain decoding, because nothing is {MARGIN:.2f} times as fast")
    else:
      lines.append(f"chosen: {self.name}, the fastest")
    return "\n".join(lines)


def tune(
  model: Any,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  sampler: Sampler = Sampler(),  # noqa: B008
  max_new_tokens: int = 96,
  candidates: Mapping[str, tuple[Drafter, Any]] = {},
  sources: Mapping[str, Source] | None = None,
  widths: Sequence[int] = WIDTHS,
  repeats: int = 3,
  tick: Tick = lambda text: None,
) -> Tuned:
  """Measures and chooses. Most of the time goes into compiling a program for each size and arm.

  Args:
    model, params: the decoder (unrolled layout) and its parameters.
    prompts: token ids like those to come; decoded together, as one batch.
    candidates: drafters to be tried as they are, by name, with their parameters.
    sources: what ``Adaptive`` is tried with; None: ``default_sources``. Their M must be the largest
      width.
    widths: sizes of verify passes.
    repeats: timed passes.
    tick: told what is being measured.

  Raises:
    UserError: no prompts, or widths that are not rising from 2 on.
  """
  widths = tuple(widths)
  if not prompts:
    raise UserError("the tuner needs at least one prompt to decode")
  if not widths or widths[0] < 2 or widths != tuple(sorted(set(widths))):
    raise UserError(f"the tuner's widths must rise from at least 2, got {widths}")
  sources = default_sources(widths[-1]) if sources is None else sources
  clock = _Clock(model, params, prompts, sampler, repeats)
  seconds = {}
  for width in (1, *widths):
    tick(f"a pass of {width} nodes")
    seconds[width] = clock.step(None if width == 1 else Idle(width))
  arms = [bench.Arm(name, *what) for name, what in candidates.items()]
  drafting = {}
  for name, source in sources.items():
    tick(f"drafting by {name}")
    drafting[name] = max(0.0, clock.step(_Always(source)) - seconds[widths[-1]])
    arms.append(bench.Arm(f"adaptive ({name})", adaptive(source, seconds, drafting[name])))
  settings = bench.BenchConfig(
    max_new_tokens=max_new_tokens, temperatures=(sampler.temperature,), sampler=sampler,
    repeats=repeats, batch_size=len(prompts),
  )  # fmt: skip
  rows = bench.run(model, params, arms, prompts, settings, tick=tick)
  best = max(rows, key=lambda row: row["speedup"])
  chosen = next((arm for arm in arms if arm.name == best["drafter"]), None)
  if chosen is None or best["speedup"] < MARGIN:
    return Tuned(bench.BASELINE, None, None, seconds, drafting, rows)
  return Tuned(chosen.name, chosen.drafter, chosen.params, seconds, drafting, rows)


def adaptive(source: Source, seconds: Mapping[int, float], drafting: float) -> Adaptive:
  """``Adaptive`` for measured seconds: of verify passes by size (1: plain), and of drafting."""
  widths = tuple(sorted(m for m in seconds if m > 1))
  plain = seconds[1]
  # Ratios, rounded: the numbers are static, and noise in them must not compile a new program.
  ratios = tuple(round((seconds[m] + drafting) / plain, 2) for m in widths)
  every = min(64, max(1, math.ceil(drafting / plain / LOOKING)))
  return Adaptive(source=source, widths=widths, seconds=(1.0, *ratios), every=every)


@dataclasses.dataclass(frozen=True)
class _Always(Drafter):
  """A source that drafts in every step, guess or not, and nothing of it is accepted: its cost."""

  source: Source
  name: ClassVar[str] = "always"

  @property
  def num_nodes(self):
    return self.source.num_nodes

  @property
  def max_depth(self):
    return self.source.max_depth

  @property
  def capture(self):
    return self.source.capture

  @property
  def needs_prompt_hidden(self):
    return self.source.needs_prompt_hidden

  def init_state(self, batch, capacity):
    return self.source.init_state(batch, capacity)

  def start(self, *args):
    return self.source.start(*args)

  def propose(self, params, state, context, rng):
    tree, state = self.source.propose(params, state, context, rng)
    return tree.replace(valid=tree.valid & (tree.depth == 0)), state

  def observe(self, *args):
    return self.source.observe(*args)


class _Clock:
  """Seconds of a step of the decode loop with a drafter none of whose drafts are accepted."""

  def __init__(self, model, params, prompts, sampler, repeats):
    self._run = lambda drafter: generate(
      model, params, [list(p) for p in prompts], max_new_tokens=_STEPS + 1, sampler=sampler,
      drafter=drafter, stop=None,
    )  # fmt: skip
    self._repeats = repeats

  def step(self, drafter: Drafter | None) -> float:
    self._run(drafter)  # compiles
    stats = [self._run(drafter).stats for _ in range(self._repeats + 2)]
    # Whatever else the machine does only adds to a run: the least is the nearest.
    return min(s.decode_seconds / s.target_passes for s in stats)


_TUNED: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()


def auto(
  lm: Any, prompts: Sequence[Sequence[int]], sampler: Sampler, tick: Tick = lambda text: None
) -> Tuned:
  """What ``drafter="auto"`` means for a model and a batch of this size: measured once a process."""
  known = _TUNED.setdefault(lm, {})
  key = (len(prompts), sampler)
  if key not in known:
    known[key] = tune(lm.model, lm.params, prompts, sampler=sampler, tick=tick)
  return known[key]
