# SPDX-License-Identifier: Apache-2.0
"""Suite-wide settings: CPU, eight simulated devices, our own deprecated calls are errors.

Set before jax is imported; a GPU or TPU run of the suite sets JAX_PLATFORMS itself.

Four fifths of the suite's time is XLA optimising programs that run once: `--quick` compiles without
(`QUICK`: a third of the time). A run whose XLA_FLAGS names an optimisation level keeps it.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import pathlib
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# LLVM without optimisation, the plainer emitters of fusions, one module a program.
QUICK = (
  "--xla_backend_optimization_level=0",
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
)


def _compile_quickly() -> None:
  # XLA aborts the process at a flag it does not know, so only the version tried gets them
  known = importlib.metadata.version("jaxlib").startswith("0.10.")
  if known and "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] = " ".join((os.environ["XLA_FLAGS"], *QUICK))


def pytest_addoption(parser):
  parser.addoption("--quick", action="store_true", help="compile programs without optimisation")


def pytest_configure(config):
  if config.getoption("--quick"):
    _compile_quickly()
  for package in ("jaxdec", "pallas_kernels"):
    config.addinivalue_line("filterwarnings", rf"error::DeprecationWarning:{package}\..*")


@pytest.fixture(scope="module", autouse=True)
def _release_programs():
  """Forgets compiled programs between files, before the process can hold no more of them.

  A program takes about seven memory maps, Linux allows a process 65,530, and XLA crashes there.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if not maps.exists() or len(maps.read_bytes().splitlines()) < 20_000:
    return
  import jax

  if (executables := sys.modules.get("jaxdec.decoding.executables")) is not None:
    executables.clear()
  jax.clear_caches()
  gc.collect()
