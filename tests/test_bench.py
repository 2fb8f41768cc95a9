# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxdec import bench
from jaxdec.drafting import Drafter, PromptLookup, chain
from jaxdec.errors import UserError
from jaxdec.models import Decoder, tiny_llama


@pytest.fixture(scope="module")
def target():
  config = tiny_llama(
    vocab_size=32, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=32,
    max_length=256,
  )  # fmt: skip
  model = Decoder(config)
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
  return model, params


PROMPTS = [[1, 2, 3, 1, 2], [4, 5, 6, 7, 8, 9, 4, 5, 6], [3, 3, 3]]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows(target, batch_size):
  config = bench.BenchConfig(
    max_new_tokens=12, temperatures=(0.0, 1.0), repeats=2, batch_size=batch_size
  )
  rows = bench.run(*target, [bench.Arm("lookup", PromptLookup())], PROMPTS, config)
  assert [(r["drafter"], r["temperature"]) for r in rows] == [
    (name, t) for t in (0.0, 1.0) for name in (bench.BASELINE, "lookup")
  ]
  for row in rows:
    assert row["identical"] == "3 of 3" and row["all_identical"]
    assert row["tokens_per_step"] == pytest.approx(1 + sum(row["accepted_by_depth"]))
    assert row["new_tokens"] == 36 and row["seconds"] > 0
    assert len(row["speedup_by_pass"]) == 2
  # The first token of a row comes from prefill, every later one of the baseline from a pass.
  baseline = rows[0]
  longest = [11] * len(range(0, 3, batch_size))
  assert baseline["target_passes"] == sum(longest) and baseline["speedup"] == 1.0
  assert rows[1]["target_passes"] <= baseline["target_passes"]
  assert rows[1]["nodes"] == PromptLookup().num_nodes


@dataclasses.dataclass(frozen=True)
class Wrong(Drafter):
  """Proposes tokens; which never matters."""

  name = "wrong"

  @property
  def num_nodes(self):
    return 3

  def propose(self, params, state, context, rng):
    return chain(context.root, jnp.zeros((context.root.shape[0], 2), jnp.int32)), state


def test_a_changed_output_is_reported(target, monkeypatch):
  real = bench.generate

  def tampering(*args, drafter=None, **options):
    out = real(*args, drafter=drafter, **options)
    if drafter is not None and len(args[2][0]) == 3:
      out = dataclasses.replace(out, tokens=[[*out.tokens[0][:-1], -1]])
    return out

  monkeypatch.setattr(bench, "generate", tampering)
  config = bench.BenchConfig(max_new_tokens=4, temperatures=(0.0,), repeats=1)
  rows = bench.run(*target, [bench.Arm("wrong", Wrong())], PROMPTS, config)
  assert rows[1]["identical"] == "2 of 3" and not rows[1]["all_identical"]


def test_write(target, tmp_path):
  config = bench.BenchConfig(max_new_tokens=4, temperatures=(0.0,), repeats=1)
  rows = bench.run(*target, [bench.Arm("wrong", Wrong())], PROMPTS, config)
  bench.write(rows, tmp_path, title="T", command="jaxdec bench", drafters=["wrong"])
  content = json.loads((tmp_path / "results.json").read_text())
  assert content["rows"][1]["identical"] == "3 of 3" and content["drafters"] == ["wrong"]
  assert content["machine"]["versions"]["jax"] == jax.__version__
  markdown = (tmp_path / "table.md").read_text()
  assert "| wrong " in markdown and "jaxdec bench" in markdown
  assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes(target):
  arms = [bench.Arm("a", Wrong()), bench.Arm("a", PromptLookup())]
  with pytest.raises(UserError, match="name of its own"):
    bench.run(*target, arms, PROMPTS)
  with pytest.raises(UserError, match="at least one prompt"):
    bench.run(*target, arms[:1], [])
