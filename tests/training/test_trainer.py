# SPDX-License-Identifier: Apache-2.0
"""The trainer on a task small enough to check by hand: y = x w with a frozen teacher."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.training import OptimizerConfig, Task, Trainer, TrainerConfig, read_metrics


class Regression(Task):
  """Mean squared distance to a frozen matrix's output over the rows with ``mask`` set."""

  def __init__(self):
    self.teacher = np.random.default_rng(1).standard_normal((4, 3), np.float32)
    self.traces = 0

  def init(self, rng):
    return {"kernel": jnp.zeros((4, 3))}

  @property
  def frozen(self):
    return {"kernel": self.teacher}

  def loss(self, params, frozen, batch, rng):
    self.traces += 1
    error = batch["x"] @ (params["kernel"] - frozen["kernel"])
    weight = jnp.sum(batch["mask"])
    by_output = jnp.sum(jnp.square(error) * batch["mask"][:, None], 0) / jnp.maximum(weight, 1.0)
    return jnp.sum(by_output), {"by_output": by_output, "weight": weight}


def batches(count=None, rows=8, seed=0):
  rng = np.random.default_rng(seed)
  while count is None or count > 0:
    mask = (rng.random(rows) < 0.6).astype(np.float32)
    mask[0] = 1.0
    yield {"x": rng.standard_normal((rows, 4), np.float32), "mask": mask}
    count = None if count is None else count - 1


class Stream:
  """Starts anew with each ``iter``: data without a state of its own."""

  def __init__(self, count=None):
    self.count = count

  def __iter__(self):
    return batches(self.count)


def config(work_dir=None, **kwargs):
  optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
  settings = {"steps": 60, "optimizer": optimizer, "progress": False, **kwargs}
  return TrainerConfig(work_dir=None if work_dir is None else str(work_dir), **settings)


def test_learns_and_leaves_the_teacher_alone():
  task = Regression()
  before = task.teacher.copy()
  result = Trainer(task, config(steps=200), data=Stream()).train()
  assert result.step == 200 and not result.interrupted
  np.testing.assert_allclose(result.params["kernel"], task.teacher, atol=1e-2)
  np.testing.assert_array_equal(task.teacher, before)


def test_step_and_evaluation_compile_once(tmp_path):
  task = Regression()
  settings = config(tmp_path / "run", eval_every=10, checkpoint_every=7)
  Trainer(task, settings, data=Stream(), eval_data=list(batches(2))).train()
  assert task.traces == 2
  assert [r["step"] for r in read_metrics(tmp_path / "run", "eval")] == list(range(10, 61, 10))


def test_teacher_is_an_argument_not_a_constant():
  task = Regression()
  trainer = Trainer(task, config(), data=Stream())
  state, batch = trainer.init_state(), trainer.place_batch(next(batches()))
  step = trainer.compile(next(batches()))
  other = {"kernel": jnp.zeros((4, 3))}
  _, metrics = step(state, other, batch)
  assert float(metrics["loss"]) == 0.0  # zero weights against the zero teacher, not task.teacher


@pytest.mark.parametrize("slices", [2, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(slices):
  task = Regression()
  batch = next(batches())
  params, frozen = {"kernel": jnp.ones((4, 3))}, {"kernel": jnp.asarray(task.teacher)}
  results = [
    jax.jit(Trainer(task, config(accumulate=n), data=Stream())._gradients)(
      params, frozen, batch, jax.random.key(0)
    )
    for n in (1, slices)
  ]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), *results)


def test_evaluation_is_the_mean_over_all_items():
  """Batches of unequal weight count by it: the split into batches does not matter."""
  task = Regression()
  parts = list(batches(3))
  whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
  params = {"kernel": jnp.ones((4, 3))}
  frozen = {"kernel": jnp.asarray(task.teacher)}
  split, joined = (
    Trainer(task, config(), data=Stream(), eval_data=data).evaluate(params, frozen)
    for data in (parts, lambda: [whole])
  )
  assert split["by_output"].shape == (3,)
  np.testing.assert_allclose(split["loss"], joined["loss"], rtol=1e-5)
  np.testing.assert_allclose(split["by_output"], joined["by_output"], rtol=1e-5)


def test_data_without_state_resumes_by_replay(tmp_path):
  def train(folder, data):
    return Trainer(Regression(), config(folder, steps=9, checkpoint_every=4), data=data).train()

  one = train(tmp_path / "one", Stream())
  with pytest.raises(UserError, match="data ended before step 7 of 9"):
    train(tmp_path / "two", Stream(count=6))
  two = train(tmp_path / "two", Stream())
  np.testing.assert_array_equal(np.asarray(one.params["kernel"]), np.asarray(two.params["kernel"]))


def test_diverged_loss_stops_and_is_never_saved(tmp_path):
  class Poisoned(Stream):
    def __iter__(self):
      for i, batch in enumerate(batches()):
        yield {**batch, "x": batch["x"] * (np.nan if i == 5 else 1.0)}

  with pytest.raises(UserError, match="loss is nan"):
    Trainer(Regression(), config(tmp_path / "run", checkpoint_every=3), data=Poisoned()).train()
  assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
  assert not (tmp_path / "run" / "checkpoints" / "6").exists()


def test_short_run_prints_at_most_thirty_lines(capsys):
  data = list(batches(2))
  Trainer(Regression(), config(steps=500, progress=True), data=Stream(), eval_data=data).train()
  lines = capsys.readouterr().out.splitlines()
  assert 20 <= len(lines) <= 30
  assert "tok/s" in lines[-2] and "eta" in lines[-2] and "FLOP/s" in lines[-2]


def test_reports_average_their_window(tmp_path):
  fine, coarse = tmp_path / "fine", tmp_path / "coarse"
  for folder, every in ((fine, 1), (coarse, 4)):
    Trainer(Regression(), config(folder, steps=8, log_every=every), data=Stream()).train()
  losses = [row["loss"] for row in read_metrics(fine, "train")]
  assert len(losses) == 8
  means = [np.mean(losses[:4]), np.mean(losses[4:])]
  np.testing.assert_allclose([row["loss"] for row in read_metrics(coarse)], means, rtol=1e-6)


def test_batches_must_keep_their_shape():
  class Growing(Stream):
    def __iter__(self):
      yield next(batches(rows=8))
      yield next(batches(rows=16))

  with pytest.raises(UserError, match=r"batch 2 has shapes .*16.*the first one had .*8"):
    Trainer(Regression(), config(), data=Growing()).train()


def test_settings_out_of_range():
  with pytest.raises(UserError, match="accumulate must be at least 1, got 0"):
    TrainerConfig(accumulate=0)
  with pytest.raises(UserError, match=r"8 rows.*3 accumulation steps.*multiple of 3"):
    Trainer(Regression(), config(accumulate=3), data=Stream()).train()


def test_missing_tensorboard_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(UserError, match="pip install tensorboardX"):
    Trainer(Regression(), config(tmp_path / "run", tensorboard=True), data=Stream()).train()


def test_tensorboard_files_on_request(tmp_path):
  pytest.importorskip("tensorboardX")
  Trainer(Regression(), config(tmp_path / "run", tensorboard=True), data=Stream()).train()
  assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_lines_cut_off_by_a_crash_are_dropped(tmp_path):
  from jaxdec.training.metrics import MetricsWriter

  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 1, "kind": "train", "loss": 3.0}\n{"step": 2, "kind": "train", "loss": 2.0}\n{"st'
  )
  writer = MetricsWriter(tmp_path, resume_step=1)
  writer.write(2, "train", {"loss": np.float32(2.5), "by_output": np.ones(2)})
  writer.close()
  rows = read_metrics(tmp_path)
  assert [row["loss"] for row in rows] == [3.0, 2.5]
  assert rows[1]["by_output"] == [1.0, 1.0]
