# SPDX-License-Identifier: Apache-2.0
"""The profile window: which steps it holds, what it leaves, what it refuses."""

from __future__ import annotations

import jax
import pytest

from jaxdec.errors import UserError
from jaxdec.training import Trainer, TrainerConfig
from jaxdec.training.config import parse_window
from tests.training.toy import Data, Linear, config


@pytest.fixture
def calls(monkeypatch):
  found = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append(("start", folder)))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))

  class Annotation:
    def __init__(self, name, step_num):
      found.append(step_num)

    __enter__ = __exit__ = lambda self, *unused: None

  monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
  return found


def train(folder, broken=None, **kwargs):
  settings = config(folder, **{"steps": 6, "checkpoint_every": 4, **kwargs})
  return Trainer(Linear(), settings, data=Data(broken=broken)).train()


def test_window_holds_its_steps_and_no_others(tmp_path, calls):
  train(tmp_path / "run", profile=(3, 5))
  start = ("start", str(tmp_path / "run" / "profile"))
  assert calls == [1, 2, start, 3, 4, "stop"]


def test_trace_ends_with_the_run_and_resumes_in_its_window(tmp_path, calls):
  with pytest.raises(OSError, match="disk gone"):
    train(tmp_path / "run", broken=6, profile=(2, 7))
  assert calls[-1] == "stop"
  calls.clear()
  train(tmp_path / "run", profile=(2, 7))  # from the checkpoint of step 4
  assert [call for call in calls if not isinstance(call, tuple)] == [5, 6, "stop"]


def test_a_trace_is_written(tmp_path):
  train(tmp_path / "run", profile=(3, 4))
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("window", [(5, 5), (5, 3), (0, 2), (9, 12)])
def test_wrong_windows_are_refused(window):
  with pytest.raises(UserError, match=r"profile=\d+:\d+ must be steps START:STOP .* 10 steps"):
    TrainerConfig(steps=10, work_dir="runs/a", profile=window)


def test_a_window_needs_a_folder():
  with pytest.raises(UserError, match="work_dir, which is None"):
    TrainerConfig(steps=10, profile=(10, 11))


def test_windows_on_the_command_line():
  assert parse_window("100:105") == (100, 105)
  for text in ("100", "5:5", "0:3", "a:b", "1:2:3", "-1:2", ""):
    with pytest.raises(UserError, match="START:STOP, such as 100:105"):
      parse_window(text)
