# SPDX-License-Identifier: Apache-2.0
"""experiments/bench/kernels.py: a tiny run, its files, and what it says it left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*arguments):
  command = [sys.executable, "experiments/bench/kernels.py", *map(str, arguments)]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  env.pop("XLA_FLAGS", None)
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bench")
  ops = ("linear_attention", "linear_cross_entropy")
  done = bench("--preset", "tiny", "--ops", *ops, "--output", folder)
  assert done.returncode == 0, done.stderr[-3000:]
  (path,) = folder.glob("kernels_*.json")
  return path, json.loads(path.read_text()), done.stdout


def test_files(tiny):
  path, content, stdout = tiny
  assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
  markdown = path.with_suffix(".md").read_text()
  assert markdown in stdout and content["command"] in markdown
  for row in content["rows"]:
    assert f"| {row['op']}" in markdown and row["spec"] in markdown


def test_rows(tiny):
  _, content, _ = tiny
  rows = content["rows"]
  assert {row["op"] for row in rows} == {"linear_attention", "linear_cross_entropy"}
  assert {row["pass"] for row in rows} == {"forward", "forward + backward"}
  for row in rows:
    assert row["ms"] is None  # of a CPU only ratios are told
    assert row["temp_mib"] >= 0
    if row["arm"] == row["base"]:
      assert row["ratio"] == 1
    else:
      assert row["ratio"] > 0 and row["difference"] < 1e-4  # the same function was timed
  arms = {row["arm"] for row in rows if row["op"] == "linear_cross_entropy"}
  assert {"xla", "reference", "all logits"} <= arms


def test_the_expected_row_and_what_is_missing(tiny):
  _, content, _ = tiny
  (check,) = content["checks"].values()
  assert check["asked"] == 3 and check["times_as_fast"] > 0
  assert any("kernels need a GPU" in reason for reason in content["left_out"])


def test_an_unknown_op_is_one_sentence(tmp_path):
  done = bench("--ops", "linear_atention", "--output", tmp_path)
  assert done.returncode == 2 and "linear_atention" in done.stderr
  assert not list(tmp_path.iterdir())
