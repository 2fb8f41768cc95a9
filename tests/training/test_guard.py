# SPDX-License-Identifier: Apache-2.0
"""Steps that are not finite: never kept, named, counted."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.training import Trainer, TrainerConfig, read_metrics
from tests.training.toy import Data, Linear, assert_same_bits, config


def saved(folder):
  return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def test_stop_names_the_gradient_and_keeps_the_last_good_checkpoint(tmp_path):
  data = Data(huge=(5,))
  with pytest.raises(UserError, match=r"step 5: the loss is [\d.]+, the gradient of 'b/kernel' is"):
    Trainer(Linear(), config(tmp_path / "run", log_every=100), data=data).train()
  assert data.read == 6  # found while the next step ran, not at the next report
  assert saved(tmp_path / "run") == [3]


def test_the_last_step_before_a_save_is_judged_too(tmp_path):
  with pytest.raises(UserError, match=r"step 6: the loss is nan, the gradient of 'a' "):
    Trainer(Linear(), config(tmp_path / "run", log_every=100), data=Data(nan=(6,))).train()
  assert saved(tmp_path / "run") == [3]


def test_stop_names_a_parameter_that_is_not_finite():
  with pytest.raises(UserError, match=r"step 1: the loss is nan, the parameter 'a' is not finite"):
    Trainer(Linear(np.nan), config(), data=Data()).train()


def test_stopped_run_goes_on_with_skip(tmp_path):
  folder = tmp_path / "run"
  with pytest.raises(UserError, match="nan_policy='skip' leaves such steps out"):
    Trainer(Linear(), config(folder), data=Data(nan=(5,))).train()
  result = Trainer(Linear(), config(folder, nan_policy="skip"), data=Data(nan=(5,))).train()
  without = Trainer(Linear(), config(steps=8), data=Data(without=(5,))).train()
  assert result.step == 9
  assert_same_bits(result.params, without.params)


def test_a_skipped_step_changes_no_bit():
  trainer = Trainer(Linear(), config(nan_policy="skip", ema=0.9), data=Data())
  step, batches = trainer.compile(next(iter(Data()))), iter(Data(nan=(3,), huge=(4,)))
  state = trainer.init_state()
  for _ in range(2):
    state, _ = step(state, {}, next(batches))
  before = jax.tree.map(np.array, state)
  for _ in range(2):
    state, metrics = step(state, {}, next(batches))
    assert not bool(metrics["health"].finite)
  assert int(state.step) == 4
  assert_same_bits(state.replace(step=before.step), before)
  state, _ = step(state, {}, next(batches))
  assert not np.array_equal(state.params["a"], before.params["a"])


def test_skipped_steps_are_counted_and_in_no_mean(tmp_path):
  folder = tmp_path / "run"
  settings = config(folder, nan_policy="skip", max_skips=2)
  Trainer(Linear(), settings, data=Data(nan=(4, 5, 7, 8))).train()
  rows = read_metrics(folder, "train")
  assert [row["skipped"] for row in rows] == [0, 2, 2]
  assert all(isinstance(row["loss"], float) for row in rows)  # NaN is written as a string


def test_too_many_in_a_row_stop(tmp_path):
  settings = config(tmp_path / "run", nan_policy="skip", max_skips=2)
  with pytest.raises(UserError, match=r"step 6: .*3 steps in a row were like it \(max_skips=2\)"):
    Trainer(Linear(), settings, data=Data(nan=(4, 5, 6))).train()
  assert saved(tmp_path / "run") == [3]


def test_unknown_policies_are_refused():
  with pytest.raises(UserError, match="nan_policy must be one of stop, skip, got 'ignore'"):
    TrainerConfig(nan_policy="ignore")
  with pytest.raises(UserError, match="max_skips must be at least 1, got 0"):
    TrainerConfig(max_skips=0)
