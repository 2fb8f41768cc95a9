# SPDX-License-Identifier: Apache-2.0
"""Conversations as token ids, with a mask of what the assistant says.

A line of a JSONL file is ``{"messages": [{"role": ..., "content": ...}, ...]}``, with ``tools``
beside them or without. The model folder's own chat template renders it, in a sandbox and with the
whitespace rules that templates are written for. Which tokens are the assistant's is found out in
one of two ways:

* a template with ``{% generation %}`` blocks says so itself;
* else by asking twice: with P the rendering of the messages before an answer, its generation prompt
  included, and F that of the messages up to the answer, the answer is what F adds to P, up to the
  first end-of-sequence token (the model writes it, and nothing after it).

A template may write an earlier turn anew once later ones follow (reasoning is dropped, say). The
text is then no continuation of what the model had read, so a document ends there and a new one
begins: each answer is learned after exactly the prompt that the template gives for it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdec.data.corpus import Corpus
from jaxdec.data.documents import DEFAULT_SHARES, SplitShares, check_split, split_of
from jaxdec.errors import UserError

# Noncharacters, which no text may hold, stand around the blocks a template marks.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Span:
  """A text and the parts of it, as ``[begin, end)``, that the assistant says."""

  text: str
  answers: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
  """One line of a file. ``where`` names it in error messages, ``name`` decides its split."""

  messages: Messages
  tools: list[Any] | None = None
  where: str = "the conversation"
  name: str = ""


class ChatTemplate:
  """A chat template, and the texts of the special tokens it may name."""

  def __init__(self, source: str, special: Mapping[str, str] | None = None, where: str = ""):
    self.source, self.special, self.where = source, dict(special or {}), where
    self._template = _compile(source, where)

  @classmethod
  def of(cls, tokenizer: Any) -> ChatTemplate:
    """The template of a model folder: ``chat_template.jinja``, else in ``tokenizer_config.json``.

    Raises:
      UserError: there is none, or it is no valid template.
    """
    extras = getattr(tokenizer, "extras", {})
    config = json.loads(extras.get("tokenizer_config.json", "{}"))
    source = extras.get("chat_template.jinja", config.get("chat_template"))
    if isinstance(source, list):  # several by name
      source = {t.get("name"): t.get("template") for t in source}.get("default")
    if not isinstance(source, str):
      raise UserError(
        "the model folder has no chat template (chat_template.jinja, or chat_template in "
        "tokenizer_config.json); add its model's, or give prompts instead of messages"
      )
    tokens = {k: v for k, v in config.items() if k.endswith("_token")}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items()}
    return cls(source, {k: v for k, v in texts.items() if isinstance(v, str)}, "chat template")

  def render(self, conversation: Conversation, count: int | None = None, ask: bool = False) -> str:
    """The text of the first ``count`` messages; ``ask`` ends it where the assistant begins."""
    return self._render(conversation, count, ask).replace(_OPEN, "").replace(_CLOSE, "")

  def _render(self, conversation: Conversation, count: int | None = None, ask: bool = False) -> str:
    import jinja2

    try:
      return self._template.render(
        **self.special,
        messages=list(conversation.messages)[:count],
        tools=conversation.tools,
        documents=None,
        add_generation_prompt=ask,
      )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise UserError(
        f"{conversation.where}: the chat template refuses these messages: {error}"
      ) from error

  def spans(self, conversation: Conversation, ends: Sequence[str] = ()) -> list[Span]:
    """The conversation as documents; see the head of this file.

    Args:
      ends: texts of the end-of-sequence tokens.

    Raises:
      UserError: no answer, an empty one, or one that the template doesn't show.
    """
    check_answers(conversation)
    if "generation" in _tags(self.source):
      return [_marked(self._render(conversation), conversation)]
    found: list[Span] = []
    text, answers = "", []
    for i, message in enumerate(conversation.messages):
      if message["role"] != "assistant":
        continue
      prompt, after = self._turn(conversation, i)
      if not prompt.startswith(text) and answers:
        found.append(Span(text, tuple(answers)))
        answers = []
      end = _answer_end(after, len(prompt), ends)
      answers.append((len(prompt), end))
      text = after[:end]
    return [*found, Span(text, tuple(answers))]

  def _turn(self, conversation: Conversation, i: int) -> tuple[str, str]:
    """What the model reads before message i, and the same with its answer."""
    after = self.render(conversation, i + 1)
    before, prompt = self.render(conversation, i), self.render(conversation, i, ask=True)
    if prompt != before and after.startswith(prompt):
      return prompt, after
    # A template without generation prompts, or with another one: the answer is its content, with
    # the blank in front of it that the model writes too where nothing else stands there.
    content = str(conversation.messages[i].get("content") or "").strip()
    at = after.find(content, len(before)) if after.startswith(before) and content else -1
    if at < 0:
      raise UserError(
        f"{conversation.where}: the chat template does not show message {i + 1} as it stands, so "
        "its tokens can't be told apart; mark them with {% generation %} in the template"
      )
    at = at if after[len(before) : at].strip() else len(before)
    return after[:at], after


def check_answers(conversation: Conversation) -> None:
  """Raises UserError for messages that are none, and for an assistant that says nothing."""
  answers = [m for m in conversation.messages if m["role"] == "assistant"]
  if not answers:
    raise UserError(f"{conversation.where}: no message has the role 'assistant'; nothing to learn")
  for message in answers:
    if not str(message.get("content") or "").strip() and not message.get("tool_calls"):
      raise UserError(
        f"{conversation.where}: an assistant message is empty; remove the line or give its answer"
      )


def _answer_end(text: str, begin: int, ends: Sequence[str]) -> int:
  """Behind the first end-of-sequence token after ``begin``; without one, before trailing space."""
  at = [(where, where + len(end)) for end in ends if (where := text.find(end, begin)) >= 0]
  return min(at)[1] if at else max(begin, len(text.rstrip()))


def _marked(text: str, conversation: Conversation) -> Span:
  """The span of a rendering whose ``{% generation %}`` blocks are marked."""
  out, answers, begin, length = [], [], None, 0
  for piece in _pieces(text):
    if piece == _OPEN:
      begin = length
    elif piece == _CLOSE:
      answers.append((begin, length))
    else:
      out.append(piece)
      length += len(piece)
  if not answers:
    raise UserError(f"{conversation.where}: the chat template marks nothing as generated")
  return Span("".join(out), tuple(answers))


def _pieces(text: str) -> Iterator[str]:
  """Stretches of text and the marks between them."""
  start = 0
  for i, character in enumerate(text):
    if character in (_OPEN, _CLOSE):
      yield text[start:i]
      yield character
      start = i + 1
  yield text[start:]


@functools.cache
def _environment():
  import jinja2
  from jinja2 import nodes
  from jinja2.ext import Extension
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  class Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
      mark = [nodes.Output([nodes.TemplateData(m)]) for m in (_OPEN, _CLOSE)]
      return [mark[0].set_lineno(line), *body, mark[1].set_lineno(line)]

  # No `strftime_now`: today's date would make the same file another data set every day.
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
  )

  def refuse(message):
    raise jinja2.TemplateError(message)

  def tojson(value, indent=None, ensure_ascii=False, **options):
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)

  environment.globals["raise_exception"] = refuse
  environment.filters["tojson"] = tojson  # Jinja's own escapes for HTML
  return environment


def _compile(source: str, where: str):
  import jinja2

  try:
    return _environment().from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise UserError(
      f"{where or 'chat template'}, line {error.lineno}: not a valid template ({error.message})"
    ) from error


@functools.lru_cache(maxsize=8)
def _tags(source: str) -> frozenset[str]:
  """Block names that a template uses."""
  lexed = list(_environment().lex(source))
  return frozenset(
    next((v for _, k, v in lexed[i + 1 :] if k == "name"), "")
    for i, (_, kind, _) in enumerate(lexed)
    if kind == "block_begin"
  )


def encode(tokenizer: Any, span: Span) -> tuple[list[int], np.ndarray]:
  """Token ids and their label mask. A token is the assistant's if it begins in an answer.

  The template writes special tokens itself, so none is added.
  """
  encoding = tokenizer.backend.encode(span.text, add_special_tokens=False)
  begins = np.asarray([begin for begin, _ in encoding.offsets], np.int64)
  ends = np.asarray([end for _, end in encoding.offsets], np.int64)
  mask = np.zeros(len(begins), np.bool_)
  for begin, end in span.answers:
    mask |= (begins >= begin) & (begins < end) & (ends > begins)
  return list(encoding.ids), mask


def end_texts(tokenizer: Any) -> tuple[str, ...]:
  """The texts of the model's end-of-sequence tokens."""
  texts = (tokenizer.backend.id_to_token(int(i)) for i in tokenizer.eos_ids)
  return tuple(text for text in texts if text)


def read_conversations(path: str | Path) -> Iterator[Conversation]:
  """The conversations of a JSONL file, in its order.

  Raises:
    UserError: no such file; a line (named) that is no JSON object with messages.
  """
  for number, record in read_lines(path):
    where = f"{path}, line {number}"
    yield parse_conversation(record, where, f"{Path(path).name}#{number}")


def parse_conversation(record: Mapping[str, Any], where: str, name: str) -> Conversation:
  """A record with ``messages``, checked."""
  messages = record.get("messages")
  if not isinstance(messages, list) or not messages:
    raise UserError(f"{where}: 'messages' must be a list with one message at least")
  for i, message in enumerate(messages, 1):
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
      raise UserError(f"{where}: message {i} must be an object with 'role' and 'content'")
    content = message.get("content")
    if not isinstance(content, str | list | None):
      raise UserError(
        f"{where}: the content of message {i} must be text, got {type(content).__name__}"
      )
    if isinstance(content, str) and (_OPEN in content or _CLOSE in content):
      raise UserError(f"{where}: message {i} holds U+FDD0 or U+FDD1, which are no characters")
  return Conversation(messages, record.get("tools"), where, name)


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Line number (from 1) and JSON object of every line that is not blank.

  Raises:
    UserError: no such file, not UTF-8, or a line that is no JSON object.
  """
  if not Path(path).is_file():
    raise UserError(f"file {str(path)!r} does not exist; give a JSONL file")
  try:
    with open(path, encoding="utf-8") as stream:
      for number, line in enumerate(stream, 1):
        if not line.strip():
          continue
        try:
          record = json.loads(line)
        except json.JSONDecodeError as error:
          raise UserError(
            f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); each "
            "line must be one JSON object"
          ) from error
        if not isinstance(record, dict):
          raise UserError(
            f"{path}, line {number}: expected a JSON object, got {type(record).__name__}"
          )
        yield number, record
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text ({error}); convert it") from error


def conversation_files(path: str | Path) -> list[Path]:
  """The JSONL files that ``path`` is or holds, if the first line of the first has ``messages``."""
  path = Path(path).expanduser()
  files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
  files = [f for f in files if f.suffix == ".jsonl" and f.is_file() and f.name[0] != "."]
  first = next(read_lines(files[0]), None) if files else None
  return files if first is not None and "messages" in first[1] else []


def chat_corpus(
  conversations: Iterable[Conversation],
  tokenizer: Any,
  split: str = "all",
  *,
  template: ChatTemplate | None = None,
  shares: SplitShares = DEFAULT_SHARES,
) -> Corpus:
  """Conversations of a split as a corpus whose ``labels`` are the assistant's tokens.

  Args:
    conversations: ``read_conversations(path)``. The split goes by their names, as for documents.
    tokenizer: a ``jaxdec.io.Tokenizer``. template: instead of its own.

  Raises:
    UserError: see ``ChatTemplate``, and ``read_conversations``.
  """
  check_split(split)
  template = template or ChatTemplate.of(tokenizer)
  ends = end_texts(tokenizer)
  wanted = (c for c in conversations if split == "all" or split_of(c.name, shares) == split)
  pairs = [encode(tokenizer, span) for c in wanted for span in template.spans(c, ends)]
  return Corpus.from_token_lists([ids for ids, _ in pairs], labels=[mask for _, mask in pairs])
