# SPDX-License-Identifier: Apache-2.0
"""Several processes are one run: the same data, the same numbers, the same end."""

from __future__ import annotations

import os
import signal

import jax
import numpy as np
import pytest

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
  # The pause lets the preemption notice reach the other process in time.
  ends = run(
    2, folder=str(folder), mesh={"data": 2}, victim=1, at=4, signal="SIGTERM", pause=0.2,
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
