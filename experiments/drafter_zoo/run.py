# SPDX-License-Identifier: Apache-2.0
"""Every trained drafter on the embedded model: one trainer, one verifier, one data set, one budget.

Command:   python -m experiments.drafter_zoo.run                  (hours on 2 cores; resumable)
           python -m experiments.drafter_zoo.run --preset short   (what results/short holds)
           python -m experiments.drafter_zoo.run --preset tiny    (minutes; shows that it runs)
           python -m experiments.drafter_zoo.run --only eagle hass
Expected:  README.md beside this file.

A drafter that is finished is not trained or measured again; an interrupted run goes on where it
was. Times are taken last, all in one stretch; delete ``runs/drafter_zoo/PRESET/*.times.json`` to
take them again on a quieter machine. Results replace those of the same preset in ``results/``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxdec
from experiments.drafter_zoo import measure, plots
from experiments.drafter_zoo.arms import ARMS, CLAIMS, Arm, Budget
from jaxdec import bench
from jaxdec.data import cut_prompts, open_source
from jaxdec.decoding import executables
from jaxdec.distillation import (
  Corpora,
  Distilled,
  distill,
  load_corpora,
  make_trainer,
  seconds_per_step,
)
from jaxdec.drafting.base import Target
from jaxdec.drafting.checkpoint import CONFIG_FILE, load_drafter
from jaxdec.drafting.probes import ProbeDrafter
from jaxdec.report import Column, Table, describe

RESULTS = Path(__file__).parent / "results"
PRESETS = {
  "full": Budget(steps=3000),
  "short": Budget(steps=200, prompts=24, repeats=2),
  "tiny": Budget(
    steps=4,
    batch_size=2,
    seq_len=64,
    prompts=2,
    new_tokens=16,
    repeats=1,
    eval_batches=1,
    timed_prompts=1,
  ),
}
COLUMNS = (
  Column("drafter", align="left"),
  Column("parameters", "trained parameters", ",d"),
  Column("train_tokens_per_second", "training tokens/s", ",.0f"),
  Column("train_mib", "step memory, MiB", ",.0f"),
  Column("target_rows", "rows of a pass (chain of 5)", "d"),
  Column("tau_sim", "simulated", ".2f"),
  Column("chain5", "chain of 5", align="left"),
  Column("tree16", "tree ≤ 16", align="left"),
  Column("tree64", "tree ≤ 64", align="left"),
  Column("draft_share", "drafting, % of time", ".0f"),
  Column("speedup", "speed-up (chain of 5)", ".2f"),
  Column("identical", "identical", align="left"),
)
ORDER = (
  Column("claim", align="left"), Column("difference", "tokens per step apart", "+.3f"),
  Column("low", "95 % from", "+.3f"), Column("high", "to", "+.3f"), Column("verdict", align="left"),
)  # fmt: skip


def train(lm: Any, arm: Arm, budget: Budget, corpora: Corpora, work_dir: Path) -> Distilled | None:
  """Distills (or resumes) an arm; None where the run was interrupted."""
  job = arm.job(budget, work_dir)
  done = distill(lm.model, lm.params, lm.tokenizer, job, corpora)
  return None if done.drafter is None else done


def draft_share(lm: Any, drafter: Any, params: Any, prompt: Any, budget: Budget) -> float:
  """Per cent of decoding that is the drafter's."""
  out = lm.generate(
    [list(prompt)], max_new_tokens=budget.new_tokens, drafter=drafter, drafter_params=params,
    profile=True, stop=None,
  )  # fmt: skip
  return 100 * out.stats.draft_seconds / (out.stats.draft_seconds + out.stats.verify_seconds)


def shapes(lm: Any, arm: Arm, corpora: Corpora, folder: Path) -> tuple[list[bench.Arm], dict]:
  """A trained arm with each of its trees; its accuracy and the like."""
  target = Target(lm.model, lm.params, None)
  if arm.untrained is not None:
    drafter, params, facts = arm.untrained(lm.config), {}, {"parameters": 0, "accuracy": None}
  else:
    run = folder / (arm.trained_as or arm.name)
    drafter, params = load_drafter(run, target)
    facts = {
      "parameters": sum(x.size for x in jax.tree.leaves(params)),
      "accuracy": json.loads((run / CONFIG_FILE).read_text(encoding="utf-8")).get("accuracy"),
    }
  counts = np.bincount(np.asarray(corpora.train.tokens), minlength=lm.config.vocab_size)
  arms = [
    bench.Arm(name, *arm.after(shaped, params, target, counts))
    for name, shaped in arm.shapes(drafter, facts["accuracy"]).items()
  ]
  return arms, facts


def counted(lm, arm: Arm, budget: Budget, corpora: Corpora, prompts, folder: Path) -> dict | None:
  """Training, and tokens per step with every tree: what does not depend on the clock."""
  began, facts = time.perf_counter(), {}
  if arm.untrained is None:
    done = train(lm, ARMS[arm.trained_as or arm.name], budget, corpora, folder)
    if done is None:
      return None
    facts["tau_sim"] = float(np.asarray(done.result.metrics.get("tokens_per_step", np.nan)))
  arms, known = shapes(lm, arm, corpora, folder)
  settings = bench.BenchConfig(
    max_new_tokens=budget.new_tokens, temperatures=(0.0,), repeats=1, batch_size=8
  )
  return facts | known | {
    "drafter": arm.name,
    "target_rows": target_rows(arms[0].drafter),
    "rows": bench.run(lm.model, lm.params, arms, prompts, settings),
    "seconds": time.perf_counter() - began,
  }  # fmt: skip


def timed(lm, arm: Arm, budget: Budget, corpora: Corpora, prompts, folder: Path) -> dict:
  """Training step and decoding with the first tree, on a machine that does nothing else."""
  facts = {}
  if arm.untrained is None:
    job = ARMS[arm.trained_as or arm.name].job(budget, folder)
    job = dataclasses.replace(job, trainer=dataclasses.replace(job.trainer, work_dir=None))
    seconds = seconds_per_step(lm.model, lm.params, corpora, job)
    facts["train_tokens_per_second"] = budget.batch_size * budget.seq_len / seconds
    trainer, _ = make_trainer(lm.model, lm.params, corpora, job)
    memory = trainer.lower(_batch_shapes(budget)).compile().memory_analysis()
    facts["train_mib"] = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
  first = shapes(lm, arm, corpora, folder)[0][0]
  settings = bench.BenchConfig(
    max_new_tokens=budget.new_tokens, temperatures=(0.0,), repeats=budget.repeats
  )
  some = prompts[: budget.timed_prompts]
  rows = bench.run(lm.model, lm.params, [first], some, settings)
  share = draft_share(lm, first.drafter, first.params, prompts[0], budget)
  return facts | {"draft_share": share, "speedup": rows[-1]["speedup"], "timed_with": first.name}


def _batch_shapes(budget: Budget) -> dict[str, jax.ShapeDtypeStruct]:
  kinds = {"tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_mask": bool}
  shape = (budget.batch_size, budget.seq_len)
  return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}


def target_rows(drafter: Any) -> int:
  """Rows of a verify pass: the nodes, and the probes that ride along behind each."""
  riding = drafter.num_heads * drafter.members if isinstance(drafter, ProbeDrafter) else 0
  return drafter.num_nodes * (1 + riding)


def kept(path: Path, make: Callable[[], dict | None]) -> dict | None:
  """What ``path`` holds, or what ``make`` returns, which is then kept there."""
  if path.is_file():
    return json.loads(path.read_text(encoding="utf-8"))
  facts = make()
  if facts is not None:
    path.with_suffix(".tmp").write_text(
      json.dumps(facts, indent=1, default=float), encoding="utf-8"
    )
    path.with_suffix(".tmp").replace(path)
    facts = json.loads(path.read_text(encoding="utf-8"))
  # Programs of drafters that nothing will run again: a process can hold only so many.
  executables.clear()
  jax.clear_caches()
  return facts


def flat(result: dict) -> dict[str, Any]:
  """The table's row of an arm."""
  row = {k: v for k, v in result.items() if k not in ("rows", "accuracy")}
  by_name = {r["drafter"]: r for r in result["rows"]}
  for name in ("chain5", "tree16", "tree64"):
    if name in by_name:
      value, low, high = measure.tokens_per_step(by_name[name])
      row[name] = f"{value:.2f} [{low:.2f}, {high:.2f}]"
      row[f"{name}_nodes"] = by_name[name]["nodes"]
  row["identical"] = "all" if all(r["all_identical"] for r in result["rows"]) else "NO"
  return row


def write(results: list[dict], budget: Budget, folder: Path, command: str) -> None:
  """table.md, results.json and two plots."""
  folder.mkdir(parents=True, exist_ok=True)
  rows = sorted(map(flat, results), key=lambda row: -_value(row, "tree16"))
  machine = describe()
  notes = [
    f"{budget.steps} steps of {budget.batch_size} x {budget.seq_len} tokens each; "
    f"{budget.prompts} prompts of test-split files, {budget.new_tokens} new tokens, greedy.",
    "Tokens per step, 95 % bootstrap intervals over prompts. Step memory: temporaries and outputs "
    "of the compiled training step. Speed-up: against plain decoding, in turn, on "
    f"{budget.timed_prompts} of the prompts, one at a time.",
  ]
  table = Table(COLUMNS, rows, title="Drafters under one budget", notes=notes)
  claims = []
  for tree in ("chain5", "tree16", "tree64"):
    named = {
      r["drafter"]: row for r in results for row in r["rows"] if row["drafter"] == tree
    }  # fmt: skip
    claims += [row | {"claim": f"{row['claim']} ({tree})"} for row in measure.order(named, CLAIMS)]
  ordered = Table(ORDER, claims, title="Order")
  where = (
    f"Machine: {machine['cores']} cores of {machine['cpu']}, {machine['devices']}, jax "
    f"{machine['versions']['jax']}, Python {machine['python']}. Command: `{command}`"
  )
  text = "\n".join([table.markdown(), ordered.markdown(), where])
  (folder / "table.md").write_text(text + "\n", encoding="utf-8")
  budget_facts = dataclasses.asdict(budget)
  data = table.json(command=command, machine=machine, budget=budget_facts, claims=claims,
                    accuracy={r["drafter"]: r["accuracy"] for r in results},
                    counts={r["drafter"]: r["rows"] for r in results})  # fmt: skip
  (folder / "results.json").write_text(data, encoding="utf-8")
  plots.intervals(results, folder / "tokens_per_step.png")
  plots.cost(rows, folder / "cost.png")


def _value(row: dict, key: str) -> float:
  return float(str(row.get(key, row.get("chain5", "0"))).split()[0])


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--preset", choices=PRESETS, default="full")
  parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
  parser.add_argument("--work-dir", type=Path, default=Path("runs/drafter_zoo"))
  parser.add_argument("--counts-only", action="store_true", help="take no times")
  parser.add_argument("--output", type=Path, default=None)
  options = parser.parse_args()
  budget, folder = PRESETS[options.preset], options.work_dir / options.preset
  folder.mkdir(parents=True, exist_ok=True)
  # Measuring a step's memory and training it compile the same program once.
  jax.config.update("jax_compilation_cache_dir", str((options.work_dir / "compiled").resolve()))
  lm = jaxdec.tiny()
  corpora = load_corpora("python_stdlib", lm.tokenizer)
  cut = cut_prompts(
    open_source("python_stdlib", "test"), lm.tokenizer, budget.prompts,
    min_tokens=budget.prompt_tokens, max_tokens=budget.prompt_tokens,
  )  # fmt: skip
  prompts = [prompt.tokens for prompt in cut]
  shared = (budget, corpora, prompts, folder)
  results = []
  for name in options.only:
    arm = ARMS[name]
    result = kept(folder / f"{name}.json", lambda arm=arm: counted(lm, arm, *shared))
    if result is None:
      return 130
    results.append(result)
    row = flat(result)
    told = [f"{tree} {row[tree]}" for tree in ("chain5", "tree16", "tree64") if tree in row]
    print(f"{name}: {', '.join(told)} in {result['seconds']:.0f} s", flush=True)
  for result in (
    results if not options.counts_only else ()
  ):  # after all the rest: side by side, in one stretch
    name, arm = result["drafter"], ARMS[result["drafter"]]
    result |= kept(folder / f"{name}.times.json", lambda arm=arm: timed(lm, arm, *shared))
    print(f"{name}: {result['speedup']:.2f} x plain decoding", flush=True)
  output = options.output or RESULTS / options.preset
  write(results, budget, output, shlex.join(["python", "-m", "experiments.drafter_zoo.run",
                                             *sys.argv[1:]]))  # fmt: skip
  print(f"wrote table.md, results.json and two plots into {output}")
  return 0 if all(flat(r)["identical"] == "all" for r in results) else 1


if __name__ == "__main__":
  sys.exit(main())
