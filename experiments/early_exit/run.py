# SPDX-License-Identifier: Apache-2.0
"""DEL against every fixed exit and draft length, on the embedded model trained for early exits.

Command:   python -m experiments.early_exit.run              (half an hour on two cores)
           python -m experiments.early_exit.run --steps 40   (a quick look)

The embedded model is fine-tuned with LayerSkip's recipe on the Python standard library; what comes
out is a target of its own. Then held-out prompts are continued with each fixed (exit, length) and
with DEL. Compared is tokens per layer run (an LM head counts ``head`` layers by its weights), which
no clock disturbs. results/results.json holds all of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import jaxdec
from jaxdec.data import cut_prompts, make_dataset, open_source
from jaxdec.decoding import generate
from jaxdec.drafting import DynamicExit, EarlyExit
from jaxdec.drafting.dynamic_exit import measured_cost
from jaxdec.drafting.early_exit import round_cost
from jaxdec.training import OptimizerConfig, Trainer, TrainerConfig
from jaxdec.training.tasks.heal import Heal
from jaxdec.training.tasks.layer_skip import LayerSkip

RESULTS = Path(__file__).parent / "results"
LENGTHS = (1, 2, 3, 4, 6)


def train(lm, steps: int, work_dir: str | None):
  """The embedded model's weights after LayerSkip fine-tuning."""
  batches = make_dataset(
    open_source("python_stdlib", "train"), lm.tokenizer, batch_size=8, seq_len=128, seed=0
  )
  task = Heal(lm.model, weights=lm.params, layer_skip=LayerSkip(scale=0.5, exits=2, dropout=0.1))
  optimizer = OptimizerConfig(name="adamw", learning_rate=5e-4, warmup_steps=min(20, steps // 4))
  config = TrainerConfig(steps=steps, optimizer=optimizer, log_every=20, work_dir=work_dir)
  return Trainer(task, config, data=batches).train().params


def head_layers(lm) -> float:
  """Weights of the LM head over those of a layer."""
  import jax

  layer = sum(x.size for x in jax.tree.leaves(lm.params["layers_0"]))
  return lm.config.dim * lm.config.vocab_size / layer


def compare(model, params, prompts, new_tokens: int, head: float, lengths) -> dict:
  """Tokens per layer run: plain decoding, each fixed choice, DEL."""
  layers = model.config.num_layers
  rows = {"plain": {"tokens_per_step": 1.0, "rate": 1 / round_cost(layers, 0, 0, head)}}

  def decode(drafter):
    return [
      generate(model, params, [prompt], max_new_tokens=new_tokens, drafter=drafter, stop=None)
      for prompt in prompts
    ]

  def per_step(outs):
    rounds = sum(sum(out.stats.row_steps) for out in outs)
    return sum(out.stats.new_tokens - 1 for out in outs) / rounds, rounds

  for exit, length in itertools.product(range(1, layers), lengths):
    tau, _ = per_step(decode(EarlyExit(exit=exit, num_drafts=length)))
    rate = tau / round_cost(layers, exit, length, head)
    rows[f"exit {exit}, {length} drafts"] = {"tokens_per_step": tau, "rate": rate}
    print(
      f"exit {exit}, {length} drafts: {tau:.3f} tokens/step, {rate:.4f} tokens/layer", flush=True
    )
  for name, options in (("del", {}), ("del, no stopping", {"stopping": False})):
    drafter = DynamicExit(max_drafts=max(lengths), head_layers=head, **options)
    outs = decode(drafter)
    tau, rounds = per_step(outs)
    exits = tuple(range(1, layers))
    cost = sum(measured_cost(out.drafter_state, exits, layers, head) for out in outs)
    rows[name] = {"tokens_per_step": tau, "rate": tau * rounds / cost}
    print(f"{name}: {tau:.3f} a step, {rows[name]['rate']:.4f} a layer", flush=True)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--prompts", type=int, default=16)
  parser.add_argument("--new-tokens", type=int, default=128)
  parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
  parser.add_argument("--work-dir", default=None)
  args = parser.parse_args()
  lm = jaxdec.tiny()
  params = train(lm, args.steps, args.work_dir)
  source = open_source("python_stdlib", "test")
  cut = cut_prompts(source, lm.tokenizer, args.prompts, min_tokens=64, max_tokens=64, seed=0)
  prompts = [list(p.tokens) for p in cut]
  head = head_layers(lm)
  rows = compare(lm.model, params, prompts, args.new_tokens, head, args.lengths)
  fixed = {name: row["rate"] for name, row in rows.items() if name.startswith("exit")}
  best = max(fixed, key=fixed.get)
  summary = {
    "head_layers": head,
    "best_fixed": best,
    "del_over_best_fixed": rows["del"]["rate"] / fixed[best],
    "best_fixed_over_plain": fixed[best] / rows["plain"]["rate"],
  }
  print(json.dumps(summary, indent=2))
  RESULTS.mkdir(exist_ok=True)
  report = {"settings": vars(args) | {"work_dir": None}, "summary": summary, "rows": rows}
  (RESULTS / "results.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  main()
