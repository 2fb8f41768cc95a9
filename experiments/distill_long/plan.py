# SPDX-License-Identifier: Apache-2.0
"""What one step of the long distillation needs on a TPU slice that is not there.

Command:   python -m experiments.distill_long.plan --topology v5p:2x2x4    (16 chips; needs libtpu)
Expected:  README.md beside this file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.distill_long import config
from jaxdec.parallel.plan import plan, report

RESULTS = Path(__file__).parent / "results"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v5p:2x2x4")
  arguments = parser.parse_args()
  found = plan(config.long(), arguments.topology)
  lines = [table.markdown() for table in report.tables(found, rows=20)]
  text = "\n".join([*lines, *(f"{line}  " for line in report.summary(found))]) + "\n"
  print(text)
  RESULTS.mkdir(exist_ok=True)
  name = arguments.topology.replace(":", "-")
  (RESULTS / f"plan-{name}.md").write_text(text, encoding="utf-8")
  return 0 if found.memory.fits else 1


if __name__ == "__main__":
  sys.exit(main())
