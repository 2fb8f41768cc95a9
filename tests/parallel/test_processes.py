# SPDX-License-Identifier: Apache-2.0
"""Several processes: a preempted pair stops together, and one process can finish the run.

Run as a script it is one process of the pair: ``python test_processes.py PORT INDEX WORK_DIR``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np

from jaxdec.training import MeshConfig, Trainer, read_metrics
from tests.training import tiny

STEPS = 12


class Share(tiny.Batches):
  """This process's rows of each batch; the second process is preempted while it reads batch 5."""

  def __next__(self):
    batch = super().__next__()
    count, index = jax.process_count(), jax.process_index()
    if count == 2 and index == 1 and self.index == 5:
      os.kill(os.getpid(), signal.SIGTERM)
    rows = tiny.ROWS // count
    return {name: value[index * rows : (index + 1) * rows] for name, value in batch.items()}


def train(folder, pause=0.0, **kwargs):
  mesh = MeshConfig(data=jax.process_count())
  settings = tiny.config(folder, steps=STEPS, checkpoint_every=100, mesh=mesh, **kwargs)
  return Trainer(tiny.task(), settings, data=Share(pause=pause)).train()


def test_preempted_pair_stops_together_and_one_process_finishes(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  # One device a process; the pause lets the preemption notice reach the other process in time.
  environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
  pair = [
    subprocess.Popen(
      [sys.executable, __file__, str(port), str(index), str(tmp_path / "pair")],
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for index in (0, 1)
  ]
  outputs = [process.communicate(timeout=300)[0] for process in pair]
  assert [process.returncode for process in pair] == [0, 0]
  ends = [output.split("end ")[1].split()[0] for output in outputs]
  assert ends[0] == ends[1] and 5 <= int(ends[0]) < STEPS
  assert "saved; the same command resumes" in outputs[0]
  assert "step" not in outputs[1]  # only the first process reports

  resumed, one = train(tmp_path / "pair"), train(tmp_path / "one")
  losses = [[row["loss"] for row in read_metrics(tmp_path / f)] for f in ("pair", "one")]
  assert len(losses[0]) == STEPS
  np.testing.assert_allclose(*losses, rtol=1e-4)
  for x, y in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(one.params)):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-3, atol=2e-4)


def main():
  port, index, folder = sys.argv[1:]
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", 2, int(index))
  result = train(folder, pause=0.3, progress=True)
  print("end", result.step, "interrupted" if result.interrupted else "finished", flush=True)


if __name__ == "__main__":
  main()
