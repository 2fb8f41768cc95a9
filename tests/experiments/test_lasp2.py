# SPDX-License-Identifier: Apache-2.0
"""The LASP-2 experiment: its presets, a few steps of a variant, and its speed table."""

from __future__ import annotations

import dataclasses

import pytest

from experiments.lasp2 import config, run, speed
from jaxdec.errors import UserError
from jaxdec.mixers import AttentionConfig, GatedDeltaConfig, LinearAttentionConfig


def test_presets():
  hybrid = config.get_config("1b-retention-hybrid").model
  kinds = [type(layer.mixer) for layer in hybrid.layers]
  assert kinds == [*[LinearAttentionConfig] * 3, AttentionConfig] * 4
  for preset in config.PRESETS:
    recipe = config.get_config(preset)
    mesh = recipe.trainer.mesh
    assert recipe.batch_size % (mesh.data * mesh.fsdp) == 0
    assert recipe.seq_len % mesh.seq == 0
    if preset.endswith("-gdn"):
      assert all(isinstance(layer.mixer, GatedDeltaConfig) for layer in recipe.model.layers)


@pytest.mark.parametrize("preset", ["tiny-glaa", "tiny-softmax-hybrid", "tiny", "1b_gla"])
def test_unknown_preset(preset):
  with pytest.raises(UserError, match="is not SIZE-KIND or SIZE-KIND-hybrid; sizes: tiny, 1b, 2m"):
    config.get_config(preset)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-gla-hybrid", "tiny-gdn"])
def test_a_variant_trains_as_on_one_device(tmp_path, name):
  texts = tmp_path / "texts"
  texts.mkdir()
  for i in range(60):
    text = f"def f_{i}(x):\n  return x + {i}\n" * 8
    (texts / f"{i}.txt").write_text(text, encoding="utf-8")
  recipe = config.get_config(name)
  trainer = dataclasses.replace(recipe.trainer, steps=2)
  recipe = dataclasses.replace(
    recipe, trainer=trainer, data=str(texts), batch_size=2, seq_len=64, eval_batches=1
  )
  result = run.variant(recipe, tmp_path, name)
  assert len(result["losses"]) == 2
  assert result["apart"] < 1e-4
  report = run.table({name: result}).markdown()
  assert f"| {name.split('-')[1]} " in report and "2 steps each" in report


@pytest.mark.slow
def test_speed_table():
  names = [speed.BASELINE, "Ring Attention"]
  table = speed.measure({name: speed.ARMS[name] for name in names}, 4, 64, rounds=2)
  assert [row["arm"] for row in table.rows] == names
  assert table.rows[0]["ratio"] == 1.0 and table.rows[1]["seconds"] > 0
