# SPDX-License-Identifier: Apache-2.0
"""FlexSP: groups of several sequence-parallel degrees against one degree for all.

Command:  python experiments/flexsp/run.py                 (about 15 minutes on two CPU cores)
          python experiments/flexsp/run.py --tiny          (a minute; prints only)
          python experiments/flexsp/run.py --only measured (one part: predicted, solver, measured)
Expected: results/{predicted,solver,measured}.{md,json} beside this file; see README.md.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import time

import numpy as np

from jaxdec.parallel.flexsp import Planner, gpt_7b, lower_bound
from jaxdec.parallel.flexsp import milp as programs
from jaxdec.parallel.flexsp import static as greedy_groups
from jaxdec.parallel.flexsp.buckets import bucket
from jaxdec.report import machine
from jaxdec.report.tables import Column, Table

HERE = pathlib.Path(__file__).parent
SEED = 0
# Share, median tokens and spread (of the logarithm) of each part of a mix.
MIXES = {
  "web": ((0.95, 800, 1.2), (0.05, 8_000, 1.2)),
  "code": ((0.90, 1_500, 1.5), (0.10, 24_000, 1.3)),
  "encyclopedia": ((0.98, 500, 1.0), (0.02, 6_000, 1.0)),
}
CONTEXT = {8: 96 * 1024, 16: 192 * 1024, 64: 384 * 1024}


def batch(mix: str, count: int, context: int, *, seed: int) -> list[int]:
  """Lengths of a batch: a mix of log-normals, cut at the context length."""
  shares, medians, spreads = zip(*MIXES[mix])
  rng = np.random.default_rng((SEED, list(MIXES).index(mix), seed))
  part = rng.choice(len(shares), count, p=shares)
  lengths = np.array(medians)[part] * np.exp(np.array(spreads)[part] * rng.standard_normal(count))
  return np.clip(lengths, 32, context).astype(int).tolist()


def predicted(tiny: bool) -> Table:
  """Predicted time of whole batches; no solver."""
  count, batches = (64, 1) if tiny else (512, 5)
  rows = []
  for devices in (8, 16) if tiny else (8, 16, 64):
    model = gpt_7b(devices)
    planner = Planner(devices=devices, model=model, method="greedy")
    least = model.least_degree(CONTEXT[devices])
    allowed = [d for d in (1 << i for i in range(devices.bit_length())) if least <= d <= devices]
    for mix in MIXES:
      lengths = [batch(mix, count, CONTEXT[devices], seed=i) for i in range(batches)]
      start = time.perf_counter()
      plans = [planner.plan(sizes) for sizes in lengths]
      seconds = (time.perf_counter() - start) / batches
      fixed = {d: sum(planner.static(sizes, degree=d).time for sizes in lengths) for d in allowed}
      adaptive = sum(planner.static(sizes).time for sizes in lengths)
      flexible = sum(plan.time for plan in plans)
      best = min(fixed, key=fixed.get)
      rows.append({
        "devices": devices, "mix": mix, "tokens": sum(map(sum, lengths)) // batches,
        "longest": max(map(max, lengths)), "degree": best, "static": fixed[best] / batches,
        "flexible": flexible / batches, "ratio": fixed[best] / flexible,
        "adaptive": adaptive / flexible, "bound": flexible / sum(plan.bound for plan in plans),
        "plan_ms": 1e3 * seconds,
      })  # fmt: skip
  return Table(
    columns=(
      Column("devices"), Column("mix", align="left"), Column("tokens", "tokens a batch", ","),
      Column("longest", spec=","), Column("degree", "best static degree"),
      Column("static", "static, ms", ",.0f"), Column("flexible", "FlexSP, ms", ",.0f"),
      Column("ratio", "static / FlexSP", ".2f"),
      Column("adaptive", "best static of each batch / FlexSP", ".2f"),
      Column("bound", "FlexSP / lower bound", ".3f"), Column("plan_ms", "planning, ms", ",.0f"),
    ),
    rows=rows,
    title=f"Predicted time of a batch of {count} sequences, GPT-7B on A100s, mean of {batches}",
    notes=(
      "Static: one degree for the whole run, which must hold the context length "
      f"({', '.join(f'{n} devices: {c:,}' for n, c in CONTEXT.items())} tokens); same split into "
      "micro-batches, longest first into the group with least time.",
      "FlexSP: groups found without the solver. Lower bound: of any groups for its micro-batches.",
    ),
  )  # fmt: skip


def solver(tiny: bool) -> Table:
  """The integer program against the longest-first rule, micro-batch by micro-batch."""
  limits = (2.0,) if tiny else (2.0, 10.0)
  count, most = (48, 2) if tiny else (128, 8)
  rows = []
  for devices in (8, 16) if tiny else (8, 16, 64):
    model = gpt_7b(devices)
    planner = Planner(devices=devices, model=model, method="greedy")
    histograms = []
    for mix in MIXES:
      plan = planner.plan(batch(mix, count, CONTEXT[devices], seed=100))
      for groups in plan.micro_batches:
        sizes = [plan.lengths[s] for g in groups for s in g.sequences]
        # A single group has nothing to choose.
        if len(groups) > 1:
          histograms.append(bucket(sizes, devices * model.cap).histogram)
    for limit in limits:
      gains, seconds, quick, bounds, states = [], [], [], [], []
      for histogram in histograms[:most]:
        rounded = [bound for bound, n in histogram for _ in range(n)]
        start = time.perf_counter()
        upper, _ = greedy_groups.greedy(rounded, devices, model)
        quick.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = programs.solve(histogram, devices, model, upper=upper, time_limit=limit)
        seconds.append(time.perf_counter() - start)
        states.append(found.status == "optimal")
        gains.append(upper / min(upper, found.time) - 1)
        bounds.append(upper / max(found.bound, lower_bound(rounded, devices, model)) - 1)
      rows.append({
        "devices": devices, "limit": limit, "problems": len(gains), "optimal": sum(states),
        "mean": 100 * np.mean(gains), "worst": 100 * max(gains),
        "gap": 100 * np.median(bounds), "quick_ms": 1e3 * np.median(quick),
        "times": np.median(seconds) / np.median(quick),
      })  # fmt: skip
  return Table(
    columns=(
      Column("devices"), Column("limit", "time limit, s", ".0f"), Column("problems"),
      Column("optimal", "solved to 0.1 %"),
      Column("mean", "greedy above MILP, mean %", ".2f"), Column("worst", "worst %", ".2f"),
      Column("gap", "greedy above the best bound, median %", ".2f"),
      Column("quick_ms", "greedy, median ms", ".0f"),
      Column("times", "MILP's time / greedy's, medians", ",.0f"),
    ),
    rows=rows,
    title="The integer program (HiGHS, one core) against longest-first, same rounded lengths",
    notes=(
      "Where the solver finds nothing in its time, the greedy groups are kept (0 %).",
      "Best bound: the solver's or, where it is higher, that of any groups at all.",
    ),
  )  # fmt: skip


def measured(tiny: bool) -> tuple[Table, Table]:
  """A cost model fitted to steps of a small decoder on simulated devices, and plans run with it."""
  import jax
  from flax import linen as nn

  from jaxdec.models import Decoder, tiny_llama
  from jaxdec.parallel.flexsp import Executor, exchange_bytes, measure, task_gradients
  from jaxdec.parallel.flexsp.timing import random_tokens
  from jaxdec.parallel.sequence.config import SequenceConfig
  from jaxdec.training import LanguageModel

  cap, devices = (64, 8) if tiny else (512, 8)
  config = tiny_llama(
    vocab_size=256, dim=64, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=16,
    hidden_dim=256, max_length=cap * devices,
  )  # fmt: skip
  task = LanguageModel(Decoder(config, sequence=SequenceConfig(attention="ulysses")))
  params = nn.unbox(jax.jit(task.init)(jax.random.key(SEED)))
  # Few sizes, few programs; a group is padded by a sixth on average.
  bounds = [cap] if tiny else [cap * n // 32 for n in (2, 3, 4, 6, 8, 12, 16, 24, 32)]
  executor = Executor(task_gradients(task), cap=cap, bounds=bounds)
  lengths = [
    (cap // 2,), (cap,), (2 * cap,), (4 * cap,), (8 * cap,),
    (cap // 8,) * 8, (cap // 4,) * 8, (cap // 2,) * 8,
  ]  # fmt: skip
  found = measure(executor, params, cap=cap, lengths=lengths, repeats=2 if tiny else 9)
  model = found.fit(cap=cap, bytes_per_token=exchange_bytes(config, 4))
  steps = [
    {
      "lengths": f"{len(step.lengths)} x {step.lengths[0]}", "degree": step.degree,
      "measured": step.ms, "predicted": step.ms * (1 + error), "error": 100 * error,
    }
    for step, error in found.errors(model)
  ]  # fmt: skip
  fitted = Table(
    columns=(
      Column("lengths", align="left"), Column("degree"), Column("measured", "measured, ms", ".1f"),
      Column("predicted", "predicted, ms", ".1f"), Column("error", "error, %", "+.0f"),
    ),
    rows=steps,
    title="Fit: steps of groups that all do the same",
    notes=(
      f"Median error, either way: {_median_error(steps)}.",
      f"a1 = {model.a1:.3g} ms/token^2, a2 = {model.a2:.3g} ms/token, b1 = {model.b1:.3g} ms; "
      f"all-to-all {', '.join(f'{d}: {bw:.2f}' for d, bw in model.bandwidth)} MiB/ms.",
    ),
  )  # fmt: skip

  planner = Planner(devices=devices, model=model, time_limit=2.0)
  rng = np.random.default_rng(SEED)
  rows = []
  for number in range(1 if tiny else 3):
    sizes = np.clip(cap / 8 * np.exp(1.2 * rng.standard_normal(24)), 8, 4 * cap).astype(int)
    sizes = sizes.tolist()
    sequences = [random_tokens(n) for n in sizes]
    plans = {"FlexSP": planner.plan(sizes), "static": planner.static(sizes)}
    best = dict.fromkeys(plans, np.inf)
    for turn in range(3 if tiny else 10):
      for name, plan in plans.items():
        start = time.perf_counter()
        jax.block_until_ready(executor(plan, params, sequences))
        if turn:  # the first one compiles
          best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    for name, plan in plans.items():
      groups = [sorted((g.degree for g in groups), reverse=True) for groups in plan.micro_batches]
      rows.append({
        "batch": number, "plan": name, "groups": "; ".join(" ".join(map(str, g)) for g in groups),
        "measured": best[name], "predicted": plan.time,
        "error": 100 * (plan.time / best[name] - 1),
      })  # fmt: skip
  return fitted, Table(
    columns=(
      Column("batch"), Column("plan", align="left"), Column("groups", "degrees", align="left"),
      Column("measured", "measured, ms", ".1f"), Column("predicted", "predicted, ms", ".1f"),
      Column("error", "error, %", "+.0f"),
    ),
    rows=rows,
    title="Batches of 24 sequences run by plan, none of them used in the fit",
    notes=(f"Median error, either way: {_median_error(rows)}. The plans take turns.",),
  )  # fmt: skip


def _median_error(rows: list[dict]) -> str:
  return f"{np.median([abs(row['error']) for row in rows]):.0f} %"


def write(name: str, tables: tuple[Table, ...], text: str) -> None:
  out = HERE / "results"
  out.mkdir(exist_ok=True)
  (out / f"{name}.md").write_text(text, encoding="utf-8")
  command = f"python experiments/flexsp/run.py --only {name}"
  facts = {"machine": machine.describe(), "seed": SEED, "command": command}
  parts = ",\n".join(table.json(**facts).rstrip() for table in tables)
  (out / f"{name}.json").write_text(f"[\n{parts}\n]\n", encoding="utf-8")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parts = {"predicted": predicted, "solver": solver, "measured": measured}
  parser.add_argument("--only", choices=parts)
  parser.add_argument("--tiny", action="store_true", help="small sizes, nothing written")
  args = parser.parse_args()
  # Read when jax first touches a device.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  simulated = "--xla_force_host_platform_device_count"
  if simulated not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated}=8".strip()
  for name in [args.only] if args.only else parts:
    tables = parts[name](args.tiny)
    tables = tables if isinstance(tables, tuple) else (tables,)
    text = "\n".join(table.markdown() for table in tables)
    print(text, flush=True)
    if not args.tiny:
      write(name, tables, text)


if __name__ == "__main__":
  main()
