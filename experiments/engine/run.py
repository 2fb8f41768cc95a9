# SPDX-License-Identifier: Apache-2.0
"""Many requests through the engine: the tokens they get alone, in less time.

Command:   python -m experiments.engine.run            (minutes on two quiet cores)
           python -m experiments.engine.run --tiny     (a look)

Prompts from Python files come two at a time, ask for different lengths, temperatures and filters,
and share the embedded model's passes. Then each is decoded alone by ``generate``. Expected: the
same tokens, all of them, and the engine faster. Compiling is in neither time. Written to
results/results.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import jaxdec
from jaxdec.data import cut_prompts, open_source
from jaxdec.decoding import Engine, EngineRequest, Sampler, compilations, generate
from jaxdec.report import machine

RESULTS = Path(__file__).parent / "results"
SAMPLERS = (
  Sampler(),
  Sampler(temperature=1.0),
  Sampler(temperature=0.7, top_p=0.9),
  Sampler(temperature=1.2, top_k=40, min_p=0.02),
)


def make_requests(lm, count: int, longest: int, seed: int = 0) -> list[EngineRequest]:
  rng = random.Random(seed)
  prompts = cut_prompts(
    open_source("python_stdlib", "validation"), lm.tokenizer, count,
    min_tokens=longest // 4, max_tokens=longest,
  )  # fmt: skip
  return [
    EngineRequest(
      list(p.tokens), rng.randint(longest // 4, longest), SAMPLERS[i % len(SAMPLERS)], i, None
    )
    for i, p in enumerate(prompts)
  ]


def serve(engine: Engine, requests: list[EngineRequest], arrivals: int) -> tuple[list, float]:
  """Results in order and seconds; ``arrivals`` requests come before every step."""
  waiting, ids = list(requests), []
  start = time.perf_counter()
  while waiting or not engine.idle:
    for r in waiting[:arrivals]:
      ids.append(
        engine.admit(
          r.prompt, max_new_tokens=r.max_new_tokens, sampler=r.sampler, seed=r.seed, stop=r.stop
        )
      )
    waiting = waiting[arrivals:]
    engine.step()
  seconds = time.perf_counter() - start
  return [engine.results.pop(id) for id in ids], seconds


def main(arguments=None) -> dict:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--requests", type=int, default=64)
  parser.add_argument("--longest", type=int, default=128, help="tokens of prompts and of answers")
  parser.add_argument("--slots", type=int, nargs="+", default=[4, 16, 64])
  parser.add_argument("--arrivals", type=int, default=2, help="requests that come before a step")
  parser.add_argument("--drafter", help="a name such as prompt_lookup; none by default")
  parser.add_argument("--tiny", action="store_true", help="small sizes; shows that it runs")
  parser.add_argument("--output", type=Path, default=RESULTS)
  options = parser.parse_args(arguments)
  if options.tiny:
    options.requests, options.longest, options.slots = 6, 32, [3]
  lm = jaxdec.tiny()
  requests = make_requests(lm, options.requests, options.longest)

  def alone(r: EngineRequest):
    return generate(
      lm.model, lm.params, [r.prompt], max_new_tokens=r.max_new_tokens, sampler=r.sampler,
      seed=[r.seed], stop=r.stop, drafter=options.drafter,
    )  # fmt: skip

  singles = [alone(r) for r in requests]
  one_by_one = sum(out.stats.prefill_seconds + out.stats.decode_seconds for out in singles)
  tokens = sum(out.lengths[0] for out in singles)
  print(f"one by one: {one_by_one:.1f} s, {tokens / one_by_one:.0f} tokens/s", flush=True)
  rows = []
  for slots in options.slots:
    engine = Engine(
      lm.model, lm.params, slots=slots, capacity=2 * options.longest, drafter=options.drafter
    )
    serve(engine, requests[:2], 1)  # compiles
    before = compilations()
    results, seconds = serve(engine, requests, options.arrivals)
    assert compilations() == before
    waits = [r.first_token_seconds for r in results]
    rows.append({
      "slots": slots,
      "seconds": seconds,
      "tokens_per_second": tokens / seconds,
      "over_one_by_one": one_by_one / seconds,
      "median_first_token_seconds": statistics.median(waits),
      "same_tokens": [r.tokens for r in results] == [out.tokens[0] for out in singles],
    })  # fmt: skip
    print(json.dumps(rows[-1]), flush=True)
  summary = {
    "command": " ".join(["python -m experiments.engine.run", *(arguments or sys.argv[1:])]),
    "machine": machine.describe(),
    "requests": len(requests),
    "one_by_one_seconds": one_by_one,
    "tokens": tokens,
    "rows": rows,
  }
  options.output.mkdir(parents=True, exist_ok=True)
  (options.output / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
  return summary


if __name__ == "__main__":
  main()
