# SPDX-License-Identifier: Apache-2.0
"""Every drafter on the embedded model, side by side: the committed table.

Command:   python experiments/bench/run.py                (about a quarter of an hour on 2 cores)
           python experiments/bench/run.py --preset tiny  (a few minutes; shows that it runs)
Expected:  every output identical to plain decoding, greedy and at temperature 1; the best drafter
           at least 1.6 times as fast as our own autoregressive loop; Hydra at least 10 % more
           tokens per step than Medusa with the same training budget and trees of at most 16 nodes.

Heads are trained into ``--work-dir`` (a run that is there is reused, an interrupted one goes on);
EAGLE-3 is the one that comes with the package. Prompts are cut from test-split files. Results
replace those in ``experiments/bench/results/drafters``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

import jaxdec
from jaxdec import bench
from jaxdec.data import cut_prompts, open_source
from jaxdec.distillation import DistillConfig, distill, load_corpora
from jaxdec.drafting import PromptLookup, TokenRecycling
from jaxdec.drafting.checkpoint import CONFIG_FILE
from jaxdec.drafting.static_tree import greedy_tree
from jaxdec.errors import UserError
from jaxdec.training import OptimizerConfig, TrainerConfig

RESULTS = Path(__file__).parent / "results" / "drafters"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Drafters are trained here, all with the same budget.

  ``nodes``: of every tree, root included; ``small``: of a second arm of each. A CPU verifies few
  nodes at little more than the price of one.
  """

  drafters: tuple[str, ...] = ("medusa", "hydra")
  steps: int = 800
  batch_size: int = 8
  seq_len: int = 256
  learning_rate: float = 5e-3
  nodes: int = 16
  small: int = 6
  prompts: int = 24
  prompt_tokens: int = 64
  new_tokens: int = 128
  repeats: int = 5


PRESETS = {
  "full": Config(),
  "tiny": Config(steps=10, prompts=2, new_tokens=32, repeats=1, batch_size=4, seq_len=128),
}


def job(name: str, config: Config, work_dir: Path) -> DistillConfig:
  """The distillation of one drafter; ``work_dir/name-steps`` is its folder."""
  return DistillConfig(
    drafter=name,
    options={"share_head": True, "num_heads": 4, "objective": "soft", "loss_fraction": 0.5},
    batch_size=config.batch_size,
    seq_len=config.seq_len,
    num_nodes=config.nodes,
    trainer=TrainerConfig(
      work_dir=str(work_dir / f"{name}-{config.steps}"),
      steps=config.steps,
      optimizer=OptimizerConfig(
        learning_rate=config.learning_rate, warmup_steps=50, weight_decay=0.0
      ),
    ),
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--preset", choices=PRESETS, default="full")
  parser.add_argument("--work-dir", type=Path, default=Path("runs/bench"))
  parser.add_argument("--output", type=Path, default=RESULTS)
  options = parser.parse_args()
  config = PRESETS[options.preset]
  lm = jaxdec.tiny()
  corpora = load_corpora("python_stdlib", lm.tokenizer)
  arms = [
    bench.Arm("prompt_lookup", PromptLookup()),
    bench.Arm("token_recycling", TokenRecycling(size=config.nodes), warm_start=True),
  ]
  training = {}
  for name in config.drafters:
    task = job(name, config, options.work_dir)
    done = distill(lm.model, lm.params, lm.tokenizer, task, corpora)
    if done.drafter is None:
      return 130
    arms.append(bench.Arm(name, done.drafter, done.params))
    facts = json.loads((Path(task.trainer.work_dir) / CONFIG_FILE).read_text(encoding="utf-8"))
    tree = greedy_tree(facts["accuracy"], config.small)
    small = dataclasses.replace(done.drafter, tree=tree)
    arms.append(bench.Arm(f"{name}_{config.small}", small, done.params))
    training[name] = {"held_out": done.result.metrics, "steps": done.result.step}
  try:
    arms.append(bench.Arm("eagle3", *lm.drafter("eagle3")))
  except UserError as error:
    print(f"eagle3 is left out: {error}")
  prompts = cut_prompts(
    open_source("python_stdlib", "test"),
    lm.tokenizer,
    config.prompts,
    min_tokens=config.prompt_tokens,
    max_tokens=config.prompt_tokens,
  )
  rows = bench.run(
    lm.model,
    lm.params,
    arms,
    [prompt.tokens for prompt in prompts],
    bench.BenchConfig(max_new_tokens=config.new_tokens, repeats=config.repeats),
    tick=lambda text: print(text, flush=True),
  )
  options.output.mkdir(parents=True, exist_ok=True)
  bench.write(
    rows,
    options.output,
    title=f"{config.prompts} prompts of test-split files, {config.new_tokens} new tokens each",
    command=shlex.join(["python", "experiments/bench/run.py", *sys.argv[1:]]),
    notes=[
      f"{' and '.join(config.drafters)}: {config.steps} training steps each, "
      f"trees of at most {config.nodes} nodes.",
      "tokens/s and speed-up: medians of alternating passes, compilation apart, float32, batch 1.",
    ],
    config=dataclasses.asdict(config),
    training=training,
    checks=checks(rows),
    prompts=[{"path": prompt.path, "line": prompt.line} for prompt in prompts],
  )
  print(bench.table(rows).markdown())
  for name, value in checks(rows).items():
    print(f"{name}: {value}")
  print(f"wrote table.md, results.json and plot.png into {options.output}")
  return 0 if all(row["all_identical"] for row in rows) else 1


def checks(rows: list[dict]) -> dict[str, float | bool | str | None]:
  """The numbers this experiment is about, greedy."""
  greedy = {row["drafter"]: row for row in rows if row["temperature"] == 0}
  best = max(greedy.values(), key=lambda row: row["speedup"])
  ratio = None
  if {"medusa", "hydra"} <= set(greedy):
    ratio = greedy["hydra"]["tokens_per_step"] / greedy["medusa"]["tokens_per_step"]
  return {
    "best_drafter": best["drafter"],
    "best_speedup": best["speedup"],
    "hydra_over_medusa_tokens_per_step": ratio,
    "all_identical": all(row["all_identical"] for row in rows),
  }


if __name__ == "__main__":
  sys.exit(main())
