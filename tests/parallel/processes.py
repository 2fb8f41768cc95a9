# SPDX-License-Identifier: Apache-2.0
"""A training run on several real processes of this machine, over loopback.

``run`` starts them and collects how they ended; ``train`` is what each does, or a single process.
Run as a script it is one of them: ``python processes.py '{"folder": ..., ...}'``; which one it is
stands in the environment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np

STEPS, ROWS, LENGTH, VOCAB = 8, 8, 16, 64


@dataclasses.dataclass(frozen=True)
class End:
  """How a process ended: exit code (negative: signal), what it wrote, seconds it lived."""

  code: int
  out: str
  err: str
  seconds: float


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start(index, count, port, options, *, script=__file__, devices=1, **variables):
  environment = {
    **os.environ,
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "PYTHONPATH": os.pathsep.join(sys.path),
    "JAXDEC_COORDINATOR": f"localhost:{port}",
    "JAXDEC_NUM_PROCESSES": str(count),
    "JAXDEC_PROCESS_ID": str(index),
    **variables,
  }
  return subprocess.Popen(
    [sys.executable, script, json.dumps(options)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  )


def run(
  count: int, *, timeout=300, devices=1, variables=None, wait_for=None, **options
) -> list[End]:
  """Starts ``count`` processes and waits for all, or those named; none outlives the call."""
  begin, port = time.monotonic(), free_port()
  processes = [
    start(i, count, port, options, devices=devices, **(variables or {})) for i in range(count)
  ]
  ends: dict[int, End] = {}
  try:
    while not ends.keys() >= set(range(count) if wait_for is None else wait_for):
      assert time.monotonic() - begin < timeout, f"still running after {timeout} s"
      for i, process in enumerate(processes):
        if i not in ends and process.poll() is not None:
          seconds = time.monotonic() - begin
          ends[i] = End(process.returncode, *process.communicate(), seconds)
      time.sleep(0.05)
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
        process.communicate()
  return [ends.get(i) for i in range(count)]


def corpus():
  """Documents of a learnable sequence, ``next = 3 * token + 1 mod V``."""
  from jaxdec.data import Corpus

  lengths = np.random.default_rng(0).integers(3, 40, 200)
  tokens = np.random.default_rng(1).integers(0, VOCAB, lengths.sum())
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  for begin, end in itertools.pairwise(offsets):
    for t in range(begin + 1, end):
      tokens[t] = (3 * tokens[t - 1] + 1) % VOCAB
  return Corpus(tokens.astype(np.int32), offsets)


class Watched:
  """A data iterator that notes the rows it gives, acts at a step, and is slow from there on."""

  def __init__(self, data, rows, note: pathlib.Path, at=None, act=None, pause=0.0):
    self.data, self.rows, self.note, self.at, self.act = data, rows, note, at, act
    self.step, self.pause = 0, pause

  def __iter__(self):
    return self

  def __next__(self):
    self.step += 1
    if self.at is not None and self.step >= self.at:
      if self.step == self.at:
        self.act()
      time.sleep(self.pause)
    batch = next(self.data)
    seen = {
      int(row): hashlib.sha256(b"".join(v[i].tobytes() for v in batch.values())).hexdigest()
      for i, row in enumerate(self.rows)
    }
    with self.note.open("a") as file:
      file.write(json.dumps([self.step, seen]) + "\n")
    return batch

  def get_state(self):
    return {**self.data.get_state(), "step": self.step}

  def set_state(self, state):
    self.step = state["step"]
    self.data.set_state({k: v for k, v in state.items() if k != "step"})


def rows_seen(folder) -> dict[int, dict[int, str]]:
  """Step -> global row -> hash, of all processes; they must agree where several read a row."""
  steps: dict[int, dict[int, str]] = {}
  for note in pathlib.Path(folder).parent.glob(f"{pathlib.Path(folder).name}.rows-*"):
    for line in note.read_text().splitlines():
      step, seen = json.loads(line)
      for row, digest in seen.items():
        assert steps.setdefault(step, {}).setdefault(int(row), digest) == digest
  return steps


def task(kind: str):
  from jaxdec.models import Decoder, tiny_llama
  from jaxdec.parallel.sequence import SequenceConfig
  from jaxdec.training import LanguageModel

  config = tiny_llama(
    vocab_size=VOCAB, dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=64
  )
  sequence = {
    "plain": None,
    "gather": SequenceConfig(),
    "zigzag": SequenceConfig(layout="zigzag"),
  }[kind]
  return LanguageModel(Decoder(config, sequence=sequence))


def train(
  folder, *, mesh, kind="plain", at=None, act=None, pause=0.0, interleaved=False, **settings
):
  """Trains, or resumes, on a mesh of these sizes.

  ``interleaved``: the first device of every process, then the second of every process.
  """
  import jax

  from jaxdec.data import make_dataset
  from jaxdec.parallel import batch_share, make_mesh
  from jaxdec.training import MeshConfig, OptimizerConfig, Trainer, TrainerConfig

  settings = {"steps": STEPS, "checkpoint_every": 3, "log_every": 1, "progress": True, **settings}
  config = TrainerConfig(
    work_dir=str(folder),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    mesh=MeshConfig(**mesh),
    **settings,
  )
  devices = sorted(jax.devices(), key=lambda d: d.id % 2) if interleaved else None
  mesh = make_mesh(devices=devices, **mesh)
  share = batch_share(mesh)
  data = make_dataset(corpus(), batch_size=ROWS, seq_len=LENGTH, seed=3, share=share)
  note = pathlib.Path(f"{folder}.rows-{jax.process_index()}")
  data = Watched(data, share.rows(ROWS), note, at, act, pause)
  return Trainer(task(kind), config, data=data, mesh=mesh).train()


def random_step(seed: str) -> int:
  """A step at which to kill: any but the first, which compiles."""
  return random.Random(seed).randint(2, STEPS)


def main():
  options = json.loads(sys.argv[1])
  victim, name = options.pop("victim", None), options.pop("signal", None)
  from jaxdec.parallel.distributed import fail_fast, initialize

  assert initialize() == initialize() == "explicit"  # the second call changes nothing
  import jax

  is_victim = victim == jax.process_index()
  options["act"] = lambda: is_victim and os.kill(os.getpid(), getattr(signal, name))
  with fail_fast():
    result = train(options.pop("folder"), **options)
    print("end", result.step, "interrupted" if result.interrupted else "finished", flush=True)


if __name__ == "__main__":
  main()
