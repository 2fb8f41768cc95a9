# SPDX-License-Identifier: Apache-2.0
"""The launchers: the commands they show, what they refuse, and a run that is preempted once.

No cloud is touched: a stand-in for the CLI lies first in PATH.
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "experiments/launch"
CONFIG = "experiments/tiny_python/config.py"
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git repository")
GCLOUD = [CONFIG, "--name", "run-1", "--accelerator", "v6e-64", "--zone", "us-east5-b",
          "--storage", "gs://bucket"]  # fmt: skip
GKE = [CONFIG, "--name", "run-1", "--cluster", "c", "--tpu-type", "v5p-128", "--zone", "z",
       "--project", "p", "--storage", "s"]  # fmt: skip
SKY = [CONFIG, "--name", "run-1", "--accelerator", "tpu-v6e-32", "--bucket", "gs://bucket"]
ALL = {"queued_resource": GCLOUD, "gke": GKE, "skypilot": SKY}

# Like gcloud: describes what was created; the first training is cut off by a preemption.
FAKE_GCLOUD = """\
#!{python}
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
with (folder / "calls").open("a") as calls:
  calls.write(json.dumps(sys.argv[1:]) + "\\n")
verb, state = sys.argv[4], folder / "state"
if verb == "create":
  assert not state.exists()
  state.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
elif verb == "describe":
  if not state.exists():
    sys.exit(1)
  first, *rest = state.read_text().split()
  state.write_text(" ".join(rest or [first]))
  print(first)
elif verb == "delete":
  state.unlink()
elif verb == "ssh" and "jaxdec train experiments" in sys.argv[-2]:
  codes = {codes}
  times = len(list(folder.glob("train-*")))
  (folder / f"train-{{times}}").touch()
  code = codes[min(times, len(codes) - 1)]
  if code == 255:
    state.write_text("SUSPENDING SUSPENDED")
  sys.exit(code)
"""


@pytest.fixture(scope="module", autouse=True)
def tools(tmp_path_factory):
  """A PATH with git and nothing else: no test may reach a real cloud's CLI."""
  global ONLY_GIT
  folder = tmp_path_factory.mktemp("bin")
  (folder / "git").symlink_to(shutil.which("git"))
  ONLY_GIT = str(folder)


def start(script, args, *, first: pathlib.Path | None = None, root=ROOT):
  path = ONLY_GIT if first is None else f"{first}{os.pathsep}{ONLY_GIT}"
  return subprocess.run(
    [sys.executable, str(root / f"experiments/launch/{script}.py"), *args],
    capture_output=True, text=True, cwd=root, env={**os.environ, "PATH": path}, timeout=60,
    check=False,
  )  # fmt: skip


def lines(done):
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in _joined(done.stdout)]


def _joined(text):
  """Commands of a dry run; a quoted argument may span lines."""
  whole, open_line = [], ""
  for line in text.splitlines():
    open_line += line
    try:
      shlex.split(open_line)
    except ValueError:
      open_line += "\n"
      continue
    whole.append(open_line)
    open_line = ""
  assert not open_line
  return whole


def test_dry_run_of_a_queued_resource_is_what_would_run():
  done = start("queued_resource", [*GCLOUD, "--spot", "--project", "my-project", "--dry-run"])
  commands = lines(done)
  gcloud = ["gcloud", "compute", "tpus", "queued-resources"]
  place = ["--zone=us-east5-b", "--project=my-project"]
  assert commands[0][:2] == ["git", "archive"]
  assert commands[1] == [
    *gcloud, "create", "run-1", "--node-id=run-1", "--accelerator-type=v6e-64",
    "--runtime-version=v2-alpha-tpuv6e", "--spot", *place,
  ]  # fmt: skip
  assert commands[2] == [*gcloud, "describe", "run-1", "--format=value(state.state)", *place]
  assert [c[4] for c in commands[3:]] == ["scp", "ssh", "ssh", "delete"]
  for command in commands[3:6]:
    assert {"--worker=all", "--node=all", *place} <= set(command)
  train = next(a for a in commands[5] if a.startswith("--command=")).removeprefix("--command=")
  assert train == f"cd ~/jaxdec && ~/venv/bin/jaxdec train {CONFIG} --work-dir ../runs/run-1"
  setup = next(a for a in commands[4] if a.startswith("--command=")).removeprefix("--command=")
  assert "gcsfuse" in setup and setup.endswith(" bucket ~/runs")
  # Both are scripts a shell can read.
  for script in (setup, train):
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0


def test_dry_run_of_gke():
  create, logs, status = lines(start("gke", [*GKE, "--num-slices", "2", "--dry-run"]))
  assert create[:3] == ["xpk", "workload", "create"]
  assert {
    "--workload=run-1", "--cluster=c", "--zone=z", "--project=p", "--tpu-type=v5p-128",
    "--num-slices=2", "--storage=s", "--max-restarts=50", "--restart-on-exit-codes=1",
  } <= set(create)  # fmt: skip
  assert create[-1] == (
    f"--command=pip install --quiet '.[tpu]' && exec jaxdec train {CONFIG} --work-dir /runs/run-1"
  )
  assert logs[:3] == ["kubectl", "logs", "--follow"]
  assert status[:3] == ["xpk", "workload", "list"] and "--timeout=0" in status


def test_dry_run_of_skypilot():
  (command,) = lines(start("skypilot", [*SKY, "--spot", "--dry-run", "--", "--steps", "5"]))
  assert command[:3] == ["sky", "jobs", "launch"]
  assert {
    "--gpus=tpu-v6e-32", "--use-spot", "--name=run-1", "--env=BUCKET=gs://bucket",
    f"--env=CONFIG={CONFIG}", "--env=RUN=run-1", "--env=TRAIN_OPTIONS=--steps 5",
  } <= set(command)  # fmt: skip
  assert (ROOT / command[-1]).is_file()


@pytest.mark.parametrize("script", ALL)
def test_options_of_train_survive_every_layer_of_quoting(script, tmp_path):
  """What arrives at `jaxdec train`, through the shells the command passes on its way."""
  wanted = ["--data", "gs://b/my files/it's $HOME `x`.jsonl", "--mesh", "fsdp=8,seq=4"]
  done = start(script, [*ALL[script], "--dry-run", "--", *wanted])
  jaxdec = tmp_path / "venv/bin/jaxdec"
  jaxdec.parent.mkdir(parents=True)
  jaxdec.write_text(
    f"#!{sys.executable}\nimport json, sys\nprint('got', json.dumps(sys.argv[1:]))\n"
  )
  jaxdec.chmod(0o755)
  (tmp_path / "jaxdec").mkdir()
  (jaxdec.parent / "pip").symlink_to("/bin/true")
  environment = {"HOME": str(tmp_path), "PATH": f"{jaxdec.parent}:/usr/bin:/bin"}
  if script == "skypilot":
    env = [a.removeprefix("--env=") for a in lines(done)[0] if a.startswith("--env=")]
    environment |= dict(item.split("=", 1) for item in env)
    text = (LAUNCH / "sky.yaml").read_text().split("run: |\n")[1]
  else:
    found = [a for command in lines(done) for a in command if a.startswith("--command=")]
    text = found[-1].removeprefix("--command=")
  ran = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True,
                       cwd=tmp_path, check=False)  # fmt: skip
  assert ran.stdout.startswith("got "), ran
  got = json.loads(ran.stdout.removeprefix("got "))
  assert got[:3] == ["train", CONFIG, "--work-dir"] and got[4:] == wanted


@pytest.mark.parametrize("script", ALL)
def test_required_fields(script):
  args = ALL[script]
  for at in range(1, len(args), 2):
    done = start(script, [*args[:at], *args[at + 2 :], "--dry-run"])
    assert done.returncode == 2 and args[at] in done.stderr, args[at]


@pytest.mark.parametrize(
  ("script", "change", "sentence"),
  [
    ("queued_resource", {"--name": "Run_1"}, "lower-case letters, digits and hyphens"),
    ("queued_resource", {"--name": "r" * 41}, "at most 40"),
    ("queued_resource", {"--storage": "bucket"}, "gs://BUCKET or HOST:/SHARE, got 'bucket'"),
    ("queued_resource", {"--accelerator": "v9-8"}, "no runtime version is known"),
    ("queued_resource", {CONFIG: "none.py"}, "'none.py' is no file of this repository"),
    ("gke", {CONFIG: "none.py"}, "'none.py' is no file of this repository"),
    ("skypilot", {"--bucket": "bucket"}, "--bucket is gs://BUCKET"),
  ],
)
def test_mistakes_are_one_sentence(script, change, sentence):
  args = list(ALL[script])
  for name, value in change.items():
    args[args.index(name) + (name != CONFIG)] = value
  done = start(script, [*args, "--dry-run"])
  assert done.returncode == 2 and sentence in done.stderr
  assert done.stderr.startswith("launch: ") and done.stderr.count("\n") == 1


def test_the_folder_is_the_launchers():
  done = start("gke", [*GKE, "--dry-run", "--", "--work-dir", "x"])
  assert done.returncode == 2 and "leave --work-dir out" in done.stderr


def test_only_what_is_committed_reaches_the_workers(tmp_path):
  subprocess.run(["git", "init", "-q", tmp_path], check=True)
  shutil.copytree(LAUNCH, tmp_path / "experiments/launch")
  (tmp_path / "new.py").write_text("def get_config(): ...\n")
  done = start("gke", ["new.py", *GKE[1:], "--dry-run"], root=tmp_path)
  assert done.returncode == 2 and "'new.py' is not committed" in done.stderr
  git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
  subprocess.run([*git, "add", "new.py"], check=True)
  subprocess.run([*git, "commit", "-q", "-m", "new"], check=True)
  assert start("gke", ["new.py", *GKE[1:], "--dry-run"], root=tmp_path).returncode == 0


@pytest.mark.parametrize(
  ("script", "tool"), [("queued_resource", "gcloud"), ("gke", "xpk"), ("skypilot", "sky")]
)
def test_a_missing_cli_is_named(script, tool):
  done = start(script, ALL[script])
  assert done.returncode == 2
  assert done.stderr.startswith(f"launch: {tool} is not installed; ")
  assert "--dry-run" in done.stderr


def fake(tmp_path, codes):
  script = tmp_path / "bin/gcloud"
  script.parent.mkdir()
  script.write_text(FAKE_GCLOUD.format(python=sys.executable, folder=str(tmp_path), codes=codes))
  script.chmod(0o755)
  done = start("queued_resource", [*GCLOUD, "--spot", "--poll", "0"],
               first=script.parent)  # fmt: skip
  calls = [json.loads(line)[3:] for line in (tmp_path / "calls").read_text().splitlines()]
  return done, [call[0] for call in calls if call[0] != "describe"]


def test_preempted_once_the_run_is_resumed_and_the_tpu_deleted(tmp_path):
  done, calls = fake(tmp_path, [255, 0])
  assert done.returncode == 0, done.stderr
  one = ["create", "scp", "ssh", "ssh", "delete"]
  assert calls == [*one, *one]
  assert "preempted" in done.stdout and "WAITING_FOR_RESOURCES" in done.stdout


def test_a_mistake_in_the_options_is_not_tried_again(tmp_path):
  done, calls = fake(tmp_path, [2])
  assert done.returncode == 2 and calls == ["create", "scp", "ssh", "ssh"]
  assert "costs until `gcloud compute tpus queued-resources delete run-1" in done.stderr


def test_failures_on_a_healthy_tpu_are_counted(tmp_path):
  done, calls = fake(tmp_path, [1])
  assert done.returncode == 2 and "gave up after 4 failures" in done.stderr
  assert calls == ["create", *["scp", "ssh", "ssh"] * 4]
