# SPDX-License-Identifier: Apache-2.0
"""The measuring stick: same target, same prompts, same compiled baseline, arms side by side.

Every arm first decodes all prompts once, which compiles and warms it and yields the counts (they
don't depend on time). Then the arms take turns on each prompt, in an order that rotates from pass
to pass, so that a machine that slows down slows all of them; medians over the passes are reported.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxdec.decoding import Generation, Sampler, generate
from jaxdec.drafting.base import Drafter
from jaxdec.errors import UserError
from jaxdec.report import Column, Table, describe
from jaxdec.report.plots import benchmark as plot

BASELINE = "autoregressive"


def _percent(accepted: Sequence[float]) -> str:
  """The first five depths in per cent, to fit a table into 80 columns."""
  return " ".join(f"{100 * share:.0f}" for share in accepted[:5]) or "–"


COLUMNS = (
  Column("drafter", align="left", terminal="drafter"),
  Column("temperature", "T", "g", terminal="T"),
  Column("nodes", terminal=""),
  Column("tokens_per_step", "tokens/step", ".2f", terminal="tokens\nper step"),
  Column(
    "accepted_by_depth", "accepted by depth", ".2f", align="left",
    terminal="accepted\nby depth, %", shorten=_percent,
  ),
  Column("target_passes", "target passes", ",d", terminal="target\npasses"),
  Column("tokens_per_second", "tokens/s", ",.0f", terminal="tokens\nper s"),
  Column("speedup", "speed-up", ".2f", terminal="speed-\nup"),
  Column("identical", "identical to autoregressive", align="left", terminal="identical"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to decode. ``drafter=None`` is plain decoding.

  ``warm_start`` hands what the drafter has learned from one prompt to the next (Token Recycling's
  table is meant to live on); the timed passes replay the same states.
  """

  name: str
  drafter: Drafter | None = None
  params: Any = None
  warm_start: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What is decoded, and how often.

  Attributes:
    temperatures: one block of rows each; the other fields of ``sampler`` stay.
    repeats: timed passes per arm.
    batch_size: prompts decoded together.
    seed: prompt i draws from seed + i, whatever the batch.
  """

  max_new_tokens: int = 128
  temperatures: tuple[float, ...] = (0.0, 1.0)
  sampler: Sampler = Sampler()  # noqa: RUF009 (frozen)
  repeats: int = 3
  batch_size: int = 1
  seed: int = 0


def run(
  model: Any,
  params: Any,
  arms: Sequence[Arm],
  prompts: Sequence[Sequence[int]],
  config: BenchConfig = BenchConfig(),
  *,
  tick: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
  """Rows of the table, arms in order within each temperature; plain decoding is put first.

  Args:
    model, params: the target, in the layout that ``generate`` takes.
    prompts: token ids.
    tick: told what is being done.

  Raises:
    UserError: no prompt, or two arms of one name.
  """
  arms = [Arm(BASELINE), *(arm for arm in arms if arm.name != BASELINE)]
  names = [arm.name for arm in arms]
  if len(set(names)) < len(names):
    raise UserError(f"every arm needs a name of its own, got {', '.join(names)}")
  if not prompts:
    raise UserError("nothing to decode; give at least one prompt")
  rows = []
  for temperature in config.temperatures:
    sampler = dataclasses.replace(config.sampler, temperature=float(temperature))
    rows += _block(model, params, arms, prompts, sampler, config, tick)
  return rows


def _block(model, params, arms, prompts, sampler, config, tick):
  batches = [
    range(i, min(i + config.batch_size, len(prompts)))
    for i in range(0, len(prompts), config.batch_size)
  ]

  def decode(arm: Arm, batch: range, state: Any) -> Generation:
    return generate(
      model, params, [list(prompts[i]) for i in batch], max_new_tokens=config.max_new_tokens,
      sampler=sampler, drafter=arm.drafter, drafter_params=arm.params, drafter_state=state,
      seed=[config.seed + i for i in batch],
    )  # fmt: skip

  first: list[list[Generation]] = []
  states: list[list[Any]] = []
  for arm in arms:
    tick(f"{arm.name}, temperature {sampler.temperature:g}")
    state, seen, generations = None, [], []
    for batch in batches:
      seen.append(state)
      generation = decode(arm, batch, state)
      if arm.warm_start and len(batch) == config.batch_size:
        state = generation.drafter_state
      generations.append(generation)
    first.append(generations)
    states.append(seen)

  seconds = [[[] for _ in batches] for _ in arms]
  prefill = [[[] for _ in batches] for _ in arms]
  tick(f"timing, temperature {sampler.temperature:g}")
  for turn in range(config.repeats):
    for b, batch in enumerate(batches):
      for shift in range(len(arms)):
        a = (shift + turn + b) % len(arms)
        stats = decode(arms[a], batch, states[a][b]).stats
        seconds[a][b].append(stats.prefill_seconds + stats.decode_seconds)
        prefill[a][b].append(stats.prefill_seconds)

  reference = [tokens for generation in first[0] for tokens in generation.tokens]
  rows = []
  for a, arm in enumerate(arms):
    total = sum(statistics.median(times) for times in seconds[a])
    row = {"drafter": arm.name, "temperature": sampler.temperature}
    row |= _counts(arm, first[a], reference)
    row["seconds"] = total
    row["prefill_seconds"] = sum(statistics.median(times) for times in prefill[a])
    row["tokens_per_second"] = row["new_tokens"] / total
    row["speedup"] = rows[0]["seconds"] / total if rows else 1.0
    row["speedup_by_pass"] = [
      sum(times[turn] for times in seconds[0]) / sum(times[turn] for times in seconds[a])
      for turn in range(config.repeats)
    ]
    rows.append(row)
  return rows


def _counts(arm: Arm, generations: list[Generation], reference: list[list[int]]) -> dict[str, Any]:
  """What the arm did, time apart. Means are over verify passes of live rows, all prompts pooled."""
  tokens = [t for generation in generations for t in generation.tokens]
  weights = [sum(generation.stats.row_steps) for generation in generations]
  live = max(sum(weights), 1)
  depth = max(len(generation.stats.accepted_by_depth) for generation in generations)
  accepted = [
    sum(w * g.stats.accepted_by_depth[d] for w, g in zip(weights, generations)) / live
    for d in range(depth)
  ]
  same = sum(a == b for a, b in zip(tokens, reference, strict=True))
  return {
    "nodes": 1 if arm.drafter is None else arm.drafter.num_nodes,
    "tokens_per_step": 1.0 + sum(accepted),
    "accepted_by_depth": accepted,
    "passes_by_prompt": [n for generation in generations for n in generation.stats.row_steps],
    "tokens_by_prompt": [len(row) for row in tokens],
    "target_passes": sum(generation.stats.target_passes for generation in generations),
    "new_tokens": sum(map(len, tokens)),
    "compile_seconds": sum(generation.stats.compile_seconds for generation in generations),
    "identical": f"{same} of {len(reference)}",
    "all_identical": same == len(reference),
  }


def table(rows: Sequence[dict[str, Any]], *, title: str = "", notes: Sequence[str] = ()) -> Table:
  """The rows as the one table everything prints."""
  return Table(COLUMNS, rows, title=title, notes=notes)


def write(
  rows: Sequence[dict[str, Any]],
  folder: str | Path,
  *,
  title: str = "",
  command: str = "",
  notes: Sequence[str] = (),
  **extra: Any,
) -> None:
  """Writes ``table.md``, ``results.json`` and ``plot.png`` into an existing folder.

  Take the folder from ``jaxdec.report.numbered``: files of these names are replaced.
  """
  folder = Path(folder)
  result = table(rows, title=title, notes=notes)
  machine = describe()
  where = (
    f"{machine['cores']} cores of {machine['cpu']}, {machine['devices']}, "
    f"jax {machine['versions']['jax']}, Python {machine['python']}"
  )
  lines = [result.markdown(), f"Machine: {where}.", ""]
  if command:
    lines.append(f"Command: `{command}`")
  (folder / "table.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
  text = result.json(command=command, machine=machine, **extra)
  (folder / "results.json").write_text(text, encoding="utf-8")
  plot(rows, folder / "plot.png", title=title)
