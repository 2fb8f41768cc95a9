# SPDX-License-Identifier: Apache-2.0
"""``import jaxdec`` is instant and has no side effect; nothing needs torch or TensorFlow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jaxdec

FORBIDDEN = ("torch", "tensorflow", "transformers", "huggingface_hub", "tensorflow_datasets")


def _python(code: str, **environment) -> dict:
  env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_import_loads_the_standard_library_only():
  loaded = _python(
    "import sys; before = set(sys.modules); import jaxdec, json;"
    "roots = {m.partition('.')[0] for m in set(sys.modules) - before};"
    "print(json.dumps(sorted(roots - set(sys.stdlib_module_names))))"
  )
  assert loaded == ["jaxdec"]


def test_public_names_load_no_foreign_framework_and_touch_no_device():
  code = (
    "import json, os, sys, jax; before = dict(os.environ); import jaxdec\n"
    "for name in jaxdec.__all__: getattr(jaxdec, name)\n"
    "import jaxdec.drafting, jaxdec.training, jaxdec.models, jaxdec.decoding\n"
    "from jax._src import xla_bridge\n"
    f"print(json.dumps({{'foreign': [m for m in {FORBIDDEN} if m in sys.modules],\n"
    "  'backends': list(xla_bridge._backends), 'env': dict(os.environ) == before,\n"
    "  'x64': jax.config.jax_enable_x64}))"
  )
  assert _python(code) == {"foreign": [], "backends": [], "env": True, "x64": False}


def test_unknown_attribute_is_an_attribute_error():
  try:
    jaxdec.generat  # noqa: B018
  except AttributeError as error:
    assert "generat" in str(error)
  else:
    raise AssertionError("no AttributeError")


def test_no_source_file_imports_a_foreign_framework():
  """No file of the package names torch, TensorFlow or transformers in an import statement."""
  import ast
  import pathlib

  for path in pathlib.Path(jaxdec.__file__).parent.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.level == 0:
        names = [node.module or ""]
      roots = {name.partition(".")[0] for name in names}
      assert not roots & {"torch", "tensorflow", "transformers"}, path
