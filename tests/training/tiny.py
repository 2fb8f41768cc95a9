# SPDX-License-Identifier: Apache-2.0
"""A language model small enough to train in a test, and data whose position is exact.

Run as a script it is one training run, killed where told:
``python tiny.py WORK_DIR [--kill-at STEP | --full-at STEP] [--pause SECONDS]``.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import signal
import time

import numpy as np

STEPS = 14
VOCAB, LENGTH, ROWS = 64, 16, 8


class Batches:
  """Packed batches of a learnable sequence: ``next = 3 * token + 1 mod V``, two documents a row."""

  def __init__(self, rows: int = ROWS, *, seed: int = 0, kill_at=None, full_at=None, pause=0.0):
    self.rows, self.seed, self.pause = rows, seed, pause
    self.kill_at, self.full_at = kill_at, full_at
    self.saved = pathlib.Path("checkpoints/4")
    self.index = 0

  def __iter__(self):
    return self

  def __next__(self):
    self.index += 1
    if self.index == self.kill_at:
      os.kill(os.getpid(), signal.SIGKILL)
    if self.index == self.full_at:
      while not self.saved.exists():  # the save before this one, still under way
        time.sleep(0.01)
      # Like a full disk: reports still fit, a checkpoint's arrays do not.
      resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
    time.sleep(self.pause)
    rng = np.random.default_rng((self.seed, self.index))
    half = LENGTH // 2
    tokens = np.zeros((self.rows, 2, half), np.int64)
    tokens[..., 0] = rng.integers(0, VOCAB, (self.rows, 2))
    for t in range(1, half):
      tokens[..., t] = (3 * tokens[..., t - 1] + 1) % VOCAB
    segments = np.broadcast_to(np.array([[1], [2]]), tokens.shape).copy()
    # Rows of different length: the last ones end in padding.
    segments[self.rows // 2 :, 1, half // 2 :] = 0
    shape = (self.rows, LENGTH)
    return {
      "tokens": tokens.reshape(shape).astype(np.int32),
      "segment_ids": segments.reshape(shape).astype(np.int32),
      "positions": np.tile(np.arange(half, dtype=np.int32), (self.rows, 2)),
      "loss_mask": (segments != 0).reshape(shape),
    }

  def get_state(self):
    return {"index": self.index}

  def set_state(self, state):
    self.index = state["index"]


def task(layout: str = "unrolled", **kwargs):
  from jaxdec.models import Decoder, tiny_llama
  from jaxdec.training import LanguageModel

  config = tiny_llama(
    vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=64
  )
  return LanguageModel(Decoder(config, layout=layout), **kwargs)


def config(work_dir, optimizer: str = "adamw", **kwargs):
  from jaxdec.training import OptimizerConfig, TrainerConfig

  settings = {"steps": STEPS, "checkpoint_every": 4, "log_every": 1, "progress": False, **kwargs}
  optimizer = OptimizerConfig(name=optimizer, learning_rate=1e-2, warmup_steps=3)
  work_dir = None if work_dir is None else str(work_dir)
  return TrainerConfig(work_dir=work_dir, optimizer=optimizer, **settings)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("work_dir")
  parser.add_argument("--kill-at", type=int)
  parser.add_argument("--full-at", type=int)
  parser.add_argument("--pause", type=float, default=0.0)
  args = parser.parse_args()
  from jaxdec.training import Trainer

  data = Batches(kill_at=args.kill_at, full_at=args.full_at, pause=args.pause)
  data.saved = pathlib.Path(args.work_dir) / data.saved
  result = Trainer(task(), config(args.work_dir, "muon", progress=True), data=data).train()
  print("interrupted" if result.interrupted else "finished", result.step, flush=True)


if __name__ == "__main__":
  main()
