# SPDX-License-Identifier: Apache-2.0
"""What reports hold, and that the device never waits for them."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from jaxdec.training import metrics, reports
from jaxdec.training.metrics import Progress, memory_use, peak_flops
from pallas_kernels._tpu import chip


class Clock:
  """A time that passes only where told."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(reports.time, "perf_counter", lambda: self.now)


class Result:
  """A number on a device: it takes ``seconds`` of the clock from when the last one was done."""

  def __init__(self, clock, seconds, value=1.0):
    self.clock, self.seconds, self.value, self.asked = clock, seconds, value, False

  def block_until_ready(self):
    if not self.asked:
      self.clock.now += self.seconds
    self.asked = True
    return self

  def __array__(self, dtype=None, copy=None):
    assert self.asked, "fetched before it was ready"
    return np.asarray(self.value, dtype)


class Written(list):
  def write(self, step, kind, values):
    self.append((step, kind, values))


@pytest.fixture
def run(monkeypatch):
  """Feeds steps of given seconds; returns what was written."""
  clock, written = Clock(monkeypatch), Written()
  monkeypatch.setattr(reports.jax, "device_get", lambda rows: jax.tree.map(np.asarray, rows))
  config = types.SimpleNamespace(nan_policy="skip", steps=100)
  task = types.SimpleNamespace(flops_per_token=lambda params, length: 10.0)
  trainer = types.SimpleNamespace(
    config=config, task=task, mesh=types.SimpleNamespace(devices=np.array(jax.devices()[:1])),
    global_rows=lambda rows: rows,
  )  # fmt: skip
  found = reports.Reports(trainer, written, Progress(100, enabled=False))
  found.start({}, {"tokens": np.zeros((4, 25), np.int32)})

  def feed(step, seconds, loss=1.0):
    loss = Result(clock, seconds, loss)
    others = {n: np.float32(1.0) for n in ("grad_norm", "learning_rate")}
    found.add(step, {"loss": loss, **others})
    return loss

  return types.SimpleNamespace(feed=feed, reports=found, written=written, clock=clock)


def test_a_step_just_begun_is_never_waited_for(run):
  first = run.feed(1, 50.0)
  assert not first.asked
  second = run.feed(2, 1.0)
  assert first.asked and not second.asked
  run.reports.request(2)
  assert not second.asked and not run.written
  third = run.feed(3, 1.0)
  assert second.asked and not third.asked and len(run.written) == 1


def test_percentiles_and_rates_leave_out_compilation_and_evaluation(run):
  run.feed(1, 50.0)
  for step, seconds in enumerate([1.0] * 8 + [2.0, 3.0], 2):
    run.feed(step, seconds)
  run.reports.request(11)
  run.reports.flush()
  run.clock.now += 1000.0
  run.reports.evaluated(11, {"loss": 1.0}, 1000.0)
  for step in (12, 13):
    run.feed(step, 4.0)
  run.reports.request(13)
  run.reports.flush()
  first, _, second = (values for *_, values in run.written)
  seconds = [1.0] * 8 + [2.0, 3.0]
  for percent in (50, 90, 99):
    assert first[f"step_seconds_p{percent}"] == np.percentile(seconds, percent)
    assert second[f"step_seconds_p{percent}"] == 4.0
  assert first["tokens_per_second"] == pytest.approx(100 / np.mean(seconds))
  assert first["model_flops_per_second"] == pytest.approx(1000 / np.mean(seconds))
  assert second["tokens_per_second"] == 25.0


def test_memory_is_that_of_the_fullest_local_device():
  def device(stats, process=0):
    return types.SimpleNamespace(process_index=process, memory_stats=lambda: stats)

  one, two = ({"bytes_in_use": a, "peak_bytes_in_use": b} for a, b in ((5, 9), (7, 8)))
  away = device({"bytes_in_use": 99, "peak_bytes_in_use": 99}, process=1)
  assert memory_use([device(one), device(two), away]) == {"hbm_bytes": 7, "hbm_peak_bytes": 9}
  assert memory_use([device(None)]) == {}


def test_peaks_are_those_of_the_kernels_table():
  """Both tables come from data sheets; a chip's cores are one device, but for TPU7x."""
  kinds = {"TPU v4": ("v4", 2), "TPU v5 lite": ("v5e", 1), "TPU v5": ("v5p", 2)}
  kinds |= {"TPU v6 lite": ("v6e", 1), "TPU7x": ("tpu7x", 1)}
  for kind, (name, cores) in kinds.items():
    core = chip(name)
    peak = peak_flops(types.SimpleNamespace(device_kind=kind))
    assert peak == pytest.approx(2 * core.clock_hz * core.macs_per_cycle * cores, rel=0.01)
  assert peak_flops(jax.devices("cpu")[0]) is None


def test_utilisation_is_per_device(run, monkeypatch):
  monkeypatch.setitem(metrics._PEAK, "cpu", 500.0)
  for step in range(1, 4):
    run.feed(step, 4.0)
  run.reports.request(3)
  run.reports.flush()
  assert run.written[0][2]["mfu"] == pytest.approx(100 / 4 * 10 / 500)
