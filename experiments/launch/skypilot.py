# SPDX-License-Identifier: Apache-2.0
"""A run on TPUs (or GPUs) that SkyPilot finds, as a managed job that survives preemptions.

``python experiments/launch/skypilot.py CONFIG --name RUN --accelerator tpu-v6e-32
--bucket gs://BUCKET [--spot] [--dry-run] [-- OPTIONS OF jaxdec train]``

Fills in ``sky.yaml`` beside this file; everything else, logs and recovery too, is SkyPilot's.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import commands


def options():
  out = commands.parser("Trains in a SkyPilot managed job.")
  out.add_argument("--accelerator", required=True, help="such as tpu-v6e-32, tpu-v5p-64")
  out.add_argument("--bucket", required=True, help="gs://BUCKET for checkpoints and metrics")
  out.add_argument("--infra", help="such as gcp/us-east5, by default wherever there is one")
  return out


def launch(argv: Sequence[str]) -> int:
  opts = commands.parse(options(), argv)
  if not opts.bucket.startswith("gs://") or not opts.bucket[5:]:
    raise commands.Mistake(f"--bucket is gs://BUCKET, got {opts.bucket!r}")
  shell = commands.Commands(
    {"sky": "run `pip install 'skypilot[gcp]'` and `sky check`"}, dry_run=opts.dry_run
  )
  variables = {"BUCKET": opts.bucket, "CONFIG": opts.config, "RUN": opts.name,
               "TRAIN_OPTIONS": shlex.join(opts.train)}  # fmt: skip
  return shell.run(
    "sky", "jobs", "launch", "--yes", f"--name={opts.name}", f"--gpus={opts.accelerator}",
    *["--use-spot"] * opts.spot, *[f"--infra={opts.infra}"] * bool(opts.infra),
    *[f"--env={name}={value}" for name, value in variables.items()],
    "experiments/launch/sky.yaml",
  )  # fmt: skip


if __name__ == "__main__":
  sys.exit(commands.main(launch))
