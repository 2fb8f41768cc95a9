# SPDX-License-Identifier: Apache-2.0
"""What every TPU kernel shares: facts of the chip, and one way to call Pallas."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._dispatch import current_target
from pallas_kernels.manual import vary_alike

LANES = 128
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TensorCore of a TPU generation. Peaks are per core; v4, v5p and tpu7x have two a chip.

  Attributes:
    clock_hz: bundles issued a second.
    macs_per_cycle: bfloat16 multiply-adds a cycle of all matrix units.
    hbm_bytes_per_second, vmem_bytes, smem_bytes: of the core.
  """

  name: str
  topology: str
  clock_hz: float
  macs_per_cycle: int
  hbm_bytes_per_second: float
  vmem_bytes: int
  smem_bytes: int


# Clocks: peak bfloat16 rate / multiply-adds a cycle, a power of two in every generation.
_GENERATIONS = {
  "v4": (pltpu.ChipVersion.TPU_V4, "v4:2x2x1", 65536),
  "v5e": (pltpu.ChipVersion.TPU_V5E, "v5e:2x2", 65536),
  "v5p": (pltpu.ChipVersion.TPU_V5P, "v5p:2x2x1", 65536),
  "v6e": (pltpu.ChipVersion.TPU_V6E, "v6e:2x2", 262144),
  "tpu7x": (pltpu.ChipVersion.TPU_7X, "tpu7x:2x2x1", 262144),
}
GENERATIONS = tuple(_GENERATIONS)
_KINDS = {
  "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
  "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip


def chip(name: str | None = None) -> Chip:
  """The named generation; None: the target's, else this machine's, else v5e."""
  if name is None:
    name = current_target().generation
  if name is None and jax.default_backend() == "tpu":
    name = _KINDS.get(jax.devices()[0].device_kind)
  name = name or "v5e"
  if name not in _GENERATIONS:
    raise ValueError(f"unknown TPU generation {name!r}; use one of {', '.join(GENERATIONS)}.")
  version, topology, macs = _GENERATIONS[name]
  info = pltpu.get_tpu_info_for_chip(version, 1)
  return Chip(
    name=name,
    topology=topology,
    clock_hz=info.bf16_ops_per_second / 2 / macs,
    macs_per_cycle=macs,
    hbm_bytes_per_second=info.mem_bw_bytes_per_second,
    vmem_bytes=info.vmem_capacity_bytes,
    smem_bytes=info.smem_capacity_bytes,
  )


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
  """Matrix units round float32 operands to bfloat16 unless told not to."""
  wide = jnp.dtype(dtype).itemsize >= 4
  return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def call(
  kernel: Callable[..., None],
  *,
  name: str,
  out_shape: Any,
  grid_spec: pltpu.PrefetchScalarGridSpec | pl.GridSpec,
  dimension_semantics: Sequence[str],
  flops: int,
  bytes_accessed: int,
  transcendentals: int = 0,
  interpret: Any = False,
  vmem_limit_bytes: int | None = None,
  **compiler: Any,
) -> Callable[..., Any]:
  """``pl.pallas_call`` with a name, a cost estimate and the compiler's parameters.

  Inside ``jax.shard_map`` its outputs vary over the mesh axes over which any input does.
  """
  make = functools.partial(
    pl.pallas_call,
    kernel,
    grid_spec=grid_spec,
    name=name,
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=tuple(dimension_semantics),
      vmem_limit_bytes=vmem_limit_bytes,
      **compiler,
    ),
    cost_estimate=pl.CostEstimate(
      flops=int(flops),
      bytes_accessed=int(bytes_accessed),
      transcendentals=int(transcendentals),
    ),
  )

  def run(*args):
    args = vary_alike(*args)
    kind = jax.typeof(jax.tree.leaves(args)[0]).manual_axis_type
    shapes = jax.tree.map(lambda x: x.update(manual_axis_type=kind), out_shape)
    return make(out_shape=shapes)(*args)

  return run


def to_kernel(x: jax.Array) -> jax.Array:
  """``[B,T,heads,H]`` as ``[B,T,heads*H]``, of which a kernel takes columns, where H fills lanes.

  Other widths can't be cut from the lanes and are moved to ``[B,heads,T,H]``.
  """
  b, t, heads, h = x.shape
  return x.reshape(b, t, heads * h) if h % LANES == 0 else jnp.moveaxis(x, 2, 1)


def kernel_shape(b: int, t: int, heads: int, h: int) -> tuple[int, ...]:
  """The shape that ``to_kernel`` gives."""
  return (b, t, heads * h) if h % LANES == 0 else (b, heads, t, h)


def from_kernel(x: jax.Array, heads: int) -> jax.Array:
  """The inverse of ``to_kernel``."""
  if x.ndim == 3:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)
  return jnp.moveaxis(x, 1, 2)
