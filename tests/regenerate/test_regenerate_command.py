# SPDX-License-Identifier: Apache-2.0
"""``jaxdec regenerate`` and what reads it: ``jaxdec distill --data``."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxdec.data.regenerated import read_head, regenerated_corpus
from jaxdec.lm import tiny
from jaxdec.training import read_metrics
from tests.cli.command import assert_sentence, run_jaxdec


def test_mistakes_are_answered_before_anything_is_loaded(tmp_path):
  for args, parts in (
    (["--data", "no.jsonl"], ["data 'no.jsonl' does not exist"]),
    (["--shards", "0"], ["--shards must be at least 1"]),
    (["--temperature", "-1"], ["temperature must be 0 (greedy) or positive"]),
    (["--drafter", "hydro"], ["unknown drafter 'hydro'"]),
  ):
    outcome = run_jaxdec("regenerate", *args)
    assert_sentence(outcome, *parts)
    assert outcome.heavy == []
  outcome = run_jaxdec("distill", "--data", "0.5*python_stdlib + 0.5*no/such")
  assert_sentence(outcome, "data 'no/such' does not exist")
  chats = tmp_path / "chats.jsonl"
  chats.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
  outcome = run_jaxdec("regenerate", "--data", str(chats), "--output", str(tmp_path / "out"))
  assert_sentence(outcome, "the model folder has no chat template")
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_drafter_learns_from_answers(tmp_path):
  prompts, out = tmp_path / "prompts.jsonl", str(tmp_path / "answers")
  lines = [{"prompt": f"def read_{i}(path):\n"} for i in range(80)]
  prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
  options = ["--data", str(prompts), "--output", out, "--max-new-tokens", "24", "--shards", "2"]
  done = run_jaxdec("regenerate", *options, "--drafter", "prompt_lookup", timeout=500)
  assert done.code == 0, done.err
  assert "80 prompts answered" in done.out and f"--data {out}" in done.out
  assert read_head(out)["rows"] == 80
  corpus = regenerated_corpus(out, tiny().tokenizer)
  assert 0.4 < np.mean(corpus.labels) < 0.9
  again = run_jaxdec("regenerate", *options, timeout=500)
  assert again.code == 0 and "(80 of them before, 0 too long)" in again.out
  run = str(tmp_path / "run")
  trained = run_jaxdec(
    "distill", "--drafter", "medusa", "--num-heads", "2", "--steps", "4", "--batch-size", "2",
    "--seq-len", "64", "--data", f"3*{out} + 1*python_stdlib", "--work-dir", run,
    "--acceptance-every", "2", "--teacher", "streamed", timeout=500,
  )  # fmt: skip
  assert trained.code == 0, trained.err
  assert [row["step"] for row in read_metrics(run, "inspect")] == [2, 4]
  assert all(row["tokens_per_step"] >= 1 for row in read_metrics(run, "inspect"))
