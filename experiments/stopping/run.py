# SPDX-License-Identifier: Apache-2.0
"""Does SpecDec++ beat the best fixed length? A one-layer draft model for the embedded target.

Command:   python -m experiments.stopping.run                 (about an hour on 2 quiet cores)
           python -m experiments.stopping.run --preset short  (what results/short.json holds)
           python -m experiments.stopping.run --preset tiny   (minutes; shows that it runs)
Expected:  README.md beside this file; results/<preset>.json.

Trains the draft model on the text the target was trained on, then the acceptance head on the
target's own continuations, records what would have been accepted at every position of held-out
continuations, measures the costs of a pass, and replays every fixed length and every threshold.
The best of both then decode for real.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxdec
from jaxdec.data import cut_prompts, open_source
from jaxdec.decoding import Sampler, generate
from jaxdec.distillation import load_corpora
from jaxdec.drafting import DraftModel, SpecDec, Target
from jaxdec.drafting.draft_cost import (
  best_fixed,
  best_threshold,
  drafts_made,
  measure_costs,
  record_rounds,
  replay,
)
from jaxdec.models import Decoder, tiny_llama
from jaxdec.report import describe
from jaxdec.training.tasks.stopping import LearnStopping

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a preset spends; ``texts`` continuations of ``new`` tokens train the head."""

  steps: int = 2000
  head_steps: int = 600
  texts: int = 256
  held_out: int = 24
  new: int = 192
  prompt: int = 64
  batch: int = 8
  drafts: int = 8
  repeats: int = 3


PRESETS = {
  "full": Budget(),
  "short": Budget(steps=800, head_steps=300, texts=96, held_out=16, new=128),
  "tiny": Budget(steps=3, head_steps=3, texts=4, held_out=2, new=40, batch=2, drafts=3, repeats=1),
}


def batch_of(tokens: np.ndarray, prompt: int = 0) -> dict:
  """Whole rows, the first ``prompt`` tokens of each without loss."""
  index = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return {
    "tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.ones(tokens.shape, jnp.int32),
    "positions": jnp.asarray(index), "loss_mask": jnp.asarray(index >= prompt, jnp.float32),
  }  # fmt: skip


def minimise(loss, params, batches, steps: int, rate: float):
  """AdamW with a cosine; ``loss(params, batch, rng) -> (value, metrics)``. Last metrics too."""
  optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=0.0)

  @jax.jit
  def step(params, state, batch, rng):
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, rng)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, metrics

  state = optimizer.init(params)
  for i in range(steps):
    params, state, value, metrics = step(params, state, batches(i), jax.random.key(i))
  return params, jax.device_get((value, metrics))


def run(budget: Budget) -> dict:
  lm = jaxdec.tiny()
  rng = np.random.default_rng(0)
  text = np.asarray(load_corpora("python_stdlib", lm.tokenizer).train.tokens)
  length = budget.prompt + budget.new
  draft = Decoder(
    tiny_llama(
      vocab_size=lm.config.vocab_size,
      dim=128,
      num_layers=1,
      num_heads=2,
      num_kv_heads=2,
      hidden_dim=384,
      eos_ids=lm.config.eos_ids,
    )
  )

  def windows(i):
    at = rng.integers(0, len(text) - length, budget.batch)
    return batch_of(np.stack([text[j : j + length] for j in at]))

  def language(params, batch, key):
    logits = draft.apply({"params": params}, batch["tokens"]).logits[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    return jnp.mean(losses), {}

  fresh = nn.unbox(draft.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
  draft_params, (draft_loss, _) = minimise(language, fresh, windows, budget.steps, 3e-3)

  def continued(split: str, count: int) -> tuple[np.ndarray, list]:
    cut = cut_prompts(open_source("python_stdlib", split), lm.tokenizer, count,
                      min_tokens=budget.prompt, max_tokens=budget.prompt)  # fmt: skip
    prompts, rows = [list(p.tokens) for p in cut], []
    for i in range(0, count, 8):
      out = generate(lm.model, lm.params, prompts[i : i + 8], max_new_tokens=budget.new, stop=None)
      rows += [p + t for p, t in zip(prompts[i : i + 8], out.tokens)]
    return np.asarray(rows), prompts

  train, _ = continued("train", budget.texts)
  drafter = SpecDec(model=draft, num_drafts=budget.drafts)
  task = LearnStopping(drafter, draft_params, lm.model, lm.params, Sampler())
  frozen = task.frozen

  def texts(i):
    return batch_of(train[rng.integers(0, len(train), budget.batch)], budget.prompt)

  head = nn.unbox(task.init(jax.random.key(1)))
  head, (_, metrics) = minimise(
    lambda h, batch, key: task.loss(h, frozen, batch, key), head, texts, budget.head_steps, 1e-3
  )
  params = {"model": draft_params, "head": head}
  held, prompts = continued("test", budget.held_out)
  rounds = record_rounds(drafter, params, held, budget.prompt, sampler=Sampler())
  sizes = range(2, budget.drafts + 2)
  exact = measure_costs(drafter, params, Target(lm.model, lm.params, None), list(sizes))
  static = dataclasses.replace(exact, verify=exact.verify[-1:])
  out = {
    "draft_loss": draft_loss, "head": metrics, "accepted_first": rounds.accepted[..., 0].mean(),
    "draft_seconds": exact.draft, "verify_seconds": dict(exact.verify),
  }  # fmt: skip
  fixed, speed = best_fixed(rounds, exact)
  out["fixed"] = {"drafts": fixed, "tokens_per_second": speed}
  for name, costs in (("static_width", static), ("widths", exact)):
    h, most, speed = best_threshold(rounds, costs, lengths=[budget.drafts])
    made = drafts_made(rounds.chances, h)
    oracle = dataclasses.replace(rounds, chances=rounds.accepted.astype(np.float32))
    out[name] = {
      "threshold": h, "most": most, "tokens_per_second": speed, "mean_drafts": made.mean(),
      "oracle": best_threshold(oracle, costs, lengths=[budget.drafts])[2],
      "never_stopping": replay(rounds, np.full(made.shape, budget.drafts), costs),
    }  # fmt: skip
  out["decoded"] = decoded(lm, drafter, params, prompts, fixed, out, budget)
  return out


def decoded(lm, drafter, params, prompts, fixed: int, found: dict, budget: Budget) -> dict:
  """Tokens per second of decoding itself, one prompt at a time, arms in turn; best of repeats."""
  h = found["widths"]["threshold"]
  arms = {
    "plain": (None, None),
    "fixed": (DraftModel(model=drafter.model, num_drafts=fixed), params["model"]),
    "static_width": (
      dataclasses.replace(drafter, threshold=found["static_width"]["threshold"]), params
    ),
    "widths": (
      dataclasses.replace(drafter, threshold=h, widths=tuple(range(3, drafter.num_nodes))), params
    ),
  }  # fmt: skip
  speeds, tokens = {name: [] for name in arms}, {}
  for _ in range(budget.repeats + 1):  # the first compiles
    for name, (arm, arm_params) in arms.items():
      outs = [
        generate(lm.model, lm.params, [p], max_new_tokens=budget.new, stop=None, drafter=arm,
                 drafter_params=arm_params)
        for p in prompts
      ]  # fmt: skip
      seconds = sum(o.stats.decode_seconds for o in outs)
      speeds[name].append(sum(o.stats.new_tokens for o in outs) / seconds)
      tokens[name] = [o.tokens for o in outs]
  same = all(t == tokens["plain"] for t in tokens.values())
  return {"identical": same, **{name: max(s[1:]) for name, s in speeds.items()}}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--preset", choices=PRESETS, default="full")
  options = parser.parse_args()
  budget = PRESETS[options.preset]
  result = {"budget": dataclasses.asdict(budget), "machine": describe(), **run(budget)}
  RESULTS.mkdir(exist_ok=True)
  path = RESULTS / f"{options.preset}.json"
  path.write_text(json.dumps(result, indent=1, default=float) + "\n", encoding="utf-8")
  print(json.dumps({k: result[k] for k in ("fixed", "static_width", "widths", "decoded")},
                   indent=1, default=float))  # fmt: skip
  return 0 if result["decoded"]["identical"] else 1


if __name__ == "__main__":
  sys.exit(main())
