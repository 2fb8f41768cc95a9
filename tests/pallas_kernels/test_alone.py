# SPDX-License-Identifier: Apache-2.0
"""The package stands on jax alone, and what its docstrings show is true."""

from __future__ import annotations

import ast
import doctest
import importlib
import pathlib
import sys

import pytest

import pallas_kernels

ROOT = pathlib.Path(pallas_kernels.__file__).parent
ALLOWED = {"jax", "numpy", "pallas_kernels", *sys.stdlib_module_names}
OPS = [n for n in pallas_kernels.__all__ if (ROOT / n).is_dir()]
FILES = {"__init__", "reference", "xla", "mosaic_tpu", "mosaic_gpu", "specs"}


def _imports(path: pathlib.Path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      found.add(node.module.partition(".")[0])
  return found


def test_imports_nothing_else():
  foreign = {str(p.relative_to(ROOT)): _imports(p) - ALLOWED for p in ROOT.rglob("*.py")}
  assert not {name: found for name, found in foreign.items() if found}


def test_every_op_has_the_same_files():
  assert len(OPS) == 6
  for op in OPS:
    assert {p.stem for p in (ROOT / op).glob("*.py")} >= FILES, op


@pytest.mark.parametrize("op", OPS)
def test_examples_of_the_docstring(op):
  module = importlib.import_module(f"pallas_kernels.{op}")
  results = doctest.testmod(module)
  assert results.attempted and not results.failed


@pytest.mark.parametrize("op", OPS)
def test_specs_describe_the_op(op):
  """Every shape can be built, and has a cost and a name of its own."""
  from pallas_kernels import static_cost

  module = static_cost.specs_of(op)
  assert len({spec.name for spec in module.SPECS}) == len(module.SPECS) >= 4
  for spec in module.SPECS:
    _, (differentiable, _) = static_cost.program(op, spec)
    assert differentiable
    cost = module.cost(spec)
    assert cost.flops > 0 and cost.bytes > 0
