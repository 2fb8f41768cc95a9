# SPDX-License-Identifier: Apache-2.0
"""Step time of every way to split a sequence, side by side in one process, at T = 32K.

Command:   python -m experiments.lasp2.speed               (8 simulated devices; half an hour)
           python -m experiments.lasp2.speed --quick       (T = 2K, one round: shows that it runs)
Expected:  README.md beside this file.

One small model (two blocks of width 128) with linear attention under LASP-2, its log-step scan, the
LASP-1 chain and the chain in slices, and the same model with softmax attention under ring
attention, the all-gather of keys and values, and Ulysses. The arms take turns, in an order that
rotates from round to round; medians of whole training steps, compilation apart. Simulated devices
share the cores and a memory: what shows is the work a method does and what its order forbids to
overlap, not a network.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.lasp2.config import decoder
from jaxdec.parallel import make_mesh
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.report import Column, Table, describe
from jaxdec.training import MeshConfig, Recipe, Trainer, TrainerConfig

RESULTS = Path(__file__).parent / "results"
ARMS = {
  "LASP-2: all-gather of states": ("basic", SequenceConfig(linear="gather")),
  "log-step scan of states": ("basic", SequenceConfig(linear="scan")),
  "LASP-1: chain of states": ("basic", SequenceConfig(linear="chain")),
  "chain in 4 slices (ZeCO)": ("basic", SequenceConfig(linear="chain", slices=4)),
  "linear attention, one device": ("basic", None),
  "Ring Attention": ("softmax", SequenceConfig(attention="ring")),
  "Ring Attention, zigzag": ("softmax", SequenceConfig(attention="ring", layout="zigzag")),
  "LASP-2H: all-gather of keys and values": ("softmax", SequenceConfig(attention="allgather")),
  "Ulysses": ("softmax", SequenceConfig(attention="ulysses")),
  "softmax attention, one device": ("softmax", None),
}
BASELINE = next(iter(ARMS))
COLUMNS = (
  Column("arm", "method", align="left"),
  Column("layers", align="left"),
  Column("seconds", "step, s", ".3f"),
  Column("least", "least, s", ".3f"),
  Column("ratio", "ratio to LASP-2", ".2f"),
)


def recipe(kind: str, sequence: SequenceConfig | None, devices: int, seq_len: int) -> Recipe:
  """The model of one arm: eight heads, so that Ulysses can give each device one."""
  model = decoder(
    kind, False, vocab_size=512, dim=128, num_layers=2, num_heads=8, hidden_dim=256,
    max_length=seq_len,
  )  # fmt: skip
  mesh = MeshConfig(seq=devices if sequence is not None else 1)
  trainer = TrainerConfig(steps=1, mesh=mesh, progress=False)
  return Recipe(
    model=model, trainer=trainer, batch_size=1, seq_len=seq_len, dtype="float32", sequence=sequence
  )


def prepare(recipe: Recipe) -> Callable[[], float]:
  """Compiles an arm; each call takes one training step and returns its seconds."""
  trainer = Trainer(
    recipe.task(), recipe.trainer, data=iter(()),
    mesh=make_mesh(**dataclasses.asdict(recipe.trainer.mesh)),
  )  # fmt: skip
  shape = (recipe.batch_size, recipe.seq_len)
  rng = np.random.default_rng(0)
  host = {
    "tokens": rng.integers(1, recipe.model.vocab_size, shape, np.int32),
    "segment_ids": np.ones(shape, np.int32),
    "positions": np.broadcast_to(np.arange(recipe.seq_len, dtype=np.int32), shape),
    "loss_mask": np.ones(shape, bool),
  }
  step, batch = trainer.compile(host), trainer.place_batch(host)
  state, frozen = trainer.init_state(), trainer.place_frozen()

  def once() -> float:
    nonlocal state
    begin = time.perf_counter()
    with trainer._context():
      state, metrics = step(state, frozen, batch)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - begin

  once()  # compiles
  return once


def measure(arms: dict[str, Any], devices: int, seq_len: int, rounds: int) -> Table:
  """The table of ``arms`` (a part of ``ARMS`` that holds the baseline)."""
  steps = {
    name: prepare(recipe(kind, sequence, devices, seq_len))
    for name, (kind, sequence) in arms.items()
  }
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  names = list(steps)
  for turn in range(rounds):
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
      seconds[name].append(steps[name]())
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  rows = [
    {
      "arm": name, "layers": "softmax" if arms[name][0] == "softmax" else "linear",
      "seconds": medians[name], "least": min(seconds[name]), "all": seconds[name],
      "ratio": medians[name] / medians[BASELINE],
    }
    for name in names
  ]  # fmt: skip
  return Table(COLUMNS, rows, notes=(
    f"One training step of one row of {seq_len:,} tokens, {devices} simulated devices, float32, "
    f"medians of {rounds} rounds.",
  ))  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--quick", action="store_true", help="T = 2K, one round, nothing written")
  parser.add_argument("--rounds", type=int, default=5)
  arguments = parser.parse_args()
  seq_len, rounds = (2048, 1) if arguments.quick else (32_768, arguments.rounds)
  report = measure(ARMS, 8, seq_len, rounds)
  print(report.markdown())
  if not arguments.quick:
    command = " ".join(["python -m experiments.lasp2.speed", *sys.argv[1:]])
    RESULTS.mkdir(exist_ok=True)
    content = report.json(command=command, machine=describe())
    (RESULTS / "speed.json").write_text(content, encoding="utf-8")
    (RESULTS / "speed.md").write_text(report.markdown(), encoding="utf-8")


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)  # before the backend starts
  main()
