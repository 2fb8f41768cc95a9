# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from jaxdec.data import Document, cut_prompts, open_source, python_stdlib
from jaxdec.data.documents import SPLITS
from jaxdec.errors import UserError


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "texts"
  (root / "b" / ".hidden").mkdir(parents=True)
  (root / "a.txt").write_text("alpha é\n", encoding="utf-8")
  (root / "b" / "c.md").write_text("# gamma\n")
  (root / "b" / "image.png").write_bytes(b"\x89PNG")
  (root / "b" / ".hidden" / "d.txt").write_text("hidden")
  lines = [json.dumps({"text": f"row {i}", "other": "o"}) for i in range(40)]
  (root / "rows.jsonl").write_text("\n".join(lines[:20]) + "\n\n" + "\n".join(lines[20:]))
  return root


def test_a_folder_of_text(folder):
  everything = list(open_source(folder, "all"))
  assert [d.path for d in everything[:2]] == ["a.txt", "b/c.md"]
  assert everything[0].text == "alpha é\n"
  assert everything[2] == Document("rows.jsonl#1", "row 0")
  assert everything[-1] == Document("rows.jsonl#41", "row 39")  # the blank line counts
  assert len(everything) == 42
  parts = [d for s in SPLITS for d in open_source(folder, s)]
  assert sorted(parts, key=lambda d: d.path) == sorted(everything, key=lambda d: d.path)
  assert {d.text for d in open_source(folder / "rows.jsonl", "all", field="other")} == {"o"}


def test_the_standard_library_by_name():
  assert next(open_source("python_stdlib", "test")) == next(python_stdlib.sources("test"))


@pytest.mark.parametrize(
  ("line", "match"),
  [
    ("{'text': 1}", r"bad\.jsonl, line 2: not valid JSON"),
    ("[1]", r"bad\.jsonl, line 2: expected a JSON object, got list"),
    ('{"txt": "x"}', r"bad\.jsonl, line 2: no field 'text' \(did you mean 'txt'\?\)"),
    ("{}", r"bad\.jsonl, line 2: no field 'text'; the line has no fields"),
    ('{"text": 3}', r"bad\.jsonl, line 2: field 'text' must be a string, got int"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, match):
  (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
  with pytest.raises(UserError, match=match):
    list(open_source(tmp_path, "all"))


def test_errors_of_folders(tmp_path):
  with pytest.raises(UserError, match="no such file or folder"):
    open_source(tmp_path / "missing")
  with pytest.raises(UserError, match="holds no file that ends in"):
    open_source(tmp_path)
  (tmp_path / "data.bin").write_bytes(b"x")
  with pytest.raises(UserError, match="is not a text file by its name"):
    open_source(tmp_path / "data.bin")
  (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
  with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
    list(open_source(tmp_path, "all"))
  with pytest.raises(
    UserError, match=r"no data source 'python_stdlb'.*did you mean 'python_stdlib'"
  ):
    open_source("python_stdlb")
  with pytest.raises(UserError, match="unknown split 'dev'"):
    open_source("python_stdlib", "dev")


def test_prompts_are_the_same_on_every_call_and_begin_where_functions_do(
  tokenizer, stdlib_documents
):
  documents = stdlib_documents
  prompts = cut_prompts(documents, tokenizer, 12, min_tokens=20, max_tokens=40)
  assert prompts == cut_prompts(iter(documents), tokenizer, 12, min_tokens=20, max_tokens=40)
  assert prompts != cut_prompts(documents, tokenizer, 12, min_tokens=20, max_tokens=40, seed=1)
  assert prompts[:5] == cut_prompts(documents, tokenizer, 5, min_tokens=20, max_tokens=40)
  texts = {d.path: d.text for d in documents}
  assert len({p.path for p in prompts}) == 12  # one from each of twelve files
  for prompt in prompts:
    assert 20 <= len(prompt.tokens) <= 40
    rest = "\n".join(texts[prompt.path].split("\n")[prompt.line - 1 :])
    assert rest.encode().startswith(
      tokenizer.decode(list(prompt.tokens)).encode().rstrip(b"\xef\xbf\xbd")
    )
  starts = [tokenizer.decode(list(p.tokens)).split()[0] for p in prompts]
  assert sum(s in ("def", "class", "async") for s in starts) >= 8


def test_prompt_errors(tokenizer):
  few = [Document("a.py", "x = 1\n" * 50)]
  with pytest.raises(UserError, match=r"only .* of 100 prompts"):
    cut_prompts(few, tokenizer, 100, min_tokens=20, max_tokens=20)
  with pytest.raises(UserError, match="min_tokens <= max_tokens, got 9, 8"):
    cut_prompts(few, tokenizer, 1, min_tokens=9, max_tokens=8)


def test_a_missing_extra_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  monkeypatch.delitem(sys.modules, "jaxdec.data.tfds_builders", raising=False)
  with pytest.raises(UserError, match=r"pip install 'jaxdec\[data\]'"):
    open_source("tfds:python_stdlib")


TFDS = """
import itertools, json, sys
from pathlib import Path
from jaxdec.data import open_source, python_stdlib
from jaxdec.data.tfds_builders import PythonStdlib, TextFolder, prepare, read
from jaxdec.errors import UserError

work, texts = Path(sys.argv[1]), sys.argv[2]
small = work / "small"
for d in itertools.islice(python_stdlib.sources("all"), 120):
  (small / d.path).parent.mkdir(parents=True, exist_ok=True)
  (small / d.path).write_text(d.text, encoding="utf-8")
builder = prepare(PythonStdlib(root=small, data_dir=work / "tfds"))
for split in builder.info.splits:
  rows = builder.as_data_source(split=split)
  got = [(rows[i]["path"].decode(), rows[i]["text"].decode()) for i in range(len(rows))]
  assert got == [(d.path, d.text) for d in python_stdlib.sources(split, root=small)], split
assert builder.info.file_format.value == "array_record"
again = PythonStdlib(root=small, data_dir=work / "tfds")
assert again.data_path == builder.data_path
(small / "abc.py").write_text("x = f(1)")
assert PythonStdlib(root=small, data_dir=work / "tfds").data_path != builder.data_path  # not stale

folder = prepare(TextFolder(path=texts, data_dir=work / "tfds"))
name = "text_folder/" + folder.builder_config.name
assert list(read(name, "all")) == [d for s in folder.info.splits for d in open_source(texts, s)]
assert list(open_source("tfds:" + name, "train")) == list(open_source(texts, "train"))
errors = []
for call in (
  lambda: open_source("tfds:nothing"),
  lambda: open_source("tfds:" + name, "train", field="txt"),
  lambda: TextFolder(path=work / "missing"),
):
  try:
    call()
  except UserError as error:
    errors.append(str(error))
print(json.dumps({"errors": errors, "tensorflow": "tensorflow" in sys.modules}))
"""


def test_tfds_writes_and_reads_without_tensorflow(tmp_path, folder):
  pytest.importorskip("tensorflow_datasets", reason="needs the data extra")
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAXDEC_CACHE": str(tmp_path / "cache"),
    "TFDS_DATA_DIR": str(tmp_path / "tfds"),
  }
  done = subprocess.run(
    [sys.executable, "-c", TFDS, str(tmp_path), str(folder)],
    capture_output=True, text=True, env=environment, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  said = json.loads(done.stdout)  # and nothing else on standard output
  assert not said["tensorflow"]
  missing, field, path = said["errors"]
  assert "tfds:nothing is not prepared under" in missing and "file_format=array_record" in missing
  assert "no field 'txt'" in field and "did you mean 'text'" in field
  assert "no such file or folder" in path
