# SPDX-License-Identifier: Apache-2.0
"""Reading a compiler's schedule, and the command line around it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pallas_kernels import _aot, static_cost
from pallas_kernels._specs import Inner, Spec
from pallas_kernels._tpu import chip

BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 1 }
   0x1 LB: > { %s2 = smov 2 /* a comment
that goes on */ }
   0x2   : > { %v1 = vld [vmem:%s2] }
   0x3 LB: > > { %v2 = vadd %v1, %v1 }
   0x4   :  {}
   0x5   : > > { %v3 = vmatmul %v2 }
   0x6 PF: > { %v4 = vpop %v3 }
   0x7 LB: > > { %v5 = vadd %v1, %v1 }
   0x8   :  { %s9 = smov 3 }
"""
UNITS = """== CAPACTIY:
MXU, VALU, VSTORE:SPILL
    4     4     1
== UTILIZATION:
0 0 0
0 1 0
0 0 1
0 2 0
0 0 0
1 0 0
0 0 0
0 1 0
0 0 0
"""
PLACED = """
  #allocation1 [shape = 'u8[64]{0}', space=vmem, size = 0x40, offset = 0x10, scoped, tag = 'a']
  #allocation2 [shape = 'u8[64]{0}', space=vmem, size = 0x40, offset = 0, scoped, tag = 'b']
  #allocation3 [shape = 's32[1]{0}', space=smem, size = 0x4, offset = 8, fixed_abs, tag = 'c']
"""

needs_libtpu = pytest.mark.skipif(
  not _aot.available(), reason="libtpu is not installed (the `aot` extra)"
)


@pytest.fixture(scope="module")
def schedule():
  return _aot._schedule("kernel.1", BUNDLES, UNITS, PLACED)


def test_loops_nest_and_empty_bundles_belong_to_their_loop(schedule):
  assert schedule.bundles == 9
  (outer,) = schedule.loops
  assert (outer.bundles, outer.own) == (7, 3)
  first, second = outer.inner
  assert (first.bundles, second.bundles) == (3, 1)
  assert first.slots == {"MXU": 1, "VALU": 2, "VSTORE:SPILL": 0}
  assert outer.own_slots == {"MXU": 0, "VALU": 1, "VSTORE:SPILL": 1}
  assert schedule.find(0, 1) is second


def test_memory_is_the_highest_address(schedule):
  assert (schedule.vmem_bytes, schedule.smem_bytes) == (0x50, 12)


def test_units_per_trip_and_own_bundles(schedule):
  on = chip("v5e")
  inner = [
    Inner("kernel", (0,), "row", 1, 0, trips=10),
    Inner("kernel", (0, 0), "tile", 2, 3 * on.macs_per_cycle, trips=50),
    Inner("another", (0,), "tile", 1, 1, trips=1),
    Inner("kernel", (0, 2), "unrolled", 1, 1, trips=1),
  ]
  report = static_cost.kernel_report(schedule, inner, on, backward=False)
  row, tile = report.loops
  assert (row.bundles, tile.bundles, tile.bundles_per_unit) == (3, 3, 1.5)
  assert tile.matrix_unit == 1.0
  assert report.cycles == 3 * 10 + 3 * 50
  assert report.spills == 1


def test_spec_sizes_are_checked():
  spec = Spec("a", {"T": 4, "N": 2})
  assert spec.T == 4 and spec.replace({"T": 8}).T == 8 and spec.T == 4
  with pytest.raises(ValueError, match="no size 'S'"):
    spec.replace({"S": 1})
  with pytest.raises(AttributeError, match="'Z'"):
    _ = spec.Z


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    (["linear_attention", "--spec", "nothing"], "no spec 'nothing'"),
    (["linear_attention", "--shape", "T:8"], "--shape is a list like"),
    (["linear_attention", "--shape", "Y=8"], "no size 'Y'"),
    (["linear_attention", "--against", "splash"], "nothing called 'splash'"),
  ],
)
def test_mistakes_get_one_sentence(capsys, arguments, sentence):
  assert static_cost.main(arguments) == 2
  assert sentence in capsys.readouterr().err


def test_without_libtpu_it_says_what_to_install(capsys, monkeypatch):
  monkeypatch.setattr(_aot, "available", lambda: False)
  assert static_cost.main(["linear_attention"]) == 2
  assert "pip install 'jaxdec[aot]'" in capsys.readouterr().err


@needs_libtpu
def test_the_command_prints_a_report():
  """In a process of its own: libtpu reads its environment once."""
  command = [sys.executable, "-m", "pallas_kernels.static_cost", "block_sparse_attention"]
  command += ["--topology", "v5e", "--shape", "T=2048,N=2,K=2", "--against", "splash", "--json"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  (report,) = json.loads(done.stdout)
  ours = [k for k in report["kernels"] if not k["backward"]]
  assert ours and all(k["vmem_bytes"] > 0 for k in ours)
  loops = [loop for k in ours for loop in k["loops"]]
  assert loops and all(0 < loop["matrix_unit"] <= 1 for loop in loops if loop["matrix_unit"])
  assert any("splash" in k["name"] for k in report["against"])
