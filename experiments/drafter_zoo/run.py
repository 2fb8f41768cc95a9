# SPDX-License-Identifier: Apache-2.0
"""Every trained drafter on the embedded model: one trainer, one verifier, one data set, one budget.

Command:   python -m experiments.drafter_zoo.run                  (hours on 2 cores; resumable)
           python -m experiments.drafter_zoo.run --preset short   (what results/short holds)
           python -m experiments.drafter_zoo.run --preset tiny    (minutes; shows that it runs)
           python -m experiments.drafter_zoo.run --only eagle hass
Expected:  README.md beside this file.

A drafter that is finished is not trained or measured again; an interrupted run goes on where it
was. Results replace those of the same preset in ``results/``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxdec
from experiments.drafter_zoo import measure, plots
from experiments.drafter_zoo.arms import ARMS, CLAIMS, Arm, Budget
from jaxdec import bench
from jaxdec.data import cut_prompts, open_source
from jaxdec.distillation import Corpora, Distilled, distill, load_corpora, make_trainer
from jaxdec.drafting.base import Target
from jaxdec.drafting.checkpoint import CONFIG_FILE, load_drafter
from jaxdec.report import Column, Table, describe

RESULTS = Path(__file__).parent / "results"
PRESETS = {
  "full": Budget(steps=3000),
  "short": Budget(steps=200, prompts=24, repeats=2),
  "tiny": Budget(
    steps=4, batch_size=2, seq_len=64, prompts=2, new_tokens=16, repeats=1, eval_batches=1
  ),
}
COLUMNS = (
  Column("drafter", align="left"),
  Column("parameters", "trained parameters", ",d"),
  Column("train_tokens_per_second", "training tokens/s", ",.0f"),
  Column("train_mib", "step memory, MiB", ",.0f"),
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


def training_facts(lm: Any, arm: Arm, budget: Budget, corpora: Corpora, work_dir: Path) -> dict:
  """Memory of a training step, from its compiled program (which the run then finds compiled)."""
  trainer, _ = make_trainer(lm.model, lm.params, corpora, arm.job(budget, work_dir))
  shape = (budget.batch_size, budget.seq_len)
  kinds = {"tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "loss_mask": bool}
  batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
  memory = trainer.lower(batch).compile().memory_analysis()
  return {
    "parameters": sum(x.size for x in jax.tree.leaves(trainer.abstract.params)),
    "train_mib": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20,
  }


def draft_share(lm: Any, drafter: Any, params: Any, prompt: Any, budget: Budget) -> float:
  """Per cent of decoding that is the drafter's."""
  out = lm.generate(
    [list(prompt)], max_new_tokens=budget.new_tokens, drafter=drafter, drafter_params=params,
    profile=True, stop=None,
  )  # fmt: skip
  return 100 * out.stats.draft_seconds / (out.stats.draft_seconds + out.stats.verify_seconds)


def one(lm: Any, arm: Arm, budget: Budget, corpora: Corpora, prompts, folder: Path) -> dict | None:
  """Everything about one arm, from ``folder/arm.json`` where that is there."""
  kept = folder / f"{arm.name}.json"
  if kept.is_file():
    return json.loads(kept.read_text(encoding="utf-8"))
  began, accuracy, params = time.perf_counter(), None, {}
  if arm.untrained is not None:
    drafter, facts = arm.untrained(lm.config), {"parameters": 0}
  else:
    source = ARMS[arm.trained_as or arm.name]
    facts = training_facts(lm, source, budget, corpora, folder)
    done = train(lm, source, budget, corpora, folder)
    if done is None:
      return None
    run = Path(source.job(budget, folder).trainer.work_dir)
    accuracy = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8")).get("accuracy")
    drafter, params = load_drafter(run, Target(lm.model, lm.params, None))
    facts["tau_sim"] = float(np.asarray(done.result.metrics.get("tokens_per_step", np.nan)))
    facts["train_tokens_per_second"] = speed(run)
  counts = np.bincount(np.asarray(corpora.train.tokens), minlength=lm.config.vocab_size)
  target = Target(lm.model, lm.params, None)
  arms = [
    bench.Arm(name, *arm.after(shaped, params, target, counts))
    for name, shaped in arm.shapes(drafter, accuracy).items()
  ]
  settings = bench.BenchConfig(
    max_new_tokens=budget.new_tokens, temperatures=(0.0,), repeats=budget.repeats
  )
  facts |= {
    "drafter": arm.name,
    "accuracy": accuracy,
    "draft_share": draft_share(lm, arms[0].drafter, arms[0].params, prompts[0], budget),
    "rows": bench.run(lm.model, lm.params, arms, prompts, settings),
    "seconds": time.perf_counter() - began,
  }
  text = json.dumps(facts, indent=1, default=float)
  kept.with_suffix(".tmp").write_text(text, encoding="utf-8")
  kept.with_suffix(".tmp").replace(kept)
  return json.loads(text)


def speed(run: Path) -> float:
  """Median tokens/s of the run's reports, the first apart."""
  lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  seen = [row["tokens_per_second"] for row in map(json.loads, lines) if "tokens_per_second" in row]
  return float(np.median(seen[1:] or seen or [np.nan]))


def flat(result: dict) -> dict[str, Any]:
  """The table's row of an arm."""
  row = {k: v for k, v in result.items() if k not in ("rows", "accuracy")}
  by_name = {r["drafter"]: r for r in result["rows"]}
  for name in ("chain5", "tree16", "tree64"):
    if name in by_name:
      value, low, high = measure.tokens_per_step(by_name[name])
      row[name] = f"{value:.2f} [{low:.2f}, {high:.2f}]"
      row[f"{name}_nodes"] = by_name[name]["nodes"]
  row["speedup"] = by_name[next(n for n in by_name if n != bench.BASELINE)]["speedup"]
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
    "of the compiled training step. Speed-up: against plain decoding, in turn.",
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
  results = []
  for name in options.only:
    result = one(lm, ARMS[name], budget, corpora, prompts, folder)
    if result is None:
      return 130
    results.append(result)
    jax.clear_caches()  # three trees of each drafter: programs nothing will run again
    row = flat(result)
    told = [f"{tree} {row[tree]}" for tree in ("chain5", "tree16", "tree64") if tree in row]
    print(f"{name}: {', '.join(told)} in {result['seconds']:.0f} s", flush=True)
  output = options.output or RESULTS / options.preset
  write(results, budget, output, shlex.join(["python", "-m", "experiments.drafter_zoo.run",
                                             *sys.argv[1:]]))  # fmt: skip
  print(f"wrote table.md, results.json and two plots into {output}")
  return 0 if all(flat(r)["identical"] == "all" for r in results) else 1


if __name__ == "__main__":
  sys.exit(main())
