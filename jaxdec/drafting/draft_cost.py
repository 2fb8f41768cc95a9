# SPDX-License-Identifier: Apache-2.0
"""How many tokens to draft, by measured costs: fixed lengths against stopping thresholds.

A round of n drafts costs ``n c_draft + c_verify(n + 1)`` seconds and yields ``1 + a`` tokens, a of
the drafts accepted. What would have been accepted is recorded once, at every position of texts of
the target; any policy is then replayed over them as decoding would go: round after round, from the
position where the round before it ended. For greedy decoding, and for draws keyed by position, that
is exactly what decoding does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.base import Context, Params, Prompt, Target
from jaxdec.drafting.tree import chain


@dataclasses.dataclass(frozen=True)
class Costs:
  """Seconds of one draft pass, and of verifying trees of some sizes (``(nodes, seconds)``).

  A tree is padded to the next size there is: one size means that a round costs the same verify pass
  however early drafting stopped.
  """

  draft: float
  verify: tuple[tuple[int, float], ...]

  def round(self, drafts: Int[np.ndarray, "*B"]) -> Float[np.ndarray, "*B"]:
    """Seconds of rounds of so many drafts."""
    sizes, seconds = (np.asarray(x) for x in zip(*sorted(self.verify)))
    at = np.searchsorted(sizes, np.asarray(drafts) + 1)
    return np.asarray(drafts) * self.draft + seconds[np.minimum(at, len(sizes) - 1)]


@dataclasses.dataclass(frozen=True)
class Rounds:
  """What a drafter would have done at every position of N texts.

  Attributes:
    accepted: whether draft i is what the target says, given that those before are.
    chances: the drafter's ``c_i``.
  """

  accepted: Bool[np.ndarray, "N T G"]
  chances: Float[np.ndarray, "N T G"]


def drafts_made(
  chances: Float[np.ndarray, "*B G"], threshold: float, most: int | None = None
) -> Int[np.ndarray, "*B"]:
  """Drafts of a round under SpecDec++'s rule: at least two, at most ``most`` (G)."""
  most = chances.shape[-1] if most is None else most
  survival = np.cumprod(chances, axis=-1)
  return np.minimum(2 + np.sum(1 - survival[..., :-1] <= threshold, axis=-1), most)


def replay(rounds: Rounds, drafts: Int[np.ndarray, "N T"], costs: Costs) -> float:
  """Tokens per second of a policy that makes ``drafts[n, t]`` drafts at position t of text n."""
  run = np.cumprod(rounds.accepted, axis=-1).sum(-1)
  accepted = np.minimum(run, drafts)
  seconds = costs.round(drafts)
  tokens = total = 0.0
  for text, cost in zip(accepted, seconds):
    t = 0
    while t < len(text):
      tokens += 1 + text[t]
      total += cost[t]
      t += 1 + int(text[t])
  return tokens / total


def best_fixed(rounds: Rounds, costs: Costs) -> tuple[int, float]:
  """The best constant number of drafts, and its tokens per second."""
  shape = rounds.accepted.shape
  speeds = {k: replay(rounds, np.full(shape[:2], k), costs) for k in range(1, shape[2] + 1)}
  best = max(speeds, key=speeds.get)
  return best, speeds[best]


def best_threshold(
  rounds: Rounds,
  costs: Costs,
  grid: Sequence[float] = tuple(np.linspace(0, 1, 21).tolist()),
  lengths: Sequence[int] | None = None,
) -> tuple[float, int, float]:
  """The best threshold of a grid with its most drafts, and its tokens per second.

  ``lengths``: bounds tried, None: 1 to G. Where a draft pass costs a third of the target's the
  best bound may be 1: the rule makes two drafts before the head has a say, and so loses even with
  an oracle for a head.
  """
  most = range(1, rounds.accepted.shape[2] + 1) if lengths is None else lengths
  speeds = {
    (h, g): replay(rounds, drafts_made(rounds.chances, h, g), costs) for g in most for h in grid
  }
  best = max(speeds, key=speeds.get)
  return *best, speeds[best]


def record_rounds(
  drafter: Any,
  params: Params,
  texts: Int[np.ndarray, "N T"],
  start: int,
  *,
  sampler: Any,
  keys: Any = None,
  rows: int = 32,
) -> Rounds:
  """Lets a ``SpecDec`` draft whole rounds from every position of texts the target wrote.

  Args:
    start: prompt length; the roots are the tokens from there on that have G successors.
    sampler, keys: what the texts were drawn with (``request_keys``, one a text), so that
      ``draws="shared"`` sees the noise that decoding would.
    rows: positions drafted from at once.
  """
  drafter = dataclasses.replace(drafter, threshold=1.0, widths=())
  most, (count, length) = drafter.num_drafts, texts.shape
  roots = np.arange(start, length - most)
  padded = np.pad(texts, ((0, 0), (0, 64 + most)))
  capacity = -(-padded.shape[1] // 64) * 64

  @jax.jit
  def run(params, history, lengths, keys):
    index = jnp.arange(lengths.shape[0])
    root = history[index, lengths]
    state = drafter.init_state(lengths.shape[0], capacity)
    prompt = Prompt(history, lengths, root)
    state = drafter.start(params, state, prompt, None, Target(None, None, None))
    context = Context(
      root=root, length=lengths, history=history, target=None, sampler=sampler, keys=keys
    )
    tree, chances, _ = drafter.draft(params, state, context)
    following = history[index[:, None], lengths[:, None] + 1 + jnp.arange(most)]
    return (tree.tokens[:, 1:] == following) & tree.valid[:, 1:], chances

  accepted = np.zeros((count, len(roots), most), bool)
  chances = np.zeros((count, len(roots), most), np.float32)
  for n in range(count):
    history = jnp.asarray(np.broadcast_to(padded[n], (rows, padded.shape[1])))
    row_keys = None if keys is None else jnp.stack([keys[n]] * rows)
    for at in range(0, len(roots), rows):
      lengths = np.resize(roots[at : at + rows], rows).astype(np.int32)
      found = jax.device_get(run(params, history, jnp.asarray(lengths), row_keys))
      some = len(roots[at : at + rows])
      accepted[n, at : at + some], chances[n, at : at + some] = (x[:some] for x in found)
  return Rounds(accepted, chances)


def measure_costs(
  drafter: Any,
  params: Params,
  target: Target,
  sizes: Sequence[int],
  *,
  batch: int = 1,
  length: int = 128,
  repeats: int = 30,
) -> Costs:
  """Median wall time of one draft pass (its head and draw included) and of verifying each size."""
  tokens = jnp.zeros((batch, 1), jnp.int32)
  lengths = jnp.full(batch, length, jnp.int32)
  capacity = length + max(sizes) + 64

  def filled(model):
    state = model.init_state(batch, capacity)
    return state.replace(layers=tuple(x.replace(length=lengths) for x in state.layers))

  def median(function, *args):
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
      begin = time.perf_counter()
      jax.block_until_ready(function(*args))
      times.append(time.perf_counter() - begin)
    return float(np.median(times))

  def draft(params, state):
    out = drafter._extend(params["model"], tokens, state, lengths[:, None])
    return jnp.argmax(out.logits[:, 0], axis=-1), drafter.chance(params, out.hidden[:, 0])

  def verify(params, state, drafts: Int[Array, "B G"]):
    tree = chain(tokens[:, 0], drafts)
    return target.model.apply(
      {"params": params}, tree.tokens, state, tree.topology, method="verify"
    ).logits

  state = filled(target.model)
  return Costs(
    median(draft, params, filled(drafter.model)),
    tuple(
      (m, median(verify, target.params, state, jnp.zeros((batch, m - 1), jnp.int32))) for m in sizes
    ),
  )
