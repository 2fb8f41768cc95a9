# SPDX-License-Identifier: Apache-2.0
"""Our decoder against recorded outputs of transformers, one tiny checkpoint a family and feature.

Made by ``tests/data/make_parity.py``; runs without torch.
"""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import pytest

from jaxdec import lm as lib
from jaxdec.io import safetensors
from jaxdec.mixers.rope import apply_rope

TOLERANCE = 2e-4


def write_folder(folder, config: dict, tensors: dict[str, np.ndarray]):
  (folder / "config.json").write_text(json.dumps(config))
  safetensors.write(
    folder / "model.safetensors",
    [safetensors.Tensor(n, a.shape, a.dtype, lambda a=a: a) for n, a in tensors.items()],
    {"format": "pt"},
  )
  return folder


def load_case(name: str, folder):
  """The recorded case and our model of it, through a folder on disk."""
  record = np.load(cases.RECORDED / f"{name}.npz")
  config = json.loads(str(record["config"]))
  shapes = json.loads(str(record["shapes"]))
  gemma = config["model_type"].startswith("gemma")
  tensors = cases.checkpoint(shapes, seed=int(record["seed"]), gemma=gemma)
  assert cases.checksum(tensors) == int(record["checksum"]), (
    "the recipe no longer gives the recorded weights; run tests/data/make_parity.py"
  )
  return record, lib.load(write_folder(folder, config, tensors), need_tokenizer=False)


def test_every_case_is_recorded():
  assert {p.stem for p in cases.RECORDED.glob("*.npz")} == set(cases.CASES)


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_and_greedy_continuation(name, tmp_path):
  record, lm = load_case(name, tmp_path)
  tokens = record["tokens"]
  error = np.abs(np.asarray(lm(tokens)) - record["logits"]).max()
  assert error <= TOLERANCE, f"{name}: logits differ by {error}"
  # Longer than every window, and the cached path is another code path than the one above.
  out = lm.generate(tokens.tolist(), max_new_tokens=cases.NEW_TOKENS, stop=None)
  np.testing.assert_array_equal(np.asarray(out.tokens), record["continuation"])


@pytest.mark.parametrize("name", ["gemma2", "qwen2_window", "llama_yarn", "smollm3_nope"])
def test_a_feature_left_out_would_be_seen(name, tmp_path):
  """Negative control: parity is sensitive to each family's peculiar feature."""
  import dataclasses

  record, lm = load_case(name, tmp_path)
  change = {
    "gemma2": lambda m: dataclasses.replace(m, logit_cap=None),
    "qwen2_window": lambda m: dataclasses.replace(m, window=None),
    "llama_yarn": lambda m: dataclasses.replace(
      m, rope=dataclasses.replace(m.rope, beta_fast=32.0)
    ),
    "smollm3_nope": lambda m: dataclasses.replace(m, rope=lm.config.layers[0].mixer.rope),
  }[name]
  layers = tuple(dataclasses.replace(x, mixer=change(x.mixer)) for x in lm.config.layers)
  config = dataclasses.replace(lm.config, layers=layers)
  other = dataclasses.replace(lm, model=dataclasses.replace(lm.model, config=config))
  assert np.abs(np.asarray(other(record["tokens"])) - record["logits"]).max() > 10 * TOLERANCE


def test_partial_rotation_leaves_the_rest_alone(tmp_path):
  _, lm = load_case("phi3_partial", tmp_path)
  rope = lm.config.layers[0].mixer.rope
  x = jnp.ones((1, 5, 1, 12))
  y = np.asarray(apply_rope(x, jnp.arange(5)[None], rope))
  assert rope.rotary_fraction == 0.5
  np.testing.assert_array_equal(y[..., 6:], 1.0)
  assert not np.allclose(y[0, 1:, 0, :6], 1.0)
