# SPDX-License-Identifier: Apache-2.0
"""The one place that makes a device mesh.

Axes, always all four and in this order: ``data`` (copies of the model), ``fsdp`` (parameters split
over batch shards), ``tensor`` (each matrix split), ``seq`` (one sequence split). Unused axes have
size 1, so that every sharding rule is valid on every mesh.

Inside a slice chips talk over ICI, between slices over the data-centre network (DCN), which is
slower by an order of magnitude. Only ``data`` and ``fsdp`` may cross it: they communicate once a
step or can be hidden, while ``tensor`` and ``seq`` communicate in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxdec.errors import UserError

AXES = ("data", "fsdp", "tensor", "seq")


def make_mesh(
  *,
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  seq: int = 1,
  dcn_data: int = 1,
  dcn_fsdp: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of exactly ``data * fsdp * tensor * seq`` devices with Auto axes.

  ``jax.make_mesh`` defaults to Explicit axes, under which Flax's logical constraints fail; Auto
  leaves the layout of intermediate values to the compiler. One of the sizes may be -1: it takes
  all devices the others leave.

  Args:
    data: replicas. fsdp: parameter shards along the batch. tensor: shards of each matrix.
    seq: shards of a sequence.
    dcn_data, dcn_fsdp: over how many slices ``data`` and ``fsdp`` reach; each divides its axis, and
      their product is the number of slices.
    devices: the devices to use; by default all, or the first few where the product is smaller
      and there is one process.

  Raises:
    UserError: sizes below 1, a product the device count cannot serve, or slices that ``dcn_data``
      and ``dcn_fsdp`` do not account for.
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
  devices = devices[:total]
  slices = _slices(devices)
  _check_slices(dict(zip(AXES, sizes)), dcn_data, dcn_fsdp, slices)
  ways = [dcn_data, dcn_fsdp, 1, 1]
  if total == 1:
    grid = np.array(devices).reshape(sizes)
  elif slices > 1:
    ici = [size // between for size, between in zip(sizes, ways)]
    grid = mesh_utils.create_hybrid_device_mesh(ici, ways, devices, allow_split_physical_axes=True)
  else:
    # Neighbours in the last axes become neighbours on the wire. An axis may take a part of a torus
    # dimension: fsdp=16, seq=4 on 8 x 8 chips.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[jax.Device]) -> int:
  """How many slices the devices lie in; 1 where the backend knows none."""
  return len({getattr(device, "slice_index", 0) for device in devices})


def _check_slices(sizes: dict[str, int], dcn_data: int, dcn_fsdp: int, slices: int) -> None:
  for axis, ways in (("data", dcn_data), ("fsdp", dcn_fsdp)):
    if ways < 1 or sizes[axis] % ways:
      raise UserError(
        f"dcn_{axis}={ways} must divide the mesh axis {axis}={sizes[axis]}, of which it is the "
        "part between slices"
      )
  if dcn_data * dcn_fsdp != slices:
    raise UserError(
      f"the devices lie in {slices} slice{'s' * (slices > 1)}, and dcn_data={dcn_data} x "
      f"dcn_fsdp={dcn_fsdp} makes {dcn_data * dcn_fsdp}; their product must be {slices}"
    )
