# SPDX-License-Identifier: Apache-2.0
"""Tasks made from Python sources: their answers are right, whatever the source."""

from __future__ import annotations

import ast
import collections
import json

import pytest

from experiments.spec_bench import tasks
from experiments.spec_bench.bandwidth import bytes_of_a_step
from jaxdec.data.documents import Document
from jaxdec.errors import UserError

SOURCE = '''
class Shelf:
    def add(self, book, at=None):
        """Puts a book somewhere."""
        if at is None:  # at the end
            at = len(self.books)
        book.shelf = self
        self.books.insert(at, book)
        return book

    def total(self, key):
        total = 0
        for book in self.books:
            total += book.price if key(book) else 0
        return total

def show(shelf, out, width=3):
    for book in shelf.books:
        line = f"{book}"
        out.write(line)
        out.write(" " * width)
    return out
'''


def documents(count=4):
  """Files that differ, so that tasks do too."""
  return [Document(f"{i}.py", SOURCE.replace("book", f"book{i}")) for i in range(count)]


def test_every_kind_is_there_with_an_answer_to_every_turn():
  found = collections.Counter(e.kind for e in tasks.examples(documents()))
  assert set(found) == set(tasks.KINDS)
  for example in tasks.examples(documents()):
    assert len(example.turns) == len(example.answers) and all(example.answers)


def test_a_renamed_function_is_the_same_up_to_the_name():
  for example in tasks.examples(documents(1)):
    if example.kind != "edit":
      continue
    old, new = example.turns[0].rsplit("# With ", 1)[1].removesuffix(":\n").split(" renamed to ")
    before = example.turns[0].removeprefix("# A function:\n").rsplit("\n# With", 1)[0]
    after = example.answers[0]
    assert before != after and old not in {t.string for t in tasks._tokens(after)}
    renamed = ast.parse(before)
    for node in ast.walk(renamed):
      for field in ("id", "arg"):
        if getattr(node, field, None) == old:
          setattr(node, field, new)
    assert ast.dump(renamed) == ast.dump(ast.parse(after))


def test_renaming_leaves_attributes_keywords_and_strings():
  source = "def f(a):\n  b.a = g(a) + 'a'\n  return a\n"
  assert tasks.rename(source, "a", "x") == "def f(x):\n  b.a = g(x) + 'a'\n  return x\n"
  called = "def f(a):\n  g(a=1)\n  a = a + 1\n  return a\n"
  assert "a" not in tasks._local_names(called)  # the keyword belongs to g
  formatted = "def f(a):\n  a = a + 1\n  return f'{a}'\n"
  assert "a" not in tasks._local_names(formatted)


def test_other_answers():
  by_kind = {e.kind: e for e in tasks.examples(documents(1))}
  rewriting = by_kind["rewriting"]
  source = rewriting.turns[0].removeprefix("# A function:\n").rsplit("\n# The same", 1)[0]
  assert tasks._normal_form(source) == rewriting.answers[0]
  assert ast.unparse(ast.parse(rewriting.answers[0])) + "\n" == rewriting.answers[0]
  retrieval = by_kind["retrieval"]
  assert retrieval.answers[0] in retrieval.turns[0]
  assert retrieval.turns[0].rsplit("# ", 1)[1].split()[0] in retrieval.answers[0].splitlines()[0]
  heads = by_kind["extraction"].answers[0].splitlines()
  assert len(heads) == 3 and all(head in by_kind["extraction"].turns[0] for head in heads)
  first, again = by_kind["multi_turn"].answers
  assert first != again and first.count("\n") == again.count("\n")


def test_choice_depends_on_the_text_alone():
  chosen = tasks.choose(documents(), 2)
  assert chosen == tasks.choose(reversed(documents()), 2)
  assert collections.Counter(e.kind for e in chosen) == dict.fromkeys(tasks.KINDS, 2)
  with pytest.raises(UserError, match="of kind completion, not 100"):
    tasks.choose(documents(), 100)


def test_files_that_are_no_python_are_passed_over():
  assert not list(tasks.examples([Document("x", "def f(:\n"), Document("y", "")]))


def test_spec_bench_questions(tmp_path):
  path = tmp_path / "question.jsonl"
  rows = [
    {"question_id": 81, "category": "writing", "turns": ["Hello", "Again"]},
    {"question_id": 1, "category": "translation", "turns": ["Guten Tag"], "reference": ["x"]},
  ]
  path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
  first, second = tasks.read_questions(path)
  assert (first.kind, first.turns) == ("mt_bench", ("Hello", "Again"))
  assert (second.kind, second.answers) == ("translation", ())
  path.write_text(json.dumps({"category": "qa", "turns": "one"}), encoding="utf-8")
  with pytest.raises(UserError, match=r"line 1 of .*turns must be a list"):
    tasks.read_questions(path)
  with pytest.raises(UserError, match="no file"):
    tasks.read_questions(tmp_path / "nowhere.jsonl")


def test_bytes_of_a_step():
  """All weights once where the head is the embedding table; keys and values by the token."""
  import jax

  import jaxdec

  lm = jaxdec.tiny()
  weights = sum(x.nbytes for x in jax.tree.leaves(lm.params))
  mixer = lm.config.layers[0].mixer
  a_token = 2 * 4 * mixer.num_kv_heads * mixer.head_dim * lm.config.num_layers
  extra = bytes_of_a_step(lm, 100) - bytes_of_a_step(lm, 0)
  assert bytes_of_a_step(lm, 0) == weights
  assert extra == pytest.approx(100 * a_token, rel=0.02)
