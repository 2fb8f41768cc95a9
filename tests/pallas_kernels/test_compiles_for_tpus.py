# SPDX-License-Identifier: Apache-2.0
"""Every TPU kernel compiles, with its gradients, for every generation and every shape in specs.py.

One process an op and generation: libtpu reads its environment once, and a crash stays in one test.
What a generation doesn't support is refused by the op with a reason, and listed here.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pallas_kernels import _aot
from pallas_kernels._tpu import GENERATIONS
from pallas_kernels.static_cost import OPS

pytestmark = [
  pytest.mark.aot,
  pytest.mark.skipif(not _aot.available(), reason="libtpu is not installed (the `aot` extra)"),
]

UNSUPPORTED: set[tuple[str, str, str]] = {  # (op, generation, spec); reasons in the README
  ("linear_cross_entropy", "v4", "llama3-8b-kl"),  # two heads of width 4096 fill its 16 MiB of VMEM
}

PROGRAM = """
import json, sys
from pallas_kernels import _aot, static_cost
op, generation = sys.argv[1:]
_aot.prepare(dump=False)
out = {}
for spec in static_cost.specs_of(op).SPECS:
  f, arguments = static_cost.program(op, spec)
  try:
    for program in (f, static_cost.with_gradients(f)):
      compiled = _aot.compile_for(generation, program, arguments)
      assert "tpu_custom_call" in compiled.as_text(), "no kernel in the program"
    out[spec.name] = "compiled"
  except NotImplementedError as refusal:
    out[spec.name] = f"refused: {refusal}"
print(json.dumps(out))
"""


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("op", OPS)
def test_compiles(op, generation):
  command = [sys.executable, "-c", PROGRAM, op, generation]
  done = subprocess.run(command, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  results = json.loads(done.stdout.splitlines()[-1])
  refused = {(op, generation, name) for name, what in results.items() if what != "compiled"}
  expected = {case for case in UNSUPPORTED if case[:2] == (op, generation)}
  assert refused == expected, results
