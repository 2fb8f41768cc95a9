# SPDX-License-Identifier: Apache-2.0
"""Ways of drafting without training, task by task, in the manner of Spec-Bench (arXiv 2401.07851).

Command:   python -m experiments.spec_bench.run                (built-in tasks, embedded model)
           python -m experiments.spec_bench.run --model FOLDER --questions question.jsonl
           python -m experiments.spec_bench.run --preset tiny  (minutes; shows that it runs)
Expected:  README.md beside this file.

Mean accepted tokens are those of Spec-Bench: tokens emitted per target pass, the target's own one
included. Plain decoding is our own jitted loop, beside it the share of the machine's memory
bandwidth that its reads of weights and cache amount to.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxdec
from experiments.spec_bench import tasks
from experiments.spec_bench.bandwidth import bytes_of_a_step, memory_bandwidth
from jaxdec import bench
from jaxdec.data import open_source
from jaxdec.report import Column, Table, describe
from jaxdec.report.plots import COLORS, new_figure

RESULTS = Path(__file__).parent / "results"
DRAFTERS = ("prompt_lookup", "token_recycling")
WARM = {"token_recycling"}  # what they have learned from one prompt serves the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """``prompts`` of each kind of task, each of at most ``prompt_tokens`` tokens."""

  prompts: int = 12
  prompt_tokens: int = 384
  new_tokens: int = 128
  repeats: int = 3


PRESETS = {
  "full": Budget(),
  "tiny": Budget(prompts=1, prompt_tokens=256, new_tokens=16, repeats=1),
}
COLUMNS = (
  Column("task", align="left"),
  Column("drafter", align="left"),
  Column("nodes"),
  Column("tokens_per_step", "mean accepted tokens", ".2f"),
  Column("speedup", "speed-up", ".2f"),
  Column("bandwidth", "% of memory bandwidth", ".0f"),
  Column("identical", align="left"),
)


def prompts_of(
  lm: Any, example: tasks.Example, longest: int, new_tokens: int
) -> list[list[int]] | None:
  """Token ids of every turn's prompt, the model's own answers between them; None where too long."""
  text, out = "", []
  for i, turn in enumerate(example.turns):
    text += turn
    ids = lm.tokenizer.encode(text)
    if not ids or len(ids) > longest * (i + 1):
      return None
    out.append(ids)
    if i + 1 < len(example.turns):
      text += lm.generate([ids], max_new_tokens=new_tokens).text[0]
  return out


def one_kind(
  lm: Any, examples: Sequence[tasks.Example], drafters: Sequence[str], budget: Budget
) -> tuple[list[dict], int]:
  """Rows of the bench for one kind of task, and how many prompts they are from."""
  prompts: list[list[int]] = []
  taken = 0
  for example in examples:
    found = prompts_of(lm, example, budget.prompt_tokens, budget.new_tokens)
    if found is not None and taken < budget.prompts:
      prompts += found
      taken += 1
  arms = [bench.Arm(_name(spec), *lm.drafter(spec), warm_start=spec in WARM) for spec in drafters]
  settings = bench.BenchConfig(
    max_new_tokens=budget.new_tokens, temperatures=(0.0,), repeats=budget.repeats
  )
  return bench.run(lm.model, lm.params, arms, prompts, settings), sum(map(len, prompts))


def _name(spec: str) -> str:
  return Path(spec).name


def write(rows: list[dict], budget: Budget, folder: Path, command: str, facts: dict) -> None:
  """table.md, results.json and plot.png."""
  folder.mkdir(parents=True, exist_ok=True)
  notes = [
    f"{budget.prompts} tasks of each kind, at most {budget.new_tokens} new tokens a turn, greedy, "
    "batch 1. Mean accepted tokens: per target pass, the target's own token included.",
    f"Bandwidth: bytes of weights and cache that plain decoding reads, against "
    f"{facts['bandwidth'] / 1e9:.1f} GB/s that a copy reaches here; over 100 % is the cache's.",
  ]
  table = Table(COLUMNS, rows, title="Drafting without training, task by task", notes=notes)
  machine = describe()
  where = (
    f"Machine: {machine['cores']} cores of {machine['cpu']}, {machine['devices']}, jax "
    f"{machine['versions']['jax']}, Python {machine['python']}. Command: `{command}`"
  )
  (folder / "table.md").write_text(table.markdown() + "\n" + where + "\n", encoding="utf-8")
  text = table.json(command=command, machine=machine, budget=dataclasses.asdict(budget), **facts)
  (folder / "results.json").write_text(text, encoding="utf-8")
  plot(rows, folder / "plot.png")


def plot(rows: Sequence[dict], path: Path) -> None:
  """Mean accepted tokens and speed-up, a group of bars a task."""
  kinds = list(dict.fromkeys(row["task"] for row in rows))
  names = list(dict.fromkeys(row["drafter"] for row in rows if row["drafter"] != bench.BASELINE))
  figure, axes = new_figure(2, 12.0, 1.4 + 0.5 * len(kinds))
  height = 0.8 / max(len(names), 1)
  for axis, key, label in zip(
    axes, ("tokens_per_step", "speedup"), ("mean accepted tokens", "speed-up over plain decoding")
  ):
    for j, name in enumerate(names):
      value = {row["task"]: row[key] for row in rows if row["drafter"] == name}
      places = [i + (j - (len(names) - 1) / 2) * height for i in range(len(kinds))]
      color = COLORS[j % len(COLORS)]
      axis.barh(places, [value.get(k, 0.0) for k in kinds], height, color=color, label=name)
    axis.axvline(1.0, color="0.6", linewidth=0.8)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.invert_yaxis()
    axis.set_xlabel(label)
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                ncols=max(len(names), 1), frameon=False, fontsize=8)  # fmt: skip
  figure.savefig(path, format="png")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--preset", choices=PRESETS, default="full")
  parser.add_argument("--model", default=None, help="folder of a model; the embedded one if absent")
  parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS), help="names or folders")
  parser.add_argument("--tasks", nargs="+", default=None, help="kinds of tasks; all if absent")
  parser.add_argument("--questions", type=Path, default=None, help="Spec-Bench's question.jsonl")
  parser.add_argument("--output", type=Path, default=None)
  options = parser.parse_args()
  budget = PRESETS[options.preset]
  lm = jaxdec.tiny() if options.model is None else jaxdec.load(options.model)
  if options.questions is None:
    # More than needed: some are too long.
    found = tasks.choose(open_source("python_stdlib", "test"), 4 * budget.prompts)
  else:
    found = tasks.read_questions(options.questions)
  kinds = list(dict.fromkeys(example.kind for example in found))
  unknown = sorted(set(options.tasks or ()) - set(kinds))
  if unknown:
    parser.error(f"no tasks of kind {unknown[0]!r}; there are {', '.join(kinds)}")
  speed = memory_bandwidth()
  rows = []
  for kind in options.tasks or kinds:
    of_kind, size = one_kind(lm, [e for e in found if e.kind == kind], options.drafters, budget)
    plain = of_kind[0]
    passes = sum(plain["passes_by_prompt"])
    length = size / len(plain["passes_by_prompt"]) + budget.new_tokens / 2
    read = passes * bytes_of_a_step(lm, length) / (plain["seconds"] - plain["prefill_seconds"])
    plain["bandwidth"] = 100 * read / speed
    rows += [{"task": kind, **row} for row in of_kind]
    told = ", ".join(f"{r['drafter']} {r['tokens_per_step']:.2f} ({r['speedup']:.2f}x)"
                     for r in of_kind[1:])  # fmt: skip
    print(f"{kind}: {told}", flush=True)
  command = shlex.join(["python", "-m", "experiments.spec_bench.run", *sys.argv[1:]])
  output = options.output or RESULTS / options.preset
  write(rows, budget, output, command, {"bandwidth": speed})
  print(f"wrote table.md, results.json and plot.png into {output}")
  return 0 if all(row["all_identical"] for row in rows) else 1


if __name__ == "__main__":
  sys.exit(main())
