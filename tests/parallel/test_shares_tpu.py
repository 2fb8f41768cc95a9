# SPDX-License-Identifier: Apache-2.0
"""Rows of the hosts of real TPU slices, whose devices JAX lays out. Needs libtpu, and no TPU."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from jaxdec import slices
from jaxdec.data import Share
from jaxdec.parallel import batch_share, make_mesh

pytestmark = [
  pytest.mark.aot,
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


@pytest.mark.parametrize(
  ("topology", "sizes", "first"),
  [
    ("v5p:4x4x8", {"fsdp": 16, "seq": 8}, Share((0, 1, 4, 5), 16)),  # a host is a block of 2 x 2
    ("v5p:4x4x8", {"data": 4, "fsdp": 8, "seq": 4}, Share((0, 8), 32)),
    ("v6e:8x8", {"fsdp": 8, "seq": 8}, Share((0, 1), 8)),
    ("v6e:8x8", {"seq": 64}, Share((0,), 1)),
  ],
)
def test_hosts_read_all_rows_and_those_that_share_any_share_all(topology, sizes, first):
  mesh = make_mesh(devices=slices.parse(topology).devices(), **sizes)
  hosts = {device.process_index for device in mesh.devices.flat}
  shares = [batch_share(mesh, process_index=host) for host in sorted(hosts)]
  assert shares[0] == first
  rows = [tuple(share.rows(2 * share.of)) for share in shares]
  np.testing.assert_array_equal(sorted(sum({*rows}, ())), np.arange(2 * first.of))
