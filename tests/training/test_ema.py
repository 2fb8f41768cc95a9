# SPDX-License-Identifier: Apache-2.0
"""The average of the parameters: its formula, its place, its evaluation, its checkpoints."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.training import MeshConfig, Trainer, TrainerConfig, load_params
from tests.training import tiny
from tests.training.toy import Data, Linear, assert_same_bits, config


def trainer(work_dir=None, broken=None, **kwargs):
  settings = config(work_dir, ema=0.3, **{"steps": 5, "checkpoint_every": 2, **kwargs})
  return Trainer(Linear(), settings, data=Data(broken=broken), eval_data=[next(iter(Data()))])


def test_average_follows_its_formula_and_is_evaluated():
  run, data = trainer(), iter(Data())
  step, state = run.compile(next(iter(Data()))), run.init_state()
  expected = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
  for t in range(5):
    state, _ = step(state, {}, run.place_batch(next(data)))
    decay = min(0.3, (1 + t) / (10 + t))  # 0.3 from t = 3 on
    expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, expected, state.params)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state.ema, expected)
  result = trainer().train()
  assert_same_bits(result.ema, state.ema)
  losses = [run.evaluate(params, {})["loss"] for params in (result.ema, result.params)]
  assert result.metrics["loss"] == losses[0] != losses[1]


def test_killed_and_resumed_average_is_bit_identical(tmp_path):
  whole = trainer(tmp_path / "one").train()
  with pytest.raises(OSError, match="disk gone"):
    trainer(tmp_path / "two", broken=4).train()
  resumed = trainer(tmp_path / "two").train()
  assert_same_bits(whole.ema, resumed.ema)
  assert_same_bits(whole.ema, load_params(tmp_path / "two", ema=True))
  assert_same_bits(whole.params, load_params(tmp_path / "two"))


def test_average_lies_where_the_parameters_lie():
  settings = tiny.config(None, ema=0.9, mesh=MeshConfig(fsdp=2, tensor=2))
  shardings = Trainer(tiny.task(), settings, data=tiny.Batches()).shardings
  split = [s.spec for s in jax.tree.leaves(shardings.params)]
  assert split == [s.spec for s in jax.tree.leaves(shardings.ema)]
  assert any(any(spec) for spec in split)


def test_missing_average_and_wrong_decay_are_named(tmp_path):
  Trainer(Linear(), config(tmp_path / "run", steps=1), data=Data()).train()
  with pytest.raises(UserError, match="trained without ema"):
    load_params(tmp_path / "run", ema=True)
  with pytest.raises(UserError, match=r"ema must lie between 0 and 1.*got 1\.5"):
    TrainerConfig(ema=1.5)
