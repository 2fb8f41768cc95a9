# SPDX-License-Identifier: Apache-2.0
"""What the command answers before JAX is loaded: help, version, wrong options, wrong paths."""

from __future__ import annotations

import json
import struct

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import jaxdec
from jaxdec.cli import main
from jaxdec.cli.checks import model_folder, prompts_fit
from jaxdec.cli.configs import COMMANDS
from tests.cli.command import assert_sentence, run_jaxdec


def test_version():
  outcome = run_jaxdec("--version")
  assert (outcome.code, outcome.out) == (0, f"jaxdec {jaxdec.__version__}")
  assert outcome.heavy == []


def test_help_lists_every_command():
  outcome = run_jaxdec("--help")
  assert outcome.code == 0 and outcome.heavy == []
  for name in COMMANDS:
    assert f"  {name}" in outcome.out
  assert run_jaxdec().out == outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
  outcome = run_jaxdec(command, "--help")
  assert outcome.code == 0 and outcome.heavy == []
  assert f"usage: jaxdec {command}" in outcome.out


@pytest.mark.parametrize(
  ("args", "parts"),
  [
    (["generat"], ["'generat'", "did you mean 'generate'?"]),
    (["--verzion"], ["'--verzion'", "did you mean '--version'?"]),
    (["generate", "--promt", "x"], ["'--promt'", "did you mean '--prompt'?"]),
    (["generate", "x"], ["unexpected argument 'x'"]),
    (["distill", "--work_dirr", "x"], ["'--work_dirr'", "did you mean '--work-dir'?"]),
    (["distill", "--steps", "many"], ["--steps", "'many'"]),
    (["distill", "--steps", "0"], ["--steps must be at least 1, got 0"]),
    (["distill", "--drafter", "hydro"], ["'hydro'", "did you mean 'hydra'?"]),
    (["distill", "--drafter", "prompt_lookup"], ["has nothing to train"]),
    (["distill", "--data", "no/such"], ["data 'no/such' does not exist"]),
    (["distill", "--mesh", "dta=2"], ["'dta'", "did you mean 'data'?"]),
    (["distill", "--mesh", "data=0"], ["at least one device, got 0"]),
    (["distill", "--mesh", "data"], ["axis=size"]),
    (["distill", "no_config.py"], ["'no_config.py' does not exist"]),
    (["generate"], ["no prompt"]),
    (["generate", "--prompt", ""], ["prompt 1 is empty"]),
    (["generate", "--prompt", "a", "--temperature", "-1"], ["temperature", "got -1"]),
    (["generate", "--prompt", "a", "--temperature", "nan"], ["temperature", "got nan"]),
    (["generate", "--prompt", "a", "--top-p", "1.5"], ["--top-p", "got 1.5"]),
    (["generate", "--prompt", "a", "--top-k", "0"], ["--top-k must be at least 1"]),
    (["generate", "--prompt", "a", "--model", "no/such"], ["'no/such' does not exist"]),
    (["generate", "--prompt", "a", "--model", "tinny"], ["did you mean 'tiny'?"]),
    (["generate", "--prompt", "a", "--drafter", "medussa"], ["did you mean 'medusa'?"]),
    (["generate", "--prompt", "a", "--drafter", "runs/nothing"], ["does not exist"]),
    (["generate", "--prompt", "a", "--dtype", "float3"], ["'float3'", "bfloat16"]),
    (["bench", "--drafters", "hydra,edusa"], ["did you mean 'medusa'?"]),
    (["bench", "--temperatures", "0", "-2"], ["temperature", "-2"]),
    (["bench", "--prompts", "none.jsonl"], ["'none.jsonl' does not exist"]),
    (["verify", "--draws", "0"], ["--draws must be at least 100, got 0"]),
    (["plot"], ["no run folder"]),
    (["plot", "no/run"], ["'no/run' does not exist"]),
    (["demo", "--minutes", "-1"], ["--minutes must be positive"]),
  ],
)
def test_one_sentence_before_any_heavy_import(args, parts, tmp_path):
  outcome = run_jaxdec(*args, cwd=tmp_path)
  assert_sentence(outcome, *parts)
  assert outcome.heavy == []
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("body", "parts"),
  [
    ("def get_config():\n  return dict(step=3)", ["'step'", "did you mean 'steps'?"]),
    ("def get_config():\n  return dict(steps='3')", ["steps must be int, got '3'"]),
    ("def get_config():\n  return 3", ["must return a Distill or a mapping", "got int"]),
    ("x = 1", ["must define a function get_config()"]),
    ("1 / 0", ["ZeroDivisionError"]),
    ("def get_config():\n  return dict(steps=-3)", ["--steps must be at least 1, got -3"]),
  ],
)
def test_configuration_file(body, parts, tmp_path):
  (tmp_path / "config.py").write_text(body)
  outcome = run_jaxdec("distill", "config.py", cwd=tmp_path)
  assert_sentence(outcome, *parts)
  assert outcome.heavy == []


def test_options_override_the_configuration_file(tmp_path):
  from jaxdec.cli.parse import parse

  file = tmp_path / "config.py"
  file.write_text("def get_config():\n  return dict(steps=7, seq_len=64, learning_rate=1)")
  config = parse("distill", COMMANDS["distill"], [str(file), "--steps", "9"])
  assert (config.steps, config.seq_len, config.learning_rate) == (9, 64, 1)


@pytest.mark.parametrize(
  ("line", "parts"),
  [
    ("not json", ["line 2", "expected"]),
    ('{"text": "a"}', ["line 2", "expected"]),
    ('{"prompt": ""}', ["prompt 2 is empty"]),
    ('{"prompt": 3}', ["prompt 2 is empty"]),
  ],
)
def test_prompt_file(line, parts, tmp_path):
  (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
  outcome = run_jaxdec("generate", "--prompts", "p.jsonl", cwd=tmp_path)
  assert_sentence(outcome, *parts)
  assert outcome.heavy == []


def _model(folder, **changes):
  """A folder that passes every light check; ``changes`` go into config.json."""
  fields = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1, **changes,
  }  # fmt: skip
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(fields))
  header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
  (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
  words = Tokenizer(WordLevel({w: i for i, w in enumerate("?abcd")}, unk_token="?"))
  words.pre_tokenizer = Whitespace()
  words.save(str(folder / "tokenizer.json"))
  return folder


def _refused(folder, *parts):
  outcome = run_jaxdec("generate", "--prompt", "a", "--model", str(folder))
  assert_sentence(outcome, *parts)
  assert outcome.heavy == []


def test_model_folder(tmp_path):
  folder = _model(tmp_path / "good")
  assert model_folder(str(folder)) == folder
  _refused(_model(tmp_path / "family", model_type="lama"), "'lama'", "did you mean 'llama'?")
  _refused(_model(tmp_path / "field", hidden_sizes=3), "'hidden_sizes'")
  for name, sentence in (
    ("config.json", "no config.json"),
    ("model.safetensors", "no weights"),
    ("tokenizer.json", "no tokenizer.json"),
  ):
    broken = _model(tmp_path / f"without_{name}")
    (broken / name).unlink()
    _refused(broken, sentence)
  broken = _model(tmp_path / "json")
  (broken / "config.json").write_text("{")
  _refused(broken, "config.json is not valid JSON")
  _refused(folder / "config.json", "is a file")


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_weights(tmp_path, keep):
  folder = _model(tmp_path / "m")
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  _refused(folder, "model.safetensors", "is truncated" if keep in (20, -1) else "is not a")


def test_tokenizer_of_another_model(tmp_path):
  _refused(_model(tmp_path / "m", vocab_size=3), "has 5 tokens", "vocabulary 3")


def test_prompt_longer_than_the_model(tmp_path):
  folder = _model(tmp_path / "m", max_position_embeddings=4)
  prompts_fit(folder, ["a b c"])
  args = ["--prompt", "a b c", "--model", str(folder), "--max-new-tokens", "2"]
  outcome = run_jaxdec("generate", *args)
  assert_sentence(outcome, "prompt 1 has 3 tokens", "together 5, over the model's limit of 4")
  assert outcome.heavy == []


def test_main_returns_codes(capsys):
  assert main(["--version"]) == 0
  assert main(["generate", "--promt"]) == 2
  assert capsys.readouterr().err.count("\n") == 1
