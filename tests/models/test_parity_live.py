# SPDX-License-Identifier: Apache-2.0
"""The same parity against the installed transformers, and the way back: what we save, it loads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import parity_cases as cases
import pytest

import jaxdec
from jaxdec import lm as lib
from jaxdec.io import safetensors

WHY = "live parity needs the `compare` extra (torch, transformers)"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import make_parity  # noqa: E402

pytestmark = pytest.mark.compare
NEW_TOKENS = 16


@pytest.fixture(params=cases.CASES)
def case(request, tmp_path):
  """(transformers model, its folder); another seed than the recorded one."""
  model, _ = make_parity.build(request.param, seed=101)
  model.save_pretrained(tmp_path / "theirs")
  return model, tmp_path / "theirs"


def test_their_folder_and_ours(case, tmp_path):
  model, folder = case
  tokens = cases.prompts(101)
  expected = make_parity.logits_of(model, tokens)
  lm = lib.load(folder, need_tokenizer=False)
  got = np.asarray(lm(tokens))
  assert np.abs(got - expected).max() <= 2e-4
  # Saved by us: the same tensors, byte for byte, and the same logits in transformers.
  jaxdec.save(lm, tmp_path / "ours")
  ours = safetensors.File(tmp_path / "ours" / "model.safetensors")
  theirs = safetensors.File(folder / "model.safetensors")
  assert set(ours.entries) == set(theirs.entries)
  for name in theirs.entries:
    assert ours.view(name).tobytes() == theirs.view(name).tobytes(), name
  back = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  ).eval()
  np.testing.assert_array_equal(make_parity.logits_of(back, tokens), expected)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_window"])
def test_greedy_continuation_until_a_near_tie(name, tmp_path):
  """Identical tokens up to the first step whose two best logits are closer than the tolerance."""
  model, _ = make_parity.build(name, seed=102)
  model.save_pretrained(tmp_path)
  tokens = cases.prompts(102)[:1]
  expected, _ = make_parity.greedy(model, tokens, NEW_TOKENS)
  sequence = np.concatenate([tokens, expected], axis=1)
  scores = np.sort(make_parity.logits_of(model, sequence)[0, tokens.shape[1] - 1 : -1], axis=-1)
  ties = np.flatnonzero(scores[:, -1] - scores[:, -2] < 4e-4)
  clear = int(ties[0]) if ties.size else NEW_TOKENS
  assert clear >= 4, "choose another seed"
  lm = lib.load(tmp_path, need_tokenizer=False)
  out = lm.generate(tokens.tolist(), max_new_tokens=NEW_TOKENS, stop=None)
  assert out.tokens[0][:clear] == expected[0][:clear].tolist()


@pytest.mark.parametrize("name", ["llama3_biases", "gemma3", "phi3_partial"])
def test_the_older_and_the_newer_rope_fields_agree(name):
  """What transformers 4 wrote and what transformers 5 writes describe one decoder."""
  from jaxdec.models import families

  model, _ = make_parity.build(name, seed=0)
  new = model.config.to_dict()
  old = {k: v for k, v in new.items() if k != "rope_parameters"}
  rope = new["rope_parameters"]
  if name == "gemma3":
    old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope["full_attention"]
  old["rope_theta"] = rope["rope_theta"]
  old["rope_scaling"] = {"type" if k == "rope_type" else k: v for k, v in rope.items()
                         if k not in ("rope_theta", "partial_rotary_factor")}  # fmt: skip
  if old["rope_scaling"]["type"] == "default":
    old["rope_scaling"] = None
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    old["partial_rotary_factor"] = rope["partial_rotary_factor"]
  assert families.config_from_hf(old) == families.config_from_hf(new)
