# SPDX-License-Identifier: Apache-2.0
"""Suite-wide settings: CPU, eight simulated devices, our own deprecated calls are errors.

Set before jax is imported; a GPU or TPU run of the suite sets JAX_PLATFORMS itself.
"""

from __future__ import annotations

import gc
import os
import pathlib
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()


def pytest_configure(config):
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

  if (loop := sys.modules.get("jaxdec.decoding.loop")) is not None:
    for executable in (loop.prefill, loop.begin, loop.decode):
      executable.clear()
  jax.clear_caches()
  gc.collect()
