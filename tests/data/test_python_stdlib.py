# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib

import pytest

from jaxdec.data import python_stdlib
from jaxdec.data.documents import SPLITS, SplitShares, split_of
from jaxdec.errors import UserError


@pytest.fixture(scope="module")
def by_split():
  return {s: list(python_stdlib.sources(s)) for s in (*SPLITS, "all")}


def test_splits_partition_the_documents(by_split):
  paths = {s: [d.path for d in documents] for s, documents in by_split.items()}
  assert all(paths[s] for s in SPLITS)
  assert sorted(p for s in SPLITS for p in paths[s]) == paths["all"]
  assert len(set(paths["all"])) == len(paths["all"])


def test_no_text_is_in_two_places(by_split):
  digests = [hashlib.sha256(d.text.encode()).digest() for d in by_split["all"]]
  assert len(set(digests)) == len(digests)


def test_order_is_that_of_the_paths_and_the_same_again(by_split):
  paths = [d.path for d in by_split["test"]]
  assert paths == sorted(paths)
  assert by_split["test"] == list(python_stdlib.sources("test"))


def test_split_depends_on_the_path_alone():
  # Recorded: a change here moves documents that a shipped model was trained on into the test split.
  known = {"argparse.py": "train", "locale.py": "test", "unittest/mock.py": "test"}
  assert {p: split_of(p) for p in known} == known


def test_shares_are_met_on_many_names():
  names = [f"{i}.py" for i in range(20_000)]
  shares = SplitShares(validation=0.1, test=0.2)
  splits = [split_of(n, shares) for n in names]
  assert abs(splits.count("validation") / len(names) - 0.1) < 0.01
  assert abs(splits.count("test") / len(names) - 0.2) < 0.01


def test_tables_are_dropped_and_code_is_kept(by_split):
  paths = {d.path for d in by_split["all"]}
  assert not paths & {"encodings/cp1252.py", "html/entities.py", "pydoc_data/topics.py"}
  assert {"argparse.py", "encodings/idna.py", "mimetypes.py", "heapq.py"} <= paths
  table = "names = [\n" + "".join(f"  'name {i}', {i},\n" for i in range(50)) + "]\n"
  assert python_stdlib.is_table(table)
  assert not python_stdlib.is_table('def f():\n  """Says what."""\n  return [1, 2]\n')


def test_a_long_line_costs_no_time():
  assert not python_stdlib.is_table("x = 1\n" + "1 " * 200_000 + "= 1\n")


def test_rules_on_a_folder(tmp_path):
  (tmp_path / "pkg" / "site-packages").mkdir(parents=True)
  files = {
    "a.py": b"x = f(1)\r\n",
    "b.py": b"x = f(1)\r\n",  # the same bytes
    "latin.py": "# coding: latin-1\nname = f('\xe9')\n".encode("latin-1"),
    "bad.py": b"# coding: utf-8\nx = f('\xff')\n",
    "empty.py": b"\n",
    "notes.txt": b"x",
    "pkg/site-packages/c.py": b"y = f(2)\n",
  }
  for name, raw in files.items():
    (tmp_path / name).write_bytes(raw)
  found = {d.path: d.text for d in python_stdlib.sources("all", root=tmp_path)}
  assert found == {"a.py": "x = f(1)\n", "latin.py": "# coding: latin-1\nname = f('\xe9')\n"}


def test_errors(tmp_path):
  with pytest.raises(UserError, match=r"unknown split 'tset'.*did you mean 'test'"):
    python_stdlib.sources("tset")
  with pytest.raises(UserError, match="no Python source files under"):
    python_stdlib.sources("train", root=tmp_path / "nothing")
  with pytest.raises(UserError, match="leave room for train"):
    SplitShares(validation=0.5, test=0.5)
