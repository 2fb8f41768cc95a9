# SPDX-License-Identifier: Apache-2.0
"""Six kinds of tasks made from Python sources, and Spec-Bench's own questions.

Spec-Bench (arXiv 2401.07851) asks conversation, translation, summarisation, question answering,
mathematics and retrieval of an instructed model. The embedded model only knows Python, so its six
kinds are what those do to the text: how much of the answer is new, copied, or reordered.

  completion   the rest of a function                            (all new)
  edit         a function again, with one name changed           (nearly all copied)
  extraction   the signatures of some functions, in order        (short copies)
  rewriting    a function in the normal form of ``ast.unparse``  (copied in pieces)
  retrieval    one of several functions again, asked by its name (copied from afar)
  multi_turn   an edit, then another edit of the answer          (two turns)

Every task has an answer, so that a model can be fine-tuned to do it.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import io
import json
import keyword
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxdec.data.documents import Document
from jaxdec.errors import UserError

KINDS = ("completion", "edit", "extraction", "rewriting", "retrieval", "multi_turn")
_NAMES = ("item", "value", "entry", "source", "target", "result", "other", "current")
_MT_BENCH = {
  "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Example:
  """One task. ``turns``: what is asked, in order; ``answers``: one text a turn, or none at all."""

  kind: str
  turns: tuple[str, ...]
  answers: tuple[str, ...] = ()

  @property
  def text(self) -> str:
    """The whole conversation: what a model is fine-tuned on."""
    return "".join(turn + answer for turn, answer in zip(self.turns, self.answers, strict=True))


def examples(documents: Iterable[Document], *, max_lines: int = 24) -> Iterator[Example]:
  """Tasks of every kind from every document that has functions; the order is that of the text.

  Which names are changed and which functions are asked for depends on a hash of the function alone.
  """
  for document in documents:
    functions = list(_functions(document.text, max_lines))
    for source in functions:
      yield from _of_one(source)
    for i in range(0, len(functions) - 2, 3):
      yield from _of_three(functions[i : i + 3])


def choose(documents: Iterable[Document], count: int) -> list[Example]:
  """``count`` tasks of each kind, spread over the documents by a hash.

  Raises:
    UserError: the documents don't have so many of a kind.
  """
  by_kind: dict[str, list[Example]] = {kind: [] for kind in KINDS}
  for example in examples(documents):
    by_kind[example.kind].append(example)
  out = []
  for kind, found in by_kind.items():
    if len(found) < count:
      raise UserError(
        f"these documents give {len(found)} tasks of kind {kind}, not {count}; ask for fewer or "
        "give more text"
      )
    out += sorted(found, key=lambda e: _hash(e.turns[0]))[:count]
  return out


def read_questions(path: str | Path) -> list[Example]:
  """Spec-Bench's ``question.jsonl``: one object a line with ``category`` and ``turns``.

  MT-bench's eight categories become one kind, ``mt_bench``, as in Spec-Bench's own table.

  Raises:
    UserError: no such file, or a line that isn't such an object (its number is named).
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"no file {str(path)!r}; give Spec-Bench's question.jsonl, or leave it out")
  out = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      turns, category = row["turns"], row["category"]
      if not (isinstance(turns, list) and turns and all(isinstance(t, str) for t in turns)):
        raise ValueError("turns must be a list of texts")
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'line {number} of {path}: expected {{"category": "...", "turns": ["...", ...]}}, '
        f"got {line[:60]!r} ({error})"
      ) from error
    out.append(Example("mt_bench" if category in _MT_BENCH else str(category), tuple(turns)))
  return out


def _hash(text: str) -> int:
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _functions(text: str, max_lines: int) -> Iterator[str]:
  """Sources of the functions and methods of 5 to ``max_lines`` lines, dedented."""
  try:
    tree = ast.parse(text)
  except (SyntaxError, ValueError):
    return
  lines = text.splitlines()
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef) and not node.decorator_list:
      size = node.end_lineno - node.lineno + 1
      if 5 <= size <= max_lines:
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
        if _parses(source):  # not where a string's lines start further left
          yield source


def _parses(source: str) -> bool:
  try:
    return isinstance(ast.parse(source).body[0], ast.FunctionDef)
  except (SyntaxError, ValueError):
    return False


def _of_one(source: str) -> Iterator[Example]:
  lines = source.splitlines(keepends=True)
  head = max(2, len(lines) // 3)
  yield Example("completion", ("".join(lines[:head]),), ("".join(lines[head:]),))
  normal = _normal_form(source)
  if normal is not None and normal != source:
    yield Example(
      "rewriting", (f"# A function:\n{source}\n# The same in normal form:\n",), (normal,)
    )
  names = _local_names(source)
  if names:
    old, new = names[0], _new_name(source, 0)
    first = rename(source, old, new)
    ask = f"# A function:\n{source}\n# With {old} renamed to {new}:\n"
    yield Example("edit", (ask,), (first,))
    if len(names) > 1:
      old, new = names[1], _new_name(source, 1)
      again = f"\n# With {old} renamed to {new} too:\n"
      yield Example("multi_turn", (ask, again), (first, rename(first, old, new)))


def _of_three(sources: list[str]) -> Iterator[Example]:
  shown = "# Some functions:\n" + "\n".join(sources)
  heads = [_signature(source) for source in sources]
  if all(heads):
    yield Example(
      "extraction", (f"{shown}\n# Their signatures:\n",), ("".join(f"{h}\n" for h in heads),)
    )
  names = [ast.parse(source).body[0].name for source in sources]
  wanted = _hash(shown) % 3
  if len(set(names)) == 3:
    yield Example("retrieval", (f"{shown}\n# {names[wanted]} again:\n",), (sources[wanted],))


def _signature(source: str) -> str | None:
  """The ``def`` line where it is one line."""
  first = source.splitlines()[0]
  return first if first.rstrip().endswith(":") else None


def _normal_form(source: str) -> str | None:
  """What ``ast.unparse`` makes of a function without its docstring; None if nothing is left."""
  tree = ast.parse(source)
  body = tree.body[0].body
  if isinstance(body[0], ast.Expr) and isinstance(getattr(body[0], "value", None), ast.Constant):
    del body[0]
  return ast.unparse(tree) + "\n" if body else None


def _local_names(source: str) -> list[str]:
  """Parameters and assigned names that occur at least three times, the most frequent first."""
  tree = ast.parse(source)
  bound = {a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in _all_arguments(n)}
  bound |= {
    n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
  }
  outside = {
    name for n in ast.walk(tree) if isinstance(n, (ast.Global, ast.Nonlocal)) for name in n.names
  }
  outside |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
  # A keyword argument of the same name would have to stay: such names are left alone.
  outside |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg}
  # Inside an f-string a name is no token before Python 3.12.
  outside |= {
    n.id for f in ast.walk(tree) if isinstance(f, ast.JoinedStr)
    for n in ast.walk(f) if isinstance(n, ast.Name)
  }  # fmt: skip
  count = {name: 0 for name in bound - outside - {"self", "cls"}}
  for token in _tokens(source):
    if token.type == tokenize.NAME and token.string in count:
      count[token.string] += 1
  found = [name for name, times in count.items() if times >= 3]
  return sorted(found, key=lambda name: (-count[name], name))


def _all_arguments(node: ast.arguments) -> list[ast.arg]:
  rest = [a for a in (node.vararg, node.kwarg) if a]
  return [*node.posonlyargs, *node.args, *node.kwonlyargs, *rest]


def _new_name(source: str, which: int) -> str:
  used = {token.string for token in _tokens(source) if token.type == tokenize.NAME}
  start = _hash(source) % len(_NAMES)
  free = [n for n in (*_NAMES[start:], *_NAMES[:start]) if n not in used]
  free += [f"name_{i}" for i in range(2)]
  return free[which]


def rename(source: str, old: str, new: str) -> str:
  """The source with every name ``old`` changed, attributes of that name apart.

  All other bytes stay.
  """
  if not new.isidentifier() or keyword.iskeyword(new):
    raise UserError(f"{new!r} is no name")
  lines = source.splitlines(keepends=True)
  places, before = [], None
  for token in _tokens(source):
    is_attribute = before is not None and before.string == "."
    if token.type == tokenize.NAME and token.string == old and not is_attribute:
      places.append(token.start)
    before = token
  for row, column in reversed(places):
    line = lines[row - 1]
    lines[row - 1] = line[:column] + new + line[column + len(old) :]
  return "".join(lines)


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
  return tokenize.generate_tokens(io.StringIO(source).readline)
