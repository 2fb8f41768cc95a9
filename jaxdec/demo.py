# SPDX-License-Identifier: Apache-2.0
"""The whole story on one machine: distill draft heads for the embedded model, decode with them.

Medusa and Hydra heads are trained live, with the same number of steps, as many as the time allows;
EAGLE-3 comes trained with the package. Then every drafter decodes the same prompts, cut from files
that neither the model nor the heads were trained on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

import jaxdec
from jaxdec import bench
from jaxdec.data import cut_prompts, open_source
from jaxdec.distillation import (
  Corpora,
  DistillConfig,
  Distilled,
  distill,
  load_corpora,
  seconds_per_step,
)
from jaxdec.drafting import PromptLookup, Target, TokenRecycling
from jaxdec.drafting.checkpoint import load_drafter
from jaxdec.report import numbered
from jaxdec.training import OptimizerConfig, TrainerConfig

TRAINED_HERE = ("medusa", "hydra")
# Trees are small because a CPU pays for their nodes: 6 cost about twice one token, 16 four times.
NODES = 6
PROMPT_TOKENS = 64
# Share of the time that decoding needs on two cores (compiling included).
DECODING = 0.4
MAX_STEPS = 2000
_DRAFTERS = Path(jaxdec.__file__).parent / "assets" / "tiny_python" / "drafters"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
  """See ``jaxdec demo --help``; ``steps`` replaces what the time would allow."""

  output: str = "demo_results"
  minutes: float = 7.0
  prompts: int = 8
  max_new_tokens: int = 128
  repeats: int = 3
  seed: int = 0
  steps: int | None = None


def run(config: DemoConfig, console: Any, *, command: str = "jaxdec demo") -> int:
  """Everything; returns 0 if every output was identical to plain decoding, else 1."""
  begin = time.perf_counter()
  folder = numbered(config.output)
  lm = jaxdec.tiny()
  size = sum(leaf.size for leaf in jax.tree.leaves(lm.params)) / 1e6
  device = jax.devices()[0].device_kind
  console.print(
    f"model: the embedded {size:.1f}M-parameter decoder of Python, float32, on {device}"
  )

  corpora = load_corpora("python_stdlib", lm.tokenizer)
  jobs = {name: _job(name, folder, config, steps=1) for name in TRAINED_HERE}
  steps, note = config.steps, ""
  if steps is None:
    with console.status("measuring a training step"):
      pace = sum(seconds_per_step(lm.model, lm.params, corpora, job) for job in jobs.values())
    left = 60 * config.minutes * (1 - DECODING) - (time.perf_counter() - begin)
    steps = max(20, min(MAX_STEPS, int(left / pace)))
    note = f", {pace:.2f} s for a step of both"
  console.print(f"training {' and '.join(TRAINED_HERE)} heads, {steps} steps each{note}")
  arms = [
    bench.Arm("prompt_lookup", PromptLookup()),
    bench.Arm("token_recycling", TokenRecycling(size=NODES), warm_start=True),
  ]
  training = {}
  for name in TRAINED_HERE:
    done = _train(lm, corpora, _job(name, folder, config, steps), console)
    if done.drafter is None:
      console.print("interrupted; nothing was decoded")
      return 130
    training[name] = {"steps": steps, "seconds": done.seconds, "held_out": done.result.metrics}
    arms.append(bench.Arm(name, done.drafter, done.params))
    console.print(
      f"  {name}: {done.result.metrics['tokens_per_step']:.2f} tokens per step expected of a chain "
      f"on held-out files; {done.seconds:.0f} s"
    )
  if (_DRAFTERS / "eagle3").is_dir():
    arms.append(bench.Arm("eagle3", *load_drafter(_DRAFTERS / "eagle3", _target(lm))))
  else:
    console.print("  eagle3: not in this installation, left out")

  prompts = cut_prompts(
    open_source("python_stdlib", "test"), lm.tokenizer, config.prompts,
    min_tokens=PROMPT_TOKENS, max_tokens=PROMPT_TOKENS,
  )  # fmt: skip
  settings = bench.BenchConfig(
    max_new_tokens=config.max_new_tokens, repeats=config.repeats, seed=config.seed
  )
  tokens = [prompt.tokens for prompt in prompts]
  with console.status("decoding") as status:
    rows = bench.run(lm.model, lm.params, arms, tokens, settings, tick=status.update)
  minutes = (time.perf_counter() - begin) / 60
  title = f"{len(prompts)} prompts of test-split files, {config.max_new_tokens} new tokens each"
  notes = [
    f"medusa and hydra: {steps} training steps each, on this machine; trees of {NODES} nodes.",
    "tokens/s and speed-up: medians, compilation apart, float32, batch 1.",
  ]
  bench.write(
    rows, folder, title=title, command=command, notes=notes, training=training,
    config=dataclasses.asdict(config), minutes=minutes,
    prompts=[{"path": p.path, "line": p.line} for p in prompts],
  )  # fmt: skip
  console.print(bench.table(rows, title=title).rich())
  best = max(rows, key=lambda row: row["speedup"])
  law = "greedy" if best["temperature"] == 0 else f"at temperature {best['temperature']:g}"
  same = all(row["all_identical"] for row in rows)
  console.print(
    f"fastest: {best['drafter']} {law}, {best['speedup']:.2f} times plain decoding; "
    + ("every output is identical to it" if same else "SOME OUTPUTS DIFFER FROM IT")
  )
  console.print(f"wrote table.md, results.json, plot.png into {folder} ({minutes:.1f} minutes)")
  return 0 if same else 1


def _target(lm: Any) -> Target:
  return Target(lm.model, lm.params, None)


def _job(name: str, folder: Path, config: DemoConfig, steps: int) -> DistillConfig:
  """Both heads share the target's LM head: on a model this small, a head of its own for each depth
  would cost more than the layers it saves."""
  return DistillConfig(
    drafter=name,
    options={"share_head": True, "num_heads": 4, "objective": "soft", "loss_fraction": 0.5},
    batch_size=8,
    seq_len=256,
    num_nodes=NODES,
    eval_batches=4,
    trainer=TrainerConfig(
      work_dir=str(folder / name), steps=steps, seed=config.seed, checkpoint_every=10_000,
      log_every=max(1, steps // 10), progress=False,
      optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20, weight_decay=0.0),
    ),
  )  # fmt: skip


def _train(lm: Any, corpora: Corpora, job: DistillConfig, console: Any) -> Distilled:
  """Trains with a progress bar that reads the run's own metrics file."""
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

  columns = (
    TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    TextColumn("{task.fields[note]}"),
  )  # fmt: skip
  metrics = Path(job.trainer.work_dir) / "metrics.jsonl"
  with Progress(
    *columns, console=console, transient=True, disable=not console.is_terminal
  ) as progress:
    bar = progress.add_task(job.drafter, total=job.trainer.steps, note="")

    def watch() -> None:
      progress.update(bar, advance=1, note=_latest(metrics))

    return distill(lm.model, lm.params, lm.tokenizer, job, corpora, watch=watch)


def _latest(metrics: Path) -> str:
  """What the last complete line of a metrics file says of the drafts."""
  try:
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    return f"{last['tokens_per_step']:.2f} tokens per step"
  except (OSError, IndexError, ValueError, KeyError):
    return ""
