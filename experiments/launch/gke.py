# SPDX-License-Identifier: Apache-2.0
"""A run on TPU slices of a GKE cluster, through xpk (JobSet and Kueue).

``python experiments/launch/gke.py CONFIG --name RUN --cluster CLUSTER --tpu-type v6e-64
--zone us-east5-b --project PROJECT --storage STORAGE [--dry-run] [-- OPTIONS OF jaxdec train]``

The cluster and its storage are made once (README). Kubernetes restarts what was preempted, on all
slices together, and the run goes on from its last checkpoint. Works for several slices.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import commands


def options():
  out = commands.parser("Trains on a GKE cluster made with xpk.")
  out.add_argument("--cluster", required=True)
  out.add_argument("--tpu-type", required=True, help="of each slice, such as v6e-64")
  out.add_argument("--zone", required=True)
  out.add_argument("--project", required=True)
  out.add_argument("--storage", required=True, help="name of a storage attached with xpk")
  out.add_argument("--mount-point", default="/runs", help="where that storage is mounted")
  out.add_argument("--num-slices", type=int, default=1)
  out.add_argument("--base-docker-image", default="python:3.12", help="Python 3.11 or newer")
  out.add_argument("--max-restarts", type=int, default=50)
  out.add_argument("--poll", type=float, default=30.0, help="seconds between looks at its state")
  return out


def launch(argv: Sequence[str]) -> int:
  opts = commands.parse(options(), argv)
  shell = commands.Commands(
    {"xpk": "run `pip install xpk`", "kubectl": "run `gcloud components install kubectl`"},
    dry_run=opts.dry_run,
  )
  place = [f"--cluster={opts.cluster}", f"--zone={opts.zone}", f"--project={opts.project}"]
  # xpk copies the repository into the image, in its working directory.
  install = "pip install --quiet '.[tpu]'"
  train = commands.train(opts, "jaxdec", opts.mount_point)
  shell.run(
    "xpk", "workload", "create", f"--workload={opts.name}", *place,
    f"--tpu-type={opts.tpu_type}", f"--num-slices={opts.num_slices}", f"--storage={opts.storage}",
    f"--base-docker-image={opts.base_docker_image}", "--script-dir=.",
    # 1: another process died. 130 (stopped and saved) and 134 (ended by JAX) are xpk's own default.
    f"--max-restarts={opts.max_restarts}", "--restart-on-exit-codes=1",
    # Time to save after the notice of a preemption.
    "--termination-grace-period-seconds=120",
    *["--spot"] * opts.spot, f"--command={install} && exec {train}",
  )  # fmt: skip
  while True:
    # Ends with the pod, so at each restart; the first process is the one that reports.
    shell.run(
      "kubectl", "logs", "--follow", "--all-containers", "--pod-running-timeout=1h",
      f"--selector=jobset.sigs.k8s.io/jobset-name={opts.name},"
      "batch.kubernetes.io/job-completion-index=0", may_fail=True,
    )  # fmt: skip
    code = shell.run(
      "xpk", "workload", "list", *place, f"--wait-for-job-completion={opts.name}", "--timeout=0",
      may_fail=True,
    )  # fmt: skip
    if code == 0:
      return 0
    if code != 124:  # 124: not finished
      raise commands.Mistake(f"workload {opts.name} failed (xpk's code {code}); see its logs")
    time.sleep(opts.poll)


if __name__ == "__main__":
  sys.exit(commands.main(launch))
