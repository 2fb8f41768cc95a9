# SPDX-License-Identifier: Apache-2.0
"""The commands, end to end, on a model small enough to train in a test."""

from __future__ import annotations

import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxdec
from jaxdec.cli import main
from jaxdec.cli.checks import TRAINED, UNTRAINED
from jaxdec.errors import UserError
from jaxdec.io.tokenizers import load_tokenizer
from jaxdec.lm import LM, TINY
from jaxdec.models import Decoder, tiny_llama
from tests.cli.command import assert_sentence, run_jaxdec


def _save(folder, seed, **changes):
  config = tiny_llama(
    dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=32, max_length=256,
    eos_ids=(0,), **changes,
  )  # fmt: skip
  model = Decoder(config)
  params = nn.unbox(model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"])
  jaxdec.save(LM(model, params, load_tokenizer(TINY)), folder)
  return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return _save(tmp_path_factory.mktemp("models") / "a", 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for i in range(40):
    (folder / f"{i}.txt").write_text(f"number {i} and then number {i + 1}\n" * 40)
  return str(folder)


@pytest.fixture(scope="module")
def run(model, text, tmp_path_factory):
  """A finished distillation of two steps."""
  folder = str(tmp_path_factory.mktemp("runs") / "medusa-heads")  # which joint training finds
  assert main(_distill(model, text, folder)) == 0
  return folder


def _distill(model, text, folder, *more):
  return [
    "distill", "--model", model, "--data", text, "--work-dir", folder, "--drafter", "medusa",
    "--steps", "2", "--batch-size", "8", "--seq-len", "32", "--num-heads", "2", "--tree-nodes", "4",
    *more,
  ]  # fmt: skip


def _files(folder):
  out = {}
  for path, _, names in os.walk(folder):
    for name in names:
      with open(os.path.join(path, name), "rb") as file:
        out[os.path.join(path, name)] = file.read()
  return out


def test_names_are_the_registrys():
  from jaxdec.cli.checks import MESH_AXES
  from jaxdec.drafting import names
  from jaxdec.drafting.kinds import KINDS
  from jaxdec.parallel.mesh import AXES

  assert set(KINDS) == set(TRAINED)
  of_models = {
    "draft_model", "specdec", "pearl", "rsd_c", "rsd_s", "dyspec", "sequoia",
    "lexical_units",
  }  # fmt: skip
  assert set(names()) - set(KINDS) == {"none", *of_models, *UNTRAINED}
  assert (*AXES, "dcn_data", "dcn_fsdp") == MESH_AXES


def test_generate_is_the_same_with_any_drafter(model, run, capsys):
  outputs = []
  for more in ([], ["--drafter", "prompt_lookup"], ["--drafter", run], ["--stream"]):
    args = ["generate", "--model", model, "--prompt", "def f", "--max-new-tokens", "8"]
    assert main([*args, "--temperature", "1", "--seed", "3", *more]) == 0
    captured = capsys.readouterr()
    outputs.append(captured.out)
    assert "tokens per step" in captured.err
  assert outputs[0].startswith("def f") and len(set(outputs)) == 1


def test_prompts_from_a_file(model, tmp_path, capsys):
  (tmp_path / "p.jsonl").write_text('{"prompt": "a b"}\n\n{"prompt": "import"}\n')
  args = ["generate", "--model", model, "--prompts", str(tmp_path / "p.jsonl")]
  assert main([*args, "--max-new-tokens", "2", "--no-stats"]) == 0
  captured = capsys.readouterr()
  assert "a b" in captured.out and "import" in captured.out and captured.err == ""
  assert main([*args, "--stream"]) == 2
  assert "one text at a time" in capsys.readouterr().err


def test_distill_resumes_its_own_run_and_refuses_another(model, text, run, capsys):
  before = _files(run)
  assert main(_distill(model, text, run, "--seed", "1")) == 2
  error = capsys.readouterr().err
  assert "already holds another run" in error and error.count("\n") == 1
  assert _files(run) == before
  assert main(_distill(model, text, run)) == 0
  assert "already finished" in capsys.readouterr().out
  after = _files(run)
  assert all(after[name] == before[name] for name in before if "drafter" in name)


def test_joint_training_writes_a_model_and_heads_for_it(model, text, run, capsys):
  """Goes on from the heads' run; drafting changes no token of the new model."""
  folder = run.removesuffix("-heads")
  assert main(_distill(model, text, folder, "--joint", "hard")) == 0
  target, shown = f"{folder}/target", capsys.readouterr().out
  assert f"{run} is already finished" in shown
  assert f"jaxdec generate --model {target} --drafter {folder}" in shown
  outputs = []
  for more in ([], ["--drafter", folder]):
    args = ["generate", "--model", target, "--prompt", "number 7", "--max-new-tokens", "16"]
    assert main([*args, "--temperature", "1", *more]) == 0
    outputs.append(capsys.readouterr().out)
  assert outputs[0] == outputs[1]
  args = ["generate", "--model", model, "--prompt", "a", "--drafter", folder]
  assert main(args) == 2
  assert "same sizes but other weights" in capsys.readouterr().err


def test_joint_training_that_cannot_be(model, text, tmp_path):
  folder = tmp_path / "run"
  command = [*_distill(model, text, str(folder)), "--joint", "kl"]
  outcome = run_jaxdec(*command, "--drafter", "hydra")
  assert_sentence(outcome, "--drafter is 'hydra'; give --drafter medusa, or leave --joint out")
  outcome = run_jaxdec(*command, "--teacher", "cached")
  assert_sentence(outcome, "--teacher cached can't follow; leave one of them out")
  assert not folder.exists() and not (tmp_path / "run-heads").exists()
  folder.mkdir()
  (folder / "thesis.txt").write_text("mine")
  assert main(command) == 2  # before the heads are trained
  assert not (tmp_path / "run-heads").exists()


def test_work_dir_with_other_files(model, text, tmp_path):
  (tmp_path / "thesis.txt").write_text("mine")
  outcome = run_jaxdec(*_distill(model, text, str(tmp_path)))
  assert outcome.code == 2 and outcome.err.count("\n") == 1
  assert "holds files that are no training run" in outcome.err
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_mesh_that_does_not_divide(model, text, tmp_path):
  folder = tmp_path / "run"
  outcome = run_jaxdec(*_distill(model, text, str(folder), "--mesh", "tensor=3"))
  assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
  assert "tensor" in outcome.err and "3" in outcome.err
  assert not folder.exists()
  outcome = run_jaxdec(*_distill(model, text, str(folder), "--mesh", "data=64"))
  assert_sentence(outcome, "data=64", "needs 64 devices")


def test_drafter_of_another_model(model, run, tmp_path):
  wide = _save(tmp_path / "wide", 0, vocab_size=5000)
  args = ["generate", "--prompt", "a", "--max-new-tokens", "4", "--drafter", run]
  outcome = run_jaxdec(*args, "--model", wide)
  assert_sentence(outcome, "another target", "vocabulary 4096 against 5000")
  assert outcome.heavy == []  # sizes are compared without reading a weight
  sibling = _save(tmp_path / "sibling", 1)
  assert_sentence(run_jaxdec(*args, "--model", sibling), "same sizes but other weights")


def test_unfinished_run_and_foreign_folder_as_drafter(model, tmp_path):
  args = ["generate", "--prompt", "a", "--model", model, "--drafter"]
  assert_sentence(run_jaxdec(*args, str(tmp_path)), "holds no drafter")
  (tmp_path / "metrics.jsonl").write_text("")
  outcome = run_jaxdec(*args, str(tmp_path))
  assert_sentence(outcome, "holds a run that has not finished")
  assert outcome.heavy == []


def test_bench_and_verify_write_numbered_folders(model, run, tmp_path, capsys):
  prompts = tmp_path / "p.jsonl"
  prompts.write_text('{"prompt": "def f(x):"}\n{"prompt": "import os"}\n')
  common = ["--model", model, "--prompts", str(prompts), "--max-new-tokens", "6"]
  out = str(tmp_path / "out")
  bench = ["bench", *common, "--drafters", f"token_recycling,{run}", "--repeats", "1"]
  assert main([*bench, "--temperatures", "0", "--output", out]) == 0
  verify = ["verify", *common, "--drafter", run, "--draws", "256", "--temperature", "0.05"]
  code = main([*verify, "--output", out])
  shown = capsys.readouterr().out
  assert "2 of 2" in shown and "verdict (float32, rule match)" in shown
  content = json.loads((tmp_path / "out" / "001" / "results.json").read_text())
  assert [row["drafter"] for row in content["rows"]] == [
    "autoregressive", "token_recycling", os.path.basename(run)
  ]  # fmt: skip
  assert content["command"].startswith("jaxdec")
  certificate = json.loads((tmp_path / "out" / "002" / "certificate.json").read_text())
  assert certificate["sampled"]["identical"] == 2
  assert code == (0 if certificate["lossless"] else 1)


def test_plot(run, tmp_path, capsys):
  path = tmp_path / "p.png"
  for name in ("p.png", "p-2.png"):
    assert main(["plot", run, "--output", str(path)]) == 0
    assert (tmp_path / name).is_file()
  assert "p-2.png" in capsys.readouterr().out


def test_doctor_reports_and_never_raises():
  outcome = run_jaxdec("doctor", "--json")
  findings = json.loads(outcome.out)
  assert outcome.code == int(any(f["status"] == "fail" for f in findings))
  by_name = {f["name"]: f for f in findings}
  assert by_name["smoke test"]["status"] == "ok" and by_name["xla"]["status"] == "ok"
  assert by_name["mosaic_tpu"]["detail"].startswith("needs a TPU")
  assert "torch" not in outcome.heavy


def test_doctor_without_its_device(monkeypatch):
  monkeypatch.setattr("tests.cli.command.PLATFORM", "cuda")
  outcome = run_jaxdec("doctor")
  assert outcome.code == 1 and "Traceback" not in outcome.err + outcome.out
  assert "unset it to fall back to the CPU" in " ".join(outcome.out.split())


def test_settings_of_a_drafter():
  """Shared heads where a drafter has the choice, any other field by NAME=VALUE."""
  from jaxdec.cli import configs
  from jaxdec.cli.distilling import parse_option, settings

  job = settings(configs.Distill(options=("num_blocks=2", "init=fan_in")), {}, "runs/x")
  assert job.options == {
    "num_heads": 4, "share_head": True, "objective": "soft", "num_blocks": 2, "init": "fan_in"
  }  # fmt: skip
  job = settings(configs.Distill(drafter="eagle3", objective="kl"), {}, "runs/x")
  assert job.options == {"num_heads": 4, "objective": "kl"}
  assert settings(configs.Distill(drafter="eagle3"), {}, "runs/x").options == {"num_heads": 4}
  with pytest.raises(UserError, match="leave --own-heads out"):
    settings(configs.Distill(drafter="eagle3", own_heads=True), {}, "runs/x")
  with pytest.raises(UserError, match=r"NAME=VALUE, such as depth_decay=0.9, got 'num_blocks'"):
    parse_option("num_blocks")
