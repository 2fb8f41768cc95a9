# SPDX-License-Identifier: Apache-2.0
"""Who the processes are, and which rows each reads; without starting any."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from jaxdec.data import Share
from jaxdec.errors import UserError
from jaxdec.parallel import (
  DEFAULT,
  batch_sharding,
  batch_share,
  distributed,
  make_mesh,
  place_batch,
)
from jaxdec.parallel.distributed import DistributedConfig, detect, initialize

EXPLICIT = {
  "JAXDEC_COORDINATOR": "10.0.0.2:1234", "JAXDEC_NUM_PROCESSES": "4", "JAXDEC_PROCESS_ID": "3",
}  # fmt: skip
SLURM = {
  "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[1-4]", "SLURM_NTASKS": "4",
  "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip


def test_settings_come_from_arguments_then_our_variables_then_those_of_jax():
  found = DistributedConfig().resolve(EXPLICIT)
  assert found == DistributedConfig("10.0.0.2:1234", 4, 3, 300, 100)
  theirs = {
    "JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
    "JAXDEC_HEARTBEAT_TIMEOUT": "7",
  }  # fmt: skip
  assert DistributedConfig().resolve(theirs) == DistributedConfig("h:1", 2, 1, 300, 7)
  assert DistributedConfig().resolve({**theirs, **EXPLICIT}).num_processes == 4
  assert DistributedConfig(process_id=0, start_timeout=5).resolve(EXPLICIT) == (
    DistributedConfig("10.0.0.2:1234", 4, 0, 5, 100)
  )
  assert DistributedConfig().resolve({}) == DistributedConfig(None, None, None, 300, 100)
  assert DistributedConfig().resolve({"JAXDEC_PROCESS_ID": ""}).process_id is None


@pytest.mark.parametrize(
  ("config", "environ", "match"),
  [
    ({"coordinator": "h:1"}, {}, r"got only coordinator; give --num-processes .*JAXDEC_NUM_PROC"),
    ({"process_id": 1}, {}, r"--coordinator \(or JAXDEC_COORDINATOR\) and --num-processes"),
    ({}, {"JAX_COORDINATOR_ADDRESS": "h:1"}, "got only coordinator"),
    ({"coordinator": "h"}, EXPLICIT, "host:port, such as 10.0.0.2:1234, got 'h'"),
    ({"coordinator": "h:port"}, EXPLICIT, "host:port"),
    ({"num_processes": 0}, EXPLICIT, "num_processes must be at least 1, got 0"),
    ({"process_id": 4}, EXPLICIT, r"process_id must be in 0..3 \(num_processes=4\), got 4"),
    ({"process_id": -1}, EXPLICIT, "process_id must be in 0..3"),
    ({}, {**EXPLICIT, "JAXDEC_PROCESS_ID": "two"}, "JAXDEC_PROCESS_ID must be a whole number"),
    ({"start_timeout": 0}, EXPLICIT, "start_timeout must be at least 1 second, got 0"),
  ],
)
def test_settings_that_cannot_be(config, environ, match):
  with pytest.raises(UserError, match=match):
    DistributedConfig(**config).resolve(environ)


def test_slurm_is_found_only_in_a_step_of_several_tasks():
  assert detect(SLURM) == "slurm"
  assert detect({**SLURM, "SLURM_NTASKS": "1"}) == "none"
  assert detect({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}) == "none"
  # It may know what the settings leave open.
  assert DistributedConfig("h:1").resolve(SLURM).num_processes is None


def test_cloud_tpu_is_found_where_there_are_several_hosts(monkeypatch):
  pod = {"TPU_WORKER_HOSTNAMES": "a,b"}
  assert detect(pod) == "none"  # no chips here
  monkeypatch.setattr(distributed, "_on_tpu_vm", lambda: True)
  assert detect(pod) == detect({}) == detect({**pod, "JAX_PLATFORMS": "tpu,cpu"}) == "cloud_tpu"
  assert detect({**pod, "JAX_PLATFORMS": "cpu"}) == "none"
  assert detect({"TPU_WORKER_HOSTNAMES": "localhost"}) == "none"  # a hosted notebook
  slices = {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}
  assert detect(slices) == "cloud_tpu"
  assert detect({**slices, "JAX_PLATFORMS": "cpu"}) == "none"


def test_nothing_is_called_for_one_process(monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("called"))
  for name in (*EXPLICIT, *SLURM):
    monkeypatch.delenv(name, raising=False)
  assert initialize() == "none"
  assert initialize(DistributedConfig("localhost:1", 1, 0)) == "none"


def test_a_late_call_is_refused():
  jax.devices()
  with pytest.raises(UserError, match="were used before the processes were joined"):
    initialize(DistributedConfig("localhost:1", 2, 0))


class Grid:
  """A mesh of devices that other processes have too."""

  def __init__(self, processes, axis_names=("data", "fsdp", "tensor", "seq")):
    self.axis_names = axis_names
    self.devices = np.empty(np.shape(processes), object)
    for where, process in np.ndenumerate(np.asarray(processes)):
      self.devices[where] = types.SimpleNamespace(process_index=int(process))


def test_rows_go_with_the_mesh():
  def shares(processes, shape, rules=DEFAULT):
    grid = Grid(np.reshape(processes, shape))
    return [batch_share(grid, rules, process_index=p) for p in sorted({*processes})]

  # One process after the other along the batch; two devices each.
  assert shares([0, 0, 1, 1], (4, 1, 1, 1)) == [Share((0, 1), 4), Share((2, 3), 4)]
  # Processes that share sequences, or matrices, read the same rows.
  assert shares([0, 0, 1, 1], (1, 1, 1, 4)) == [Share((0,), 1)] * 2
  assert shares([0, 1, 2, 3], (2, 1, 1, 2)) == [Share((0,), 2)] * 2 + [Share((1,), 2)] * 2
  assert shares([0, 1, 2, 3], (1, 2, 2, 1)) == [Share((0,), 2)] * 2 + [Share((1,), 2)] * 2
  # Hosts are 2 x 2 blocks of a 4 x 4 slice: their rows are no neighbours.
  blocks = np.kron([[0, 1], [2, 3]], np.ones((2, 2), int)).reshape(-1)
  assert shares(blocks, (1, 16, 1, 1))[1] == Share((2, 3, 6, 7), 16)
  assert shares([0, 1, 0, 1], (2, 2, 1, 1)) == [Share((0, 2), 4), Share((1, 3), 4)]
  # As the rule says, not as the axes are called.
  assert shares([0, 1], (2, 1, 1, 1), DEFAULT.replace(batch="seq")) == [Share((0,), 1)] * 2


def test_every_row_of_a_batch_is_read_and_none_twice():
  grid = Grid(np.array([0, 1, 1, 0, 2, 3, 3, 2]).reshape(4, 1, 1, 2))
  rows = [batch_share(grid, process_index=p).rows(8).tolist() for p in range(4)]
  assert sorted(rows[0] + rows[2]) == list(range(8))
  assert rows[0] == rows[1] and rows[2] == rows[3]


@pytest.mark.parametrize("sizes", [{"data": 4, "seq": 2}, {"data": 2, "fsdp": 2}, {"seq": 8}, {}])
def test_a_batch_is_placed_as_device_put_would(sizes):
  mesh = make_mesh(**sizes)
  batch = {
    "tokens": np.arange(8 * 16, dtype=np.int32).reshape(8, 16),
    "features": np.arange(8 * 16 * 3, dtype=np.float32).reshape(8, 16, 3),
    "weights": np.arange(8, dtype=np.float32),
  }
  for name, placed in place_batch(batch, mesh).items():
    wanted = jax.device_put(batch[name], batch_sharding(mesh, rank=min(batch[name].ndim, 2)))
    assert placed.sharding.is_equivalent_to(wanted.sharding, placed.ndim)
    for ours, theirs in zip(placed.addressable_shards, wanted.addressable_shards, strict=True):
      assert ours.index == theirs.index
      np.testing.assert_array_equal(ours.data, theirs.data)
