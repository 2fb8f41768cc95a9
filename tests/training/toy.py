# SPDX-License-Identifier: Apache-2.0
"""A task that compiles in no time, and data that goes wrong where told."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.training import OptimizerConfig, Task, TrainerConfig

OPTIMIZER = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0)


class Linear(Task):
  """``sum((a - x)^2) + s^2 sum(b)``: at b = 0 a huge s leaves the loss finite, the gradient not."""

  def __init__(self, start=0.0):
    self.start = start

  def init(self, rng):
    return {"a": jnp.full(3, self.start), "b": {"kernel": jnp.zeros(2)}, "c": jnp.ones(2)}

  def loss(self, params, frozen, batch, rng):
    scale = batch["scale"][0]
    wide = jnp.sum(params["b"]["kernel"]) * scale * scale
    distance = jnp.sum(jnp.square(params["a"] - batch["x"])) + jnp.sum(jnp.square(params["c"]))
    return distance + wide, {}


class Data:
  """``scale`` is 0 but for the steps in ``huge``, ``x`` random but for those in ``nan``;
  reading step ``broken`` fails."""

  def __init__(self, huge=(), nan=(), without=(), broken=None):
    self.huge, self.nan, self.without, self.broken, self.read = huge, nan, without, broken, 0

  def __iter__(self):
    rng = np.random.default_rng(0)
    self.read = 0
    while True:
      self.read += 1
      if self.read == self.broken:
        raise OSError("disk gone")
      x = rng.standard_normal((1, 3), np.float32)
      if self.read in self.without:
        continue
      scale = np.float32(1e30 if self.read in self.huge else 0.0)
      yield {"x": np.full_like(x, np.nan) if self.read in self.nan else x, "scale": scale[None]}


def config(work_dir=None, **kwargs):
  settings = {"steps": 9, "log_every": 3, "checkpoint_every": 3, "progress": False, **kwargs}
  work_dir = None if work_dir is None else str(work_dir)
  return TrainerConfig(work_dir=work_dir, optimizer=OPTIMIZER, **settings)


def assert_same_bits(one, other):
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32))
