# SPDX-License-Identifier: Apache-2.0
"""Names of TPU slices, and the time model of their links."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.parallel.plan import GENERATIONS, parse
from jaxdec.parallel.plan.collectives import Collective
from jaxdec.parallel.plan.roofline import collective_seconds


@pytest.mark.parametrize(
  ("name", "chips", "devices"),
  [
    ("v5e:1x1", 1, 1),
    ("v5p:4x4x8", 128, 128),
    ("v5p:16x16x24", 6144, 6144),
    ("v4:2x2x1", 4, 4),
    ("v6e:16x16", 256, 256),
    ("tpu7x:4x4x4", 64, 128),
    ("v5e:16x16*2", 512, 512),
  ],
)
def test_sizes(name, chips, devices):
  topology = parse(name)
  assert (topology.chips, topology.num_devices, topology.name) == (chips, devices, name)


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("v5p", "written GENERATION:SHAPE"),
    ("v5p-256", "written GENERATION:SHAPE"),
    ("v5q:4x4x4", "did you mean 'v5"),
    ("trillium:4x4", "did you mean 'v6e'"),
    ("ironwood:2x2x1", "did you mean 'tpu7x'"),
    ("h100:8x8", "known: v4, v5e, v5p, v6e, tpu7x"),
    ("v5e:3x3", "near shapes are 2x4, 4x4"),
    ("v5e:4x4x4", "2 dimensions"),
    ("v5p:4x8", "3 dimensions"),
    ("v5p:16x16x32", "at most 6144 chips"),
    ("v5p:4x4x5", "near shapes are 4x4x4"),
    ("v5p:0x0x0", "has no slice"),
    ("v5e:16x16*0", "has no slice"),
  ],
)
def test_mistakes_name_what_exists(name, says):
  with pytest.raises(UserError) as error:
    parse(name)
  assert says in str(error.value) and "\n" not in str(error.value)


def test_every_listed_shape_exists():
  for generation in GENERATIONS.values():
    for shape in generation.shapes:
      assert parse(f"{generation.name}:{shape}").chips <= generation.chips


def slice_of(name):
  """Devices with the coordinates that libtpu gives them, and a mesh of one axis over all."""
  topology = parse(name)
  places = np.ndindex(*topology.shape[::-1])
  devices = [SimpleNamespace(coords=(*reversed(p), 0)[:3], slice_index=0) for p in places]
  array = np.empty(len(devices), object)
  array[:] = devices
  return topology, SimpleNamespace(devices=array)


def collective(kind, groups, size):
  groups = np.asarray(groups)
  return Collective(kind, (), 1, groups.shape[1], groups, ("seq",), size, False, False, "", "", "")


def test_a_ring_gathers_both_ways_and_a_line_only_one():
  topology, mesh = slice_of("v5p:4x4x4")
  link = topology.generation.link
  line = [0, 1, 2, 3]  # the whole x dimension, which wraps
  seconds = collective_seconds(collective("all-gather", [line], 3_000_000), mesh, topology)
  assert seconds == pytest.approx(3_000_000 / (2 * link))
  part = collective_seconds(collective("all-gather", [[0, 1]], 3_000_000), mesh, topology)
  assert part == pytest.approx(3_000_000 / link)
  everything = collective_seconds(
    collective("all-gather", [list(range(64))], 3_000_000), mesh, topology
  )
  assert everything == pytest.approx(3_000_000 / (6 * link))


def test_small_flat_slices_do_not_wrap():
  small, full = slice_of("v5e:4x4"), slice_of("v5e:16x16")
  rows = [[0, 1, 2, 3]], [list(range(16))]
  times = [
    collective_seconds(collective("all-gather", r, 8_000_000), mesh, topology)
    for r, (topology, mesh) in zip(rows, (small, full))
  ]
  assert times[0] == pytest.approx(2 * times[1])


def test_all_to_all_and_permutes():
  topology, mesh = slice_of("v6e:16x16")
  link = topology.generation.link
  row = list(range(16))
  # 15/16 of the bytes leave a device; n/8 link times of all of them on a ring of n.
  trade = collective_seconds(collective("all-to-all", [row], 15_000_000), mesh, topology)
  assert trade == pytest.approx(16_000_000 * 16 / 8 / link)
  near = collective("collective-permute", [(i, i + 1) for i in range(15)], 1_000_000)
  far = collective("collective-permute", [(i, (i + 8) % 16) for i in range(16)], 1_000_000)
  around = collective("collective-permute", [(15, 0)], 1_000_000)
  times = [collective_seconds(c, mesh, topology) for c in (near, far, around)]
  assert times == pytest.approx([1_000_000 / link, 8_000_000 / link, 1_000_000 / link])
