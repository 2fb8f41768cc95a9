# SPDX-License-Identifier: Apache-2.0
"""Several processes are one run: the same data, the same numbers, the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxdec import lm
from jaxdec.drafting.base import Target
from jaxdec.drafting.checkpoint import load_drafter
from jaxdec.training import load_params, read_metrics
from tests.parallel import processes
from tests.parallel.processes import STEPS, rows_seen, run, train

# A process that hangs is missed after so many seconds.
HEARTBEAT = {"JAXDEC_HEARTBEAT_TIMEOUT": "10"}


def finished(ends):
  for end in ends:
    assert end.code == 0, end.err
    assert f"end {STEPS} finished" in end.out
  return ends


def losses(folder):
  rows = read_metrics(folder, "train")
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  return np.array([row["loss"] for row in rows])


def assert_same_data(one, other):
  """Bit for bit the same rows at the same places of every batch."""
  assert rows_seen(one) == rows_seen(other)
  assert [len(rows) for rows in rows_seen(one).values()] == [processes.ROWS] * STEPS


def assert_same_parameters(one, other, **tolerance):
  one, other = load_params(one), load_params(other)
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    if tolerance:
      np.testing.assert_allclose(x, y, **tolerance)
    else:
      np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The run of one process."""
  folder = tmp_path_factory.mktemp("alone") / "run"
  train(folder, mesh={"data": 2})
  return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """The uninterrupted run of two processes."""
  folder = tmp_path_factory.mktemp("pair") / "run"
  ends = finished(run(2, folder=str(folder), mesh={"data": 2}))
  assert "step" not in ends[1].out  # only the first process reports
  return folder


def test_a_preempted_pair_stops_together_and_one_process_finishes_as_if_alone(alone, tmp_path):
  folder = tmp_path / "run"
  # The runtime looks for a preemption notice once a second, then both processes agree on a step:
  # the pauses leave 12 s for that before the last step.
  ends = run(
    2, folder=str(folder), mesh={"data": 2}, victim=1, at=4, signal="SIGTERM", pause=3.0,
    checkpoint_every=100,
  )  # fmt: skip
  assert [end.code for end in ends] == [0, 0], ends
  stopped = {int(end.out.split("end ")[1].split()[0]) for end in ends}
  assert len(stopped) == 1 and 4 <= stopped.pop() < STEPS
  assert "saved; the same command resumes" in ends[0].out
  train(folder, mesh={"data": 2})
  assert_same_data(folder, alone)
  np.testing.assert_allclose(losses(folder), losses(alone), atol=1e-6, rtol=0)
  assert_same_parameters(folder, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_are_one_run(alone, pair):
  assert_same_data(pair, alone)
  np.testing.assert_allclose(losses(pair), losses(alone), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_rows_of_a_process_need_not_be_neighbours(alone, tmp_path):
  folder = tmp_path / "run"
  finished(run(2, folder=str(folder), mesh={"data": 4}, devices=2, interleaved=True))
  assert_same_data(folder, alone)
  np.testing.assert_allclose(losses(folder), losses(alone), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_is_killed_and_both_start_again(pair, tmp_path, victim):
  folder = tmp_path / "run"
  options = dict(folder=str(folder), mesh={"data": 2}, variables=HEARTBEAT)
  at = processes.random_step(f"kill {victim}")
  killed = run(2, victim=victim, at=at, signal="SIGKILL", timeout=90, **options)
  assert killed[victim].code == -signal.SIGKILL
  # The other one does not wait for ever, and says why it ends.
  other = killed[1 - victim]
  assert other.code not in (0, None), other.err
  assert other.seconds - killed[victim].seconds < 30
  said = "one may have died first", "another task died"
  assert any(text in other.err for text in said), other.err
  finished(run(2, **options))
  assert_same_parameters(folder, pair)
  np.testing.assert_array_equal(losses(folder), losses(pair))
  assert_same_data(folder, pair)


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(tmp_path):
  ends = run(
    2, folder=str(tmp_path / "run"), mesh={"data": 2}, victim=1, at=3, signal="SIGSTOP",
    timeout=60, variables=HEARTBEAT, wait_for=[0],
  )  # fmt: skip
  assert ends[0].code != 0 and "another task died" in ends[0].err


@pytest.mark.slow
def test_from_two_processes_to_one_and_another_mesh_and_back(alone, tmp_path):
  folder = tmp_path / "run"
  run(2, folder=str(folder), mesh={"data": 2}, victim=1, at=3, signal="SIGTERM", pause=0.2)

  def stop():
    os.kill(os.getpid(), signal.SIGTERM)

  half = train(folder, mesh={"fsdp": 2, "tensor": 2}, at=6, act=stop)
  assert half.interrupted and half.step == 6
  finished(run(2, folder=str(folder), mesh={"fsdp": 2}))
  assert_same_data(folder, alone)
  np.testing.assert_allclose(losses(folder), losses(alone), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh", "kind"),
  [({"data": 2, "seq": 2}, "gather"), ({"seq": 4}, "zigzag")],
)
def test_four_processes_with_split_sequences(alone, tmp_path, mesh, kind):
  folder = tmp_path / "run"
  finished(run(4, folder=str(folder), mesh=mesh, kind=kind))
  assert_same_data(folder, alone)
  np.testing.assert_allclose(losses(folder), losses(alone), atol=1e-5, rtol=0)


CONFIG = """\
from jaxdec.models import tiny_llama
from jaxdec.training import MeshConfig, Recipe, TrainerConfig


def get_config():
  model = tiny_llama(
    vocab_size=4096, dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=64
  )
  trainer = TrainerConfig(steps=3, log_every=1, mesh=MeshConfig(data=2))
  return Recipe(
    model=model, trainer=trainer, batch_size=4, seq_len=32, eval_batches=1, data={data!r}
  )
"""


@pytest.fixture
def command(tmp_path):
  """The arguments of `jaxdec train` for a tiny run."""
  data = tmp_path / "text"
  data.mkdir()
  for number in range(60):
    (data / f"{number}.txt").write_text(f"words of document {number} " * 20)
  config = tmp_path / "config.py"
  config.write_text(CONFIG.format(data=str(data)))
  return ["train", str(config), "--work-dir", str(tmp_path / "run")]


def jaxdec(*args, **variables):
  """Starts the command line with one device."""
  environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
  return subprocess.Popen(
    [sys.executable, "-m", "jaxdec", *map(str, args)],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, **variables},
  )  # fmt: skip


@pytest.mark.slow
def test_the_command_line_on_two_processes(command, tmp_path):
  where = ["--coordinator", f"localhost:{processes.free_port()}", "--num-processes", 2]
  pair = [jaxdec(*command, *where, "--process-id", i, **HEARTBEAT) for i in range(2)]
  outputs = [process.communicate(timeout=200) for process in pair]
  assert [process.returncode for process in pair] == [0, 0], outputs
  assert "step 3/3" in outputs[0][0] and "step" not in outputs[1][0]
  # A mistake that only one of them can see ends both, with its sentence.
  where[1] = f"localhost:{processes.free_port()}"
  command[command.index("--work-dir") + 1] = str(tmp_path / "text")
  pair = [jaxdec(*command, *where, "--process-id", i, **HEARTBEAT) for i in range(2)]
  outputs = [process.communicate(timeout=200) for process in pair]
  assert pair[0].returncode == 2
  assert "jaxdec: process 0 of 2: work_dir" in outputs[0][1] and "no training run" in outputs[0][1]
  assert pair[1].returncode not in (0, None)


@pytest.mark.slow
def test_a_drafter_distilled_on_two_processes(command, tmp_path):
  """The target's parameters too are split over both."""
  folder, port = tmp_path / "drafter", processes.free_port()
  options = {
    "--drafter": "medusa", "--num-heads": 2, "--steps": 2, "--batch-size": 4, "--seq-len": 32,
    "--mesh": "fsdp=2", "--data": tmp_path / "text", "--work-dir": folder,
  }  # fmt: skip
  args = [str(part) for option in options.items() for part in option]
  where = {"JAXDEC_COORDINATOR": f"localhost:{port}", "JAXDEC_NUM_PROCESSES": "2", **HEARTBEAT}
  pair = [jaxdec("distill", *args, **where, JAXDEC_PROCESS_ID=str(i)) for i in range(2)]
  outputs = [process.communicate(timeout=300) for process in pair]
  assert [process.returncode for process in pair] == [0, 0], outputs
  assert "medusa trained" in outputs[0][0] and "trained" not in outputs[1][0]
  tiny = lm.tiny()
  drafter, _ = load_drafter(folder, Target(tiny.model, tiny.params, None))
  assert drafter.num_heads == 2


@pytest.mark.slow
def test_processes_that_never_meet(command):
  port, other = processes.free_port(), processes.free_port()
  timeout = {"JAXDEC_START_TIMEOUT": "15"}

  def start(index, count, port):
    where = ["--coordinator", f"localhost:{port}", "--num-processes", count, "--process-id", index]
    return jaxdec(*command, *where, **timeout)

  nowhere, first, second, waits = (
    start(1, 2, processes.free_port()), start(0, 2, port), start(1, 3, port), start(0, 2, other)
  )  # fmt: skip
  ends = []
  for process in (nowhere, first, second, waits):
    _, err = process.communicate(timeout=120)
    ends.append(err)
    assert process.returncode == 2, err
  assert "no coordinator answers at localhost" in ends[0] and "after 15 s" in ends[0]
  assert "process 0 was started with num_processes=2 and process 1 with num_processes=3" in ends[1]
  assert "process 1 was started with num_processes=3 and process 0 with num_processes=2" in ends[2]
  assert "is there, but not all 2 processes came within 15 s" in ends[3]
  assert "process 0 of 2 waits for the others, 15 s at most" in ends[3]
