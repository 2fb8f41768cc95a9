# SPDX-License-Identifier: Apache-2.0
"""Suite-wide settings: CPU, eight simulated devices, our own deprecated calls are errors.

Set before jax is imported; a GPU or TPU run of the suite sets JAX_PLATFORMS itself.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()


def pytest_configure(config):
  for package in ("jaxdec", "pallas_kernels"):
    config.addinivalue_line("filterwarnings", rf"error::DeprecationWarning:{package}\..*")
