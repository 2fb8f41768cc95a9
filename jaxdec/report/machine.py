# SPDX-License-Identifier: Apache-2.0
"""What a number was measured on: versions, devices, memory."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
  "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers",
)  # fmt: skip


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
  """Installed version of each package, None where it is absent; imports nothing."""
  out: dict[str, str | None] = {}
  for name in packages:
    try:
      out[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      out[name] = None
  return out


def memory() -> dict[str, int | None]:
  """Bytes of main memory, total and available now (None where /proc is not there)."""
  out: dict[str, int | None] = {"total": None, "available": None}
  try:
    for line in Path("/proc/meminfo").read_text().splitlines():
      key, _, rest = line.partition(":")
      if key in ("MemTotal", "MemAvailable"):
        out["total" if key == "MemTotal" else "available"] = int(rest.split()[0]) * 1024
  except OSError:
    pass
  return out


def cpu_model() -> str:
  """Marketing name of the processor, else its architecture."""
  try:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def cores() -> int:
  """Cores this process may run on."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:
    return os.cpu_count() or 1


def describe() -> dict[str, Any]:
  """Everything a results file says about its machine; initialises the JAX backend."""
  import jax

  devices = jax.devices()
  return {
    "cpu": cpu_model(),
    "cores": cores(),
    "memory_gib": round((memory()["total"] or 0) / 2**30, 1),
    "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
    "system": f"{platform.system()} {platform.release()}",
    "python": platform.python_version(),
    "versions": versions(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "platform": devices[0].platform,
  }
