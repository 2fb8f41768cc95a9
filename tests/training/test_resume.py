# SPDX-License-Identifier: Apache-2.0
"""A run that was killed and resumed has the bits of one that was not."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.training import Trainer, load_params, read_metrics
from tests.training import tiny

SCRIPT = pathlib.Path(tiny.__file__)


def run(work_dir, *args, **kwargs):
  command = [sys.executable, str(SCRIPT), str(work_dir), *map(str, args)]
  return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("uninterrupted") / "run"
  done = run(folder)
  assert done.returncode == 0, done.stderr
  assert f"finished {tiny.STEPS}" in done.stdout
  return folder


def assert_same_run(one, other):
  """Bit-identical parameters, and the same numbers reported once for every step."""
  a, b = load_params(one), load_params(other)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(x, y)
  losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(f)] for f in (one, other)]
  assert losses[0] == losses[1]
  assert [step for step, *_ in losses[0]] == list(range(1, tiny.STEPS + 1))


def test_killed_anywhere_then_resumed_is_bit_identical(uninterrupted, tmp_path):
  folder = tmp_path / "run"
  # Before the first checkpoint, and while the save of step 4 is under way.
  for kill_at in (3, 5):
    killed = run(folder, "--kill-at", kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
  # The save of step 8 fails: the run ends with an error, and the save of step 4 survives.
  failed = run(folder, "--full-at", 6)
  assert failed.returncode == 1 and "File too large" in failed.stderr
  assert [p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()] == ["4"]
  done = run(folder)
  assert done.returncode == 0, done.stderr
  assert "resumed" in done.stdout and "at step 4" in done.stdout
  assert_same_run(uninterrupted, folder)


def test_sigterm_saves_exits_cleanly_and_resumes_bit_identically(uninterrupted, tmp_path):
  folder = tmp_path / "run"
  command = [sys.executable, str(SCRIPT), str(folder), "--pause", "0.2"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  metrics = folder / "metrics.jsonl"
  deadline = time.time() + 120
  while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
    assert time.time() < deadline and process.poll() is None
    time.sleep(0.02)
  process.terminate()
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  assert "saved; the same command resumes" in output
  stopped_at = int(output.split()[-1])
  assert 5 <= stopped_at < tiny.STEPS
  assert (folder / "checkpoints" / str(stopped_at)).is_dir()  # not only every fourth step
  assert run(folder).returncode == 0
  assert_same_run(uninterrupted, folder)


def test_any_step_in_process(tmp_path):
  """Every single step, with data that fails instead of a process that dies."""

  class Broken(tiny.Batches):
    def __next__(self):
      if self.index + 1 == self.broken:
        raise OSError("disk gone")
      return super().__next__()

  def train(folder, broken=None):
    data = Broken()
    data.broken = broken
    return Trainer(tiny.task(), tiny.config(folder, steps=5, checkpoint_every=2), data=data).train()

  reference = train(tmp_path / "reference").params
  folder = tmp_path / "run"
  for step in range(1, 6):
    with pytest.raises(OSError, match="disk gone"):
      train(folder, broken=step)
  resumed = train(folder).params
  for x, y in zip(jax.tree.leaves(reference), jax.tree.leaves(resumed)):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_half_written_checkpoint_is_ignored(uninterrupted, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(uninterrupted, folder)
  checkpoints = folder / "checkpoints"
  last = checkpoints / str(tiny.STEPS)
  # What a save that died leaves: the files, under the temporary name.
  last.rename(checkpoints / f"{tiny.STEPS}.orbax-checkpoint-tmp")
  done = run(folder)
  assert done.returncode == 0, done.stderr
  assert "resumed" in done.stdout and "at step 12" in done.stdout
  assert_same_run(uninterrupted, folder)


def test_finished_run_is_left_alone(uninterrupted):
  before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file()}
  result = Trainer(tiny.task(), tiny.config(uninterrupted, "muon"), data=tiny.Batches()).train()
  assert result.step == tiny.STEPS and not result.interrupted
  after = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file()}
  changed = {p.name for p in after if before.get(p) != after[p]}
  assert changed <= {"metrics.jsonl", ".lock"}
  assert len(read_metrics(uninterrupted)) == tiny.STEPS


def test_another_configuration_is_refused(uninterrupted):
  with pytest.raises(UserError, match=r"another run: trainer\.seed is 0 there and 7 here"):
    Trainer(tiny.task(), tiny.config(uninterrupted, "muon", seed=7), data=tiny.Batches()).train()
  with pytest.raises(UserError, match=r"another run: task\.z_loss is 0\.0 there and 0\.1 here"):
    Trainer(tiny.task(z_loss=0.1), tiny.config(uninterrupted, "muon"), data=tiny.Batches()).train()
  assert len(read_metrics(uninterrupted)) == tiny.STEPS


def test_foreign_folder_is_refused(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(UserError, match="no training run"):
    Trainer(tiny.task(), tiny.config(tmp_path), data=tiny.Batches()).train()
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_a_live_run_is_refused(tmp_path):
  from jaxdec.training.run_folder import RunFolder

  trainer = Trainer(tiny.task(), tiny.config(tmp_path / "run"), data=tiny.Batches())
  first = RunFolder(tmp_path / "run", trainer.resolved)
  with pytest.raises(UserError, match="still going"):
    trainer.train()
  first.close()
  assert trainer.train().step == tiny.STEPS


def test_resolved_config_is_json(uninterrupted):
  stored = json.loads((uninterrupted / "config.json").read_text())
  assert stored["trainer"]["optimizer"]["name"] == "muon"
  assert stored["task"]["model"]["layers"][0]["mixer"]["num_heads"] == 4


def test_load_params_names_the_problem(tmp_path, uninterrupted):
  with pytest.raises(UserError, match="no folder"):
    load_params(tmp_path / "nowhere")
  with pytest.raises(UserError, match="no checkpoint"):
    load_params(tmp_path)
  with pytest.raises(UserError, match="no checkpoint of step 3, only of"):
    load_params(uninterrupted, step=3)
