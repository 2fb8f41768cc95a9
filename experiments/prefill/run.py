# SPDX-License-Identifier: Apache-2.0
"""What packing prompts and sharing prefixes save, on the embedded model.

Command:   python -m experiments.prefill.run                 (minutes on two quiet cores)
           python -m experiments.prefill.run --part prepack
           python -m experiments.prefill.run --tiny          (a look)

``prepack``: one batch of prompts whose lengths are log-normal is prefilled padded and packed.
Expected: packed at least twice as fast. ``shared``: passes of 32 rows behind a prefix of 1K to 16K
tokens, held once or by every row. Expected: the same tokens, and a cost that grows far less than
the prefix. Arms are timed alternately; the median counts. Written to results/results.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxdec
from jaxdec.data import open_source
from jaxdec.decoding import Sampler, loop, prepack, shared_prefix
from jaxdec.decoding.cache import bucket
from jaxdec.decoding.sampling import request_keys
from jaxdec.mixers.attention import KVState
from jaxdec.models import Decoder
from jaxdec.models.decoder import DecoderState
from jaxdec.models.prefill import choose_chunk, padded
from jaxdec.report import machine
from jaxdec.report.tables import Column, Table

RESULTS = Path(__file__).parent / "results"


def median_seconds(arms: dict, repeats: int) -> dict[str, float]:
  """Of each arm, a function; all run once to compile, then in turns."""
  seconds = {name: [] for name in arms}
  for i in range(repeats + 1):
    for name, arm in arms.items():
      start = time.perf_counter()
      jax.block_until_ready(arm())
      if i:
        seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(times) for name, times in seconds.items()}


def text(tokenizer, count: int) -> list[int]:
  """``count`` tokens of Python sources, over and over if they are too few."""
  tokens = []
  for document in open_source("python_stdlib", "validation"):
    tokens += tokenizer.encode(document.text)
    if len(tokens) >= count:
      break
  return (tokens * -(-count // len(tokens)))[:count]


def measure_prepack(lm, *, batch: int, longest: int, repeats: int, seed: int = 0) -> dict:
  """Padded against packed prefill of lengths exp(N(mu, 1)), mu = log(longest / 8)."""
  rng = np.random.default_rng(seed)
  lengths = np.clip(rng.lognormal(np.log(longest / 8), 1.0, batch), 1, longest).astype(int)
  tokens = text(lm.tokenizer, lengths.sum())
  prompts = [tokens[end - n : end] for n, end in zip(lengths.tolist(), np.cumsum(lengths).tolist())]
  most = int(lengths.max())
  chunk = choose_chunk(most)
  capacity = bucket(max(padded(most, chunk), bucket(most)))
  history = np.zeros((batch, capacity), np.int32)
  for row, prompt in zip(history, prompts):
    row[: len(prompt)] = prompt
  options = dict(model=lm.model, capture=(), keep=None)
  arms = {
    "padded": lambda: loop.prefill(
      lm.params, history, lengths.astype(np.int32), chunk=chunk, **options
    ),
    "packed": lambda: prepack.prefill(lm.params, prompts, capacity=capacity, **options),
  }
  hidden = [arm()[1].hidden[:, 0] for arm in arms.values()]
  unembed = lambda h: lm.model.apply({"params": lm.params}, h, method="unembed")  # noqa: E731
  first, second = (np.asarray(unembed(h)) for h in hidden)
  seconds = median_seconds(arms, repeats)
  packed, _ = prepack.pack(prompts)
  return {
    "batch": batch,
    "mean_length": float(lengths.mean()),
    "longest": most,
    "padded_tokens": batch * padded(most, chunk),
    "packed_tokens": packed.size,
    "padded_seconds": seconds["padded"],
    "packed_seconds": seconds["packed"],
    "ratio": seconds["padded"] / seconds["packed"],
    "largest_logit_difference": float(np.abs(first - second).max()),
    "same_first_tokens": bool((first.argmax(-1) == second.argmax(-1)).all()),
  }


def own_copies(state: DecoderState, prefix: int) -> DecoderState:
  """The state in which every row holds the ``prefix`` tokens itself."""

  def layer(s: KVState):
    (level,) = s.shared
    copies = lambda x: jnp.repeat(x[:, :, :prefix], s.k.shape[0], axis=0)  # noqa: E731
    k, v = (jnp.concatenate([copies(a), b], axis=2) for a, b in ((level.k, s.k), (level.v, s.v)))
    return KVState(k, v, s.length)

  return DecoderState(tuple(map(layer, state.layers)))


def measure_shared(lm, *, prefix: int, batch: int, own: int, passes: int, repeats: int) -> dict:
  """Milliseconds a pass of ``batch`` rows that share ``prefix`` tokens and have ``own`` more."""
  model = Decoder(dataclasses.replace(lm.config, max_length=1 << 20))
  tokens = text(lm.tokenizer, prefix + batch * own)
  sharing = shared_prefix.Sharing(((tuple(tokens[:prefix]),),))
  prompts = [tokens[:prefix] + tokens[prefix + i * own :][:own] for i in range(batch)]
  room = bucket(padded(own, choose_chunk(own)) + passes + 2)
  start = time.perf_counter()
  state, output = jax.block_until_ready(
    shared_prefix.prefill(lm.params, prompts, sharing, model=model, capacity=room)
  )
  prefill_seconds = time.perf_counter() - start
  lengths = jnp.full(batch, prefix + own, jnp.int32)
  history = np.zeros((batch, prefix + room), np.int32)
  history[:, : prefix + own] = prompts
  request = loop.Request(request_keys(0, batch), lengths + passes, jnp.full(8, -1, jnp.int32))
  options = dict(model=model, drafter=None, sampler=Sampler())
  seconds, texts = {"shared": [], "copied": []}, {}
  for name in seconds:  # one after the other: the copies alone may fill the memory
    arm = (
      jax.tree.map(jnp.copy, state)
      if name == "shared"
      else jax.jit(own_copies, static_argnums=1)(state, prefix)
    )
    carry = loop.begin(
      lm.params, None, arm, output, None, jnp.asarray(history), lengths, request,
      **options, warm=False,
    )  # fmt: skip
    del arm
    carry = loop.decode(
      carry, lm.params, None, request, np.int32(2), np.zeros(batch, bool), **options,
      rule=jaxdec.decoding.get_rule("match"),
    )  # fmt: skip
    each = (passes - 2) // repeats
    for i in range(repeats):
      jax.block_until_ready(carry)
      start = time.perf_counter()
      carry = loop.decode(
        carry, lm.params, None, request, np.int32(2 + (i + 1) * each), np.zeros(batch, bool),
        **options, rule=jaxdec.decoding.get_rule("match"),
      )  # fmt: skip
      jax.block_until_ready(carry)
      seconds[name].append((time.perf_counter() - start) / each)
    texts[name] = np.asarray(carry.history)
  shared, copied = (1e3 * statistics.median(seconds[x]) for x in ("shared", "copied"))
  per_token = sum(2 * s.k[0, :, 0].nbytes for s in state.layers)
  return {
    "prefix": prefix,
    "batch": batch,
    "shared_ms": shared,
    "copied_ms": copied,
    "ratio": copied / shared,
    "shared_prefix_megabytes": per_token * prefix / 1e6,
    "copied_prefix_megabytes": per_token * prefix * batch / 1e6,
    "prefill_seconds_and_compiling": prefill_seconds,
    "same_tokens": bool(np.array_equal(*texts.values())),
  }


def main(arguments=None) -> dict:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--part", choices=("prepack", "shared"), help="one of the two; else both")
  parser.add_argument("--batch", type=int, help="rows (64 packed, 32 behind a prefix)")
  parser.add_argument("--longest", type=int, default=1024, help="longest prompt that is packed")
  parser.add_argument("--prefixes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--tiny", action="store_true", help="small sizes; shows that it runs")
  parser.add_argument("--output", type=Path, default=RESULTS)
  options = parser.parse_args(arguments)
  lm, results = jaxdec.tiny(), {}
  if options.tiny:
    options.longest, options.prefixes, options.repeats = 128, [64, 256], 2
  if options.part != "shared":
    batch = options.batch or (8 if options.tiny else 64)
    row = measure_prepack(lm, batch=batch, longest=options.longest, repeats=options.repeats)
    results["prepack"] = [row]
    columns = [
      Column("batch"), Column("mean_length", spec=".0f"), Column("longest"),
      Column("padded_tokens"), Column("packed_tokens"), Column("padded_seconds", spec=".3f"),
      Column("packed_seconds", spec=".3f"), Column("ratio", spec=".2f"),
      Column("same_first_tokens"),
    ]  # fmt: skip
    print(Table(columns, [row], title="Prefill, padded and packed").markdown(), flush=True)
  if options.part != "prepack":
    rows = results["shared"] = []
    for prefix in options.prefixes:
      row = measure_shared(
        lm,
        prefix=prefix,
        batch=options.batch or (4 if options.tiny else 32),
        own=32,
        passes=2 + 4 * options.repeats,
        repeats=options.repeats,
      )
      rows.append({**row, "cost": row["shared_ms"] / (rows[0] if rows else row)["shared_ms"]})
      print(json.dumps(rows[-1]), flush=True)
    columns = [
      Column("prefix"), Column("shared_ms", spec=".1f"), Column("copied_ms", spec=".1f"),
      Column("ratio", spec=".2f"), Column("cost", "shared, over the first", ".2f"),
      Column("shared_prefix_megabytes", spec=".0f"), Column("copied_prefix_megabytes", spec=".0f"),
      Column("same_tokens"),
    ]  # fmt: skip
    print(Table(columns, rows, title="Milliseconds a pass behind a shared prefix").markdown())
  options.output.mkdir(parents=True, exist_ok=True)
  command = " ".join(["python -m experiments.prefill.run", *(arguments or sys.argv[1:])])
  content = {"command": command, "machine": machine.describe(), **results}
  (options.output / "results.json").write_text(json.dumps(content, indent=2) + "\n")
  return results


if __name__ == "__main__":
  main()
