# SPDX-License-Identifier: Apache-2.0
"""The README tells the truth: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [m.groups() for m in _BLOCK.finditer(README)]


def _python(run: bool) -> list[str]:
  return [
    body for language, rest, body in BLOCKS if language == "python" and ("no-run" in rest) != run
  ]


def test_there_is_something_to_test():
  assert _python(run=True) and _python(run=False)


@pytest.mark.parametrize("code", _python(run=True))
def test_python_runs(code, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("code", _python(run=False))
def test_python_that_takes_long_names_real_things(code):
  """Imports and configurations are evaluated; nothing is trained."""
  tree = ast.parse(code)
  names: dict = {}
  imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
  exec(compile(ast.Module(imports, []), "README.md", "exec"), names)
  calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
  configs = [n for n in calls if n.func.id.endswith("Config")]
  assert configs
  for call in configs:
    eval(compile(ast.Expression(call), "README.md", "eval"), names)


def _commands() -> list[str]:
  lines = [
    line for language, _, body in BLOCKS if language == "console" for line in body.splitlines()
  ]
  return [line[2:] for line in lines if line.startswith("$ jaxdec ")]


@pytest.mark.parametrize("line", _commands())
def test_commands_parse(line, monkeypatch):
  from jaxdec.cli.configs import COMMANDS
  from jaxdec.cli.parse import parse

  _, name, *args = shlex.split(line)
  parse(name, COMMANDS[name], args)


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  for target in re.findall(r"`?make (\w+)`?", README):
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
  links = re.findall(r"\]\(([^)#]+)\)", README)
  assert links
  for link in links:
    assert link.startswith("https://") or (ROOT / link).exists(), link
