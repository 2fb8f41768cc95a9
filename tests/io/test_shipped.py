# SPDX-License-Identifier: Apache-2.0
"""What ships with the package works as it lies there: the embedded model and its drafters."""

from __future__ import annotations

import json

import pytest

import jaxdec
from jaxdec.lm import TINY

PROMPTS = ["def fib(n):", "class Stack:\n  def push(self, item):\n    self.items"]


@pytest.fixture(scope="module")
def lm():
  return jaxdec.tiny()


def test_the_model_writes_python(lm):
  """Not a random model: after ``self`` comes an attribute, and its measured loss is on record."""
  out = lm.generate(["    self"], max_new_tokens=1)
  assert out.text[0].startswith(".")
  metrics = json.loads((TINY / "metrics.json").read_text(encoding="utf-8"))
  assert 0.5 < metrics["test"]["bits_per_byte"] < 1.2
  assert (TINY / "model.safetensors").stat().st_size < 20e6


@pytest.mark.parametrize("name", ["medusa", "hydra", "eagle3"])
def test_drafters_save_passes_and_change_no_token(lm, name):
  for temperature in (0.0, 1.0):
    options = dict(max_new_tokens=32, temperature=temperature, seed=2, stop=None)
    plain = lm.generate(PROMPTS, **options)
    fast = lm.generate(PROMPTS, **options, drafter=name)
    assert fast.tokens == plain.tokens
    assert fast.text == plain.text
    assert fast.stats.tokens_per_step > 1.1  # random heads give about 1.0
