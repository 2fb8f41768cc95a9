# SPDX-License-Identifier: Apache-2.0
"""The first notebook: its two forms agree, and it runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(scope="module")
def notebook():
  nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
  return nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)


def test_the_script_and_the_notebook_are_the_same(notebook):
  jupytext = pytest.importorskip("jupytext", reason="needs the dev extra")
  script = jupytext.read(FOLDER / "quickstart.py")
  assert [(c.cell_type, c.source) for c in script.cells] == [
    (c.cell_type, c.source) for c in notebook.cells
  ], "run: jupytext --sync notebooks/quickstart.py"


def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
  nbclient = pytest.importorskip("nbclient", reason="needs the dev extra")
  pytest.importorskip("ipykernel", reason="needs the dev extra")
  monkeypatch.setenv("JAXDEC_FAST", "1")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("JAXDEC_CACHE", str(tmp_path))
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": FOLDER}})
  client.execute()
  outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
  printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
  images = sum("image/png" in o.get("data", {}) for o in outputs)
  assert "tokens per pass, the same text" in printed
  assert images == 2
