# SPDX-License-Identifier: Apache-2.0
"""The experiments on prefill and on the engine run, and what must be exact in them is."""

from __future__ import annotations

import json

import pytest

from experiments.engine import run as engine
from experiments.prefill import run as prefill


@pytest.mark.slow
def test_prefill(tmp_path):
  results = prefill.main(["--tiny", "--output", str(tmp_path)])
  assert results["prepack"][0]["same_first_tokens"]
  assert results["prepack"][0]["packed_tokens"] < results["prepack"][0]["padded_tokens"]
  assert all(row["same_tokens"] for row in results["shared"])
  assert json.loads((tmp_path / "results.json").read_text())["shared"] == results["shared"]


@pytest.mark.slow
def test_engine(tmp_path):
  results = engine.main(["--tiny", "--output", str(tmp_path)])
  assert all(row["same_tokens"] for row in results["rows"])
  assert json.loads((tmp_path / "results.json").read_text())["tokens"] == results["tokens"]
