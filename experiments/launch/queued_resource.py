# SPDX-License-Identifier: Apache-2.0
"""A run on Cloud TPU VMs through a queued resource: create, install, train, resume, delete.

``python experiments/launch/queued_resource.py CONFIG --name RUN --accelerator v6e-64
--zone us-east5-b --storage gs://BUCKET [--spot] [--dry-run] [-- OPTIONS OF jaxdec train]``

A resource of that name that exists already is used. After a preemption it is deleted, asked for
again, and the run goes on from its last checkpoint. At the end it is deleted.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence

import commands

RUNTIMES = {"v6e": "v2-alpha-tpuv6e", "v5p": "v2-alpha-tpuv5", "v5litepod": "v2-alpha-tpuv5-lite",
            "v4": "tpu-ubuntu2204-base"}  # fmt: skip
GONE = ("SUSPENDED", "FAILED")
ARCHIVE = pathlib.Path(tempfile.gettempdir()) / "jaxdec.tar.gz"

# Bucket or NFS share at ~/runs, the same folder for all workers.
GCSFUSE = """\
command -v gcsfuse >/dev/null || {{
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
}}
mountpoint -q ~/runs || gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 {bucket} ~/runs"""  # noqa: E501
NFS = """\
mountpoint -q ~/runs || {{
  sudo apt-get update -qq && sudo apt-get install -qq -y nfs-common
  sudo mount -t nfs {share} ~/runs
}}"""

# TPU VMs come with an older Python. A process left over from a broken connection ends first.
SETUP = """\
set -e
pkill -f '[j]axdec train' || true
rm -rf ~/jaxdec && mkdir -p ~/jaxdec ~/runs && tar xzf ~/{archive} -C ~/jaxdec
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/venv
~/.local/bin/uv pip install --quiet --python ~/venv/bin/python "$HOME/jaxdec[tpu]"
{mount}"""


def options() -> argparse.ArgumentParser:
  out = commands.parser("Trains on a Cloud TPU queued resource.")
  out.add_argument("--accelerator", required=True, help="such as v6e-64, v5p-128, v5litepod-16")
  out.add_argument("--zone", required=True)
  out.add_argument("--storage", required=True, help="gs://BUCKET, or HOST:/SHARE of an NFS server")
  out.add_argument("--project", help="by default gcloud's")
  out.add_argument("--runtime-version", help="by default the one for JAX on that accelerator")
  out.add_argument("--create-flag", action="append", default=[], metavar="FLAG",
                   help="passed to create, such as --create-flag=--reserved")  # fmt: skip
  out.add_argument("--keep", action="store_true", help="don't delete the resource at the end")
  out.add_argument("--max-failures", type=int, default=3,
                   help="failures without a preemption after which to give up")  # fmt: skip
  out.add_argument("--poll", type=float, default=30.0, help="seconds between looks at its state")
  return out


class QueuedResource:
  """The gcloud commands about one queued resource."""

  def __init__(self, opts: argparse.Namespace, shell: commands.Commands):
    self.opts, self.shell = opts, shell
    self.place = [f"--zone={opts.zone}"] + [f"--project={opts.project}"] * bool(opts.project)

  def gcloud(self, verb: str, *args: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *args, *self.place]

  def state(self) -> str | None:
    """None where there is no such resource."""
    return self.shell.read(*self.gcloud("describe", self.opts.name, "--format=value(state.state)"))

  def create(self) -> None:
    kind = self.opts.accelerator.partition("-")[0]
    runtime = self.opts.runtime_version or RUNTIMES.get(kind)
    if runtime is None:
      raise commands.Mistake(
        f"no runtime version is known for --accelerator {self.opts.accelerator!r} (known: "
        f"{', '.join(RUNTIMES)}); give --runtime-version"
      )
    flags = ["--spot"] * self.opts.spot + self.opts.create_flag
    self.shell.run(*self.gcloud(
      "create", self.opts.name, f"--node-id={self.opts.name}",
      f"--accelerator-type={self.opts.accelerator}", f"--runtime-version={runtime}", *flags,
    ))  # fmt: skip

  def delete(self) -> None:
    self.shell.run(*self.gcloud("delete", self.opts.name, "--force", "--quiet"))

  def wait(self) -> bool:
    """Until it can be used: True. False: it failed, and is deleted."""
    shown = None
    while not self.shell.dry_run:
      state = self.state()
      if state != shown:
        print(f"{self.opts.name}: {state or 'is asked for'}", flush=True)
        shown = state
      if state == "ACTIVE":
        break
      if state is None:
        self.create()
      elif state in GONE:
        self.delete()
        if state == "FAILED":
          return False
      time.sleep(self.opts.poll)
    return True

  def attempt(self) -> int:
    """Installs and trains on all workers at once, their output here; the exit code."""
    everywhere = ("--worker=all", "--node=all")
    mount = _mount(self.opts.storage)
    setup = SETUP.format(archive=ARCHIVE.name, mount=mount)
    train = "cd ~/jaxdec && " + commands.train(self.opts, "~/venv/bin/jaxdec", "../runs")
    return (
      self.shell.run(
        *self.gcloud("scp", str(ARCHIVE), f"{self.opts.name}:", *everywhere), may_fail=True
      )
      or self.shell.run(
        *self.gcloud("ssh", self.opts.name, *everywhere, f"--command={setup}"), may_fail=True
      )
      or self.shell.run(
        *self.gcloud("ssh", self.opts.name, *everywhere, f"--command={train}"), may_fail=True
      )
    )


def _mount(storage: str) -> str:
  if storage.startswith("gs://") and storage[5:].strip("/"):
    return GCSFUSE.format(bucket=shlex.quote(storage[5:].strip("/")))
  host, _, share = storage.partition(":")
  if host and share.startswith("/") and host != "gs":
    return NFS.format(share=shlex.quote(storage))
  raise commands.Mistake(f"--storage is gs://BUCKET or HOST:/SHARE, got {storage!r}")


def launch(argv: Sequence[str]) -> int:
  opts = commands.parse(options(), argv)
  _mount(opts.storage)
  shell = commands.Commands(
    {"gcloud": "install the Google Cloud CLI (cloud.google.com/sdk)"}, dry_run=opts.dry_run
  )
  resource = QueuedResource(opts, shell)
  shell.run("git", "archive", f"--output={ARCHIVE}", "HEAD")
  if opts.dry_run:
    resource.create()
    print(shlex.join(resource.gcloud("describe", opts.name, "--format=value(state.state)")))
  failures = 0
  while failures <= opts.max_failures:
    code = resource.attempt() if resource.wait() else 1
    if code == 0:
      if not opts.keep:
        resource.delete()
      return 0
    if code == 2:
      raise commands.Mistake(f"a mistake in the options, see above; {_left(resource)}")
    state = resource.state()
    # 130: stopped and saved, on the notice of a preemption that the state doesn't show yet.
    if code == 130 or state not in ("ACTIVE", None):
      print(f"{opts.name}: preempted ({state}); the run goes on from its checkpoint", flush=True)
    else:
      failures += 1
      print(f"{opts.name}: failure {failures} (code {code}, {state})", flush=True)
    time.sleep(opts.poll)
  raise commands.Mistake(f"gave up after {failures} failures; {_left(resource)}")


def _left(resource: QueuedResource) -> str:
  delete = shlex.join(resource.gcloud("delete", resource.opts.name, "--force", "--quiet"))
  return f"the TPU is left for a look and costs until `{delete}`"


if __name__ == "__main__":
  sys.exit(commands.main(launch))
