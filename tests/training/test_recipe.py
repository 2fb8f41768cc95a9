# SPDX-License-Identifier: Apache-2.0
"""Configuration files: what they may return, presets, and every way to get one wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.models import tiny_llama
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.training import MeshConfig, Recipe, TrainerConfig, load_recipe

GOOD = """
from jaxdec.models import tiny_llama
from jaxdec.training import Recipe, TrainerConfig

def get_config(preset="small"):
  width = {"small": 64, "large": 128}[preset]
  return Recipe(
    model=tiny_llama(dim=width, num_layers=1, max_length=64), trainer=TrainerConfig(steps=2),
    batch_size=2, seq_len=32, eval_batches=0, data="DATA",
  )
"""


def file(tmp_path, text):
  path = tmp_path / "config.py"
  path.write_text(text, encoding="utf-8")
  return str(path)


def test_presets(tmp_path):
  path = file(tmp_path, GOOD)
  assert load_recipe(path).model.dim == 64
  assert load_recipe(f"{path}:large").model.dim == 128


@pytest.mark.parametrize(
  ("text", "preset", "message"),
  [
    ("x = 1", "", r"must define a function get_config\(\)"),
    ("1 / 0", "", r"cannot be run: ZeroDivisionError"),
    ("def get_config(): return {}", "", r"must return a jaxdec.training.Recipe, got dict"),
    ("def get_config(): return {}", ":big", r"takes no preset, got 'big'; leave it out"),
    ("def get_config(preset): return {}", "", r"needs a preset; write .*config.py:PRESET"),
    (GOOD, ":huge", r"preset 'huge'.*KeyError"),
  ],
)
def test_bad_files(tmp_path, text, preset, message):
  with pytest.raises(UserError, match=message):
    load_recipe(file(tmp_path, text) + preset)


def test_missing_file():
  with pytest.raises(UserError, match=r"'nowhere.py' does not exist"):
    load_recipe("nowhere.py:small")


def test_sizes_are_checked():
  model = tiny_llama(max_length=64)
  with pytest.raises(UserError, match=r"seq_len=128 is over the model's max_length=64"):
    Recipe(model=model, trainer=TrainerConfig(), batch_size=1, seq_len=128)
  with pytest.raises(UserError, match=r"batch_size must be at least 1, got 0"):
    Recipe(model=model, trainer=TrainerConfig(), batch_size=0, seq_len=8)


def test_a_recipe_trains_and_its_batch_is_what_the_data_gives(tmp_path):
  data = tmp_path / "texts"
  data.mkdir()
  for i in range(40):
    (data / f"{i}.txt").write_text(f"number {i} and some words about it\n" * 3, encoding="utf-8")
  recipe = load_recipe(file(tmp_path, GOOD.replace("DATA", str(data))))
  recipe = dataclasses.replace(
    recipe,
    dtype="float32",
    sequence=SequenceConfig(),
    trainer=TrainerConfig(steps=2, mesh=MeshConfig(data=2, seq=2), progress=False),
  )
  trainer = recipe.make_trainer()
  got = next(iter(trainer._data))
  assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
    k: (v.shape, v.dtype) for k, v in recipe.batch().items()
  }
  result = recipe.make_trainer().train()
  assert result.step == 2 and np.isfinite(result.metrics["loss"])


def test_the_command_line_gives_a_run_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
  from jaxdec.cli import main

  data = tmp_path / "texts"
  data.mkdir()
  for i in range(40):
    (data / f"{i}.txt").write_text(f"number {i} and some words about it\n" * 3, encoding="utf-8")
  path = file(tmp_path, GOOD.replace("DATA", str(data)))
  monkeypatch.chdir(tmp_path)
  for number in (1, 2):
    assert main(["train", f"{path}:small", "--steps", "1"]) == 0
    assert f"run folder: runs/small-00{number}" in capsys.readouterr().out
    assert (tmp_path / f"runs/small-00{number}/metrics.jsonl").is_file()
