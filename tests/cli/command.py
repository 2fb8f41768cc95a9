# SPDX-License-Identifier: Apache-2.0
"""Runs the command in a process of its own and reports which heavy packages it had loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

PLATFORM = "cpu"

# Prints, as the last line of stdout, which packages the command had loaded when it ended.
_DRIVER = """
import json, sys
from jaxdec.cli import main
code = 70
try:
  code = main(sys.argv[1:])
except SystemExit as stop:
  code = stop.code or 0
finally:
  heavy = ("jax", "flax", "torch", "tensorflow", "transformers", "matplotlib")
  print(json.dumps([m for m in heavy if m in sys.modules]))
sys.exit(code)
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
  code: int
  out: str
  err: str
  heavy: list[str]


def run_jaxdec(*args: str, cwd=None, timeout: float = 120) -> Outcome:
  env = {**os.environ, "JAX_PLATFORMS": PLATFORM, "COLUMNS": "100"}
  done = subprocess.run(
    [sys.executable, "-c", _DRIVER, *args],
    capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout,
  )  # fmt: skip
  *out, last = done.stdout.splitlines() or [""]
  return Outcome(done.returncode, "\n".join(out), done.stderr, json.loads(last or "null"))


def assert_sentence(outcome: Outcome, *parts: str) -> None:
  """Exit code 2, one line on stderr with every part in it, nothing on stdout, no traceback."""
  assert outcome.code == 2, outcome
  lines = outcome.err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith("jaxdec: "), outcome.err
  assert "Traceback" not in outcome.err
  assert outcome.out == "", outcome.out
  for part in parts:
    assert part in lines[0], (part, lines[0])
