# SPDX-License-Identifier: Apache-2.0
"""The one place that makes a device mesh.

Axes, always all four and in this order: ``data`` (copies of the model), ``fsdp`` (parameters split
over batch shards), ``tensor`` (each matrix split), ``seq`` (one sequence split). Unused axes have
size 1, so that every sharding rule is valid on every mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxdec.errors import UserError

AXES = ("data", "fsdp", "tensor", "seq")


def make_mesh(
  *,
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  seq: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of exactly ``data * fsdp * tensor * seq`` devices with Auto axes.

  ``jax.make_mesh`` defaults to Explicit axes, under which Flax's logical constraints fail; Auto
  leaves the layout of intermediate values to the compiler. One of the sizes may be -1: it takes
  all devices the others leave.

  Args:
    data: replicas. fsdp: parameter shards along the batch. tensor: shards of each matrix.
    seq: shards of a sequence.
    devices: the devices to use; by default all, or the first few where the product is smaller
      and there is one process.

  Raises:
    UserError: sizes below 1, or a product the device count cannot serve.
  """
  everything = devices is None
  devices = list(jax.devices() if everything else devices)
  sizes = [data, fsdp, tensor, seq]
  named = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
  if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
    raise UserError(
      f"mesh sizes must be at least 1 (one of them may be -1: all remaining devices), got {named}"
    )
  if -1 in sizes:
    rest = -math.prod(sizes)
    if len(devices) % rest:
      raise UserError(
        f"mesh {named} cannot be filled: the sizes given need a multiple of {rest} devices, "
        f"and there are {len(devices)}"
      )
    sizes[sizes.index(-1)] = len(devices) // rest
  total = math.prod(sizes)
  # One process may leave devices idle (tests, small runs); several processes may not, because a
  # process without a device in the mesh would hang in the first collective.
  partial = everything and jax.process_count() == 1 and total < len(devices)
  if total != len(devices) and not partial:
    raise UserError(
      f"mesh {named} needs {total} devices, and there are {len(devices)}; choose sizes whose "
      f"product is {len(devices)}"
    )
  if total == 1:
    grid = np.array(devices[:1]).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  # make_mesh orders the devices so that neighbours in the last axes are neighbours on the wire.
  return jax.make_mesh(
    tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:total]
  )
