# SPDX-License-Identifier: Apache-2.0
"""Meshes over several slices: which axes cross between them, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.parallel import make_mesh, mesh


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the mesh reads of a device of a multi-slice machine."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "gpu"
  device_kind: str = "test"


CHIPS = [Chip(i, slice_index=i // 4) for i in range(8)]


@pytest.fixture(autouse=True)
def plain_mesh(monkeypatch):
  """jax's Mesh takes real devices only; the grid is what matters here."""
  monkeypatch.setattr(mesh, "Mesh", lambda grid, axes, axis_types: grid)


@pytest.mark.parametrize(
  "sizes",
  [
    dict(data=2, tensor=4, dcn_data=2),
    dict(data=4, seq=2, dcn_data=2),
    dict(data=2, fsdp=2, seq=2, dcn_fsdp=2),
  ],
)
def test_only_the_named_axis_crosses_slices(sizes):
  grid = make_mesh(**sizes, devices=CHIPS)
  of = np.vectorize(lambda chip: chip.slice_index)(grid)
  ids = np.vectorize(lambda chip: chip.id)(grid)
  assert sorted(ids.ravel()) == list(range(8))
  crossing = 0 if "dcn_data" in sizes else 1
  for axis in range(4):
    same = (of == of.take([0], axis=axis)).all()
    assert same == (axis != crossing or grid.shape[axis] == 1)


def test_slices_must_be_accounted_for():
  with pytest.raises(UserError, match=r"lie in 2 slices, and dcn_data=1 x dcn_fsdp=1 makes 1"):
    make_mesh(data=2, tensor=4, devices=CHIPS)
  with pytest.raises(UserError, match=r"lie in 1 slice, .*makes 2; their product must be 1"):
    make_mesh(data=4, dcn_data=2, devices=CHIPS[:4])
  with pytest.raises(UserError, match=r"dcn_data=2 must divide the mesh axis data=1"):
    make_mesh(tensor=8, dcn_data=2, devices=CHIPS)
