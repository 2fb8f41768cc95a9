# SPDX-License-Identifier: Apache-2.0
"""Largest logit errors against the recorded outputs of transformers, checkpoint by checkpoint.

Command:   python experiments/bench/parity.py
Expected:  every error at most 2e-4 and every continuation of 64 tokens identical, float32.

Measures what ``tests/models/test_parity.py`` asserts, on the same recorded cases.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxdec.report import Column, Table

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]

import parity_cases as cases  # noqa: E402
from test_parity import load_case  # noqa: E402


def measure(name: str) -> dict:
  """One row of the table."""
  with tempfile.TemporaryDirectory() as folder:
    record, lm = load_case(name, Path(folder))
  tokens = record["tokens"]
  out = lm.generate(tokens.tolist(), max_new_tokens=cases.NEW_TOKENS, stop=None)
  same = np.all(np.asarray(out.tokens) == record["continuation"], axis=1)
  return {
    "case": name,
    "error": float(np.abs(np.asarray(lm(tokens)) - record["logits"]).max()),
    "identical": f"{same.sum()} of {len(same)} rows of {cases.NEW_TOKENS} tokens",
  }


def main() -> None:
  table = Table(
    [
      Column("case", "checkpoint", align="left"),
      Column("error", "largest logit error", ".1e"),
      Column("identical", "identical continuations", align="left"),
    ],
    [measure(name) for name in cases.CASES],
  )
  print(table.markdown())
  (Path(__file__).parent / "results" / "parity.md").write_text(table.markdown() + "\n")


if __name__ == "__main__":
  main()
