# SPDX-License-Identifier: Apache-2.0
"""What works here and what does not, in one page; the first thing to attach to a bug report.

Nothing here raises: a check that cannot run says why. ``examine()`` returns plain data,
``jaxdec doctor`` prints it.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jaxdec
from jaxdec.report import machine

_GIB = 2**30
_EXTRAS = {
  "data": ("tensorflow-datasets", "importlib_resources"),
  "hub": ("huggingface_hub",),
  "dev": ("pytest", "ruff", "beartype"),
  "compare": ("torch", "transformers"),
  "aot": ("libtpu",),
}
_VARIABLES = (
  "JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_X64",
  "JAX_NUM_CPU_DEVICES",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the report. ``note`` marks what is absent but not needed."""

  area: str
  name: str
  status: Literal["ok", "note", "fail"]
  detail: str


def examine() -> list[Finding]:
  """Runs every check; one that breaks becomes a ``fail`` line with its reason."""
  findings: list[Finding] = []
  for check in (_software, _extras, _host, _devices, _kernels, _compiler, _embedded):
    try:
      findings += check()
    except Exception as error:  # a diagnosis that crashes diagnoses nothing
      findings.append(Finding("doctor", check.__name__.strip("_"), "fail", _reason(error)))
  return findings


def _reason(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _software() -> Iterator[Finding]:
  yield Finding("versions", "jaxdec", "ok", jaxdec.__version__)
  yield Finding("versions", "python", "ok", platform.python_version())
  for name, version in machine.versions().items():
    status = "ok" if version else "fail"
    yield Finding("versions", name, status, version or "not installed; run: pip install jaxdec")


def _extras() -> Iterator[Finding]:
  for extra, packages in _EXTRAS.items():
    missing = [name for name, version in machine.versions(packages).items() if version is None]
    if missing:
      yield Finding(
        "extras", extra, "note",
        f"not installed ({', '.join(missing)}); run: pip install 'jaxdec[{extra}]'",
      )  # fmt: skip
    else:
      yield Finding("extras", extra, "ok", "installed")


def _host() -> Iterator[Finding]:
  yield Finding("host", "cpu", "ok", f"{machine.cpu_model()}, {machine.cores()} cores")
  memory = machine.memory()
  if memory["available"] is None:
    yield Finding("host", "memory", "note", "unknown on this system")
  else:
    free, total = memory["available"] / _GIB, memory["total"] / _GIB
    status = "ok" if free >= 1 else "note"
    yield Finding("host", "memory", status, f"{free:.1f} of {total:.1f} GiB free")
  yield Finding("host", "disk", "ok", f"{shutil.disk_usage('.').free / _GIB:.1f} GiB free here")
  for name in _VARIABLES:
    if name in os.environ:
      yield Finding("host", name, "ok", os.environ[name])


def _devices() -> Iterator[Finding]:
  import jax

  try:
    devices = jax.devices()
  except Exception as error:  # RuntimeError, or AssertionError for a plugin that is missing
    wanted = os.environ.get("JAX_PLATFORMS")
    hint = f" (JAX_PLATFORMS={wanted}; unset it to fall back to the CPU)" if wanted else ""
    yield Finding("devices", "default backend", "fail", _reason(error) + hint)
    return
  yield Finding("devices", "default backend", "ok", devices[0].platform)
  for device in devices[:8]:
    detail = device.device_kind
    stats = _memory_stats(device)
    if stats:
      detail += f", {stats}"
    yield Finding("devices", f"{device.platform}:{device.id}", "ok", detail)
  if len(devices) > 8:
    yield Finding(
      "devices", "more", "ok", f"{len(devices) - 8} further devices of the same process"
    )


def _memory_stats(device: Any) -> str:
  try:
    stats = device.memory_stats() or {}
  except Exception:
    return ""
  if "bytes_limit" not in stats:
    return ""
  free = (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / _GIB
  return f"{free:.1f} of {stats['bytes_limit'] / _GIB:.1f} GiB free"


def implementations(device: Any) -> dict[str, str | None]:
  """Kernel implementation -> None where it can run on ``device``, else why it cannot."""
  kind, where = device.device_kind, device.platform
  out: dict[str, str | None] = {"reference": None, "xla": None}
  out["mosaic_tpu"] = None if where == "tpu" else f"needs a TPU, this is {kind!r} ({where})"
  out["mosaic_gpu"] = "not implemented yet; 'auto' takes 'xla' on GPUs"
  return out


def _kernels() -> Iterator[Finding]:
  import jax

  from pallas_kernels import static_cost

  try:
    device = jax.devices()[0]
  except Exception:
    yield Finding("kernels", "any", "fail", "no device to run on")
    return
  usable = implementations(device)
  for name, reason in usable.items():
    detail = reason or "usable"
    yield Finding("kernels", name, "note" if reason else "ok", detail)
  best = [name for name, reason in usable.items() if reason is None][-1]
  yield Finding("kernels", "auto", "ok", f"resolves to {best!r} on this device")
  missing = static_cost.missing()
  yield Finding(
    "kernels", "static cost", "note" if missing else "ok",
    missing or "libtpu is installed: python -m pallas_kernels.static_cost OP --topology v5e",
  )  # fmt: skip


def _compiler() -> Iterator[Finding]:
  import jax
  import jax.numpy as jnp
  import numpy as np

  try:
    jax.devices()
  except Exception:
    yield Finding("compiler", "smoke test", "fail", "no device to compile for")
    return
  x = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32)
  begin = time.perf_counter()
  got = np.asarray(jax.jit(_smoke)(jnp.asarray(x)))
  seconds = time.perf_counter() - begin
  scores = x.astype(np.float64) @ x.T
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  error = float(np.abs(got - weights / weights.sum(-1, keepdims=True) @ x).max())
  # default matmul precision on accelerators is bfloat16-like: 2e-2 bounds it for unit inputs
  status = "ok" if error < 2e-2 else "fail"
  yield Finding(
    "compiler", "smoke test", status,
    f"attention compiled and ran in {seconds:.2f} s, largest error {error:.1e} against NumPy",
  )  # fmt: skip


def _smoke(x):
  import jax

  return jax.nn.softmax(x @ x.T, axis=-1) @ x


def _embedded() -> Iterator[Finding]:
  from pathlib import Path

  folder = Path(jaxdec.__file__).parent / "assets" / "tiny_python"
  files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
  if not files:
    yield Finding("assets", "tiny model", "fail", f"no weights under {folder}; reinstall jaxdec")
    return
  size = sum(f.stat().st_size for f in files) / 2**20
  drafters = sorted(p.name for p in (folder / "drafters").glob("*") if p.is_dir())
  extra = f"; trained drafters: {', '.join(drafters)}" if drafters else ""
  yield Finding("assets", "tiny model", "ok", f"{size:.1f} MiB{extra}")


def report(findings: list[Finding], show: Callable[[Any], None]) -> int:
  """Prints the findings as one table; 1 if any failed, else 0."""
  from jaxdec.report import Column, Table

  marks = {"ok": "ok", "note": "--", "fail": "FAIL"}
  columns = [Column(k, align="left") for k in ("area", "check", "status", "detail")]
  rows = [
    {"area": f.area, "check": f.name, "status": marks[f.status], "detail": f.detail}
    for f in findings
  ]
  show(Table(columns, rows).rich())
  failed = [f for f in findings if f.status == "fail"]
  if failed:
    show(f"{len(failed)} of {len(findings)} checks failed: {', '.join(f.name for f in failed)}")
  else:
    show("everything that the default commands need works here")
  return 1 if failed else 0
