# SPDX-License-Identifier: Apache-2.0
"""Prompts cut from held-out files, the same ones on every call."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from typing import Any

from jaxdec.data.corpus import encode_texts
from jaxdec.data.documents import Document
from jaxdec.errors import UserError

_FUNCTION = re.compile(r"^[ \t]*(?:async[ \t]+def|def|class)\b", re.MULTILINE)
_LINE = re.compile(r"^(?=[ \t]*\S)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """The first tokens of a piece of a file, and where that piece begins (lines from 1)."""

  tokens: tuple[int, ...]
  path: str
  line: int


def _hash(*parts: object) -> int:
  return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def cut_prompts(
  documents: Iterable[Document],
  tokenizer: Any,
  count: int,
  *,
  min_tokens: int = 64,
  max_tokens: int = 128,
  seed: int = 0,
) -> list[Prompt]:
  """`count` prompts of `min_tokens` to `max_tokens` tokens, spread over the documents.

  A prompt begins where a function or class does; at any line that is not blank in files without.
  One is taken from each document before a second is from any. Which, and how long, depends on a
  hash of (seed, path, line) alone.

  Raises:
    UserError: if the documents are too few or too short for so many.
  """
  if not 1 <= min_tokens <= max_tokens:
    raise UserError(
      f"prompt lengths must satisfy 1 <= min_tokens <= max_tokens, got {min_tokens}, {max_tokens}"
    )
  candidates = []
  for document in documents:
    starts = [m.start() for m in _FUNCTION.finditer(document.text)]
    starts = starts or [m.start() for m in _LINE.finditer(document.text)]
    starts.sort(key=lambda s: _hash(seed, document.path, s))
    turns = enumerate(starts)
    candidates += [(turn, _hash(seed, document.path), document, start) for turn, start in turns]
  candidates.sort(key=lambda c: (c[0], c[1], c[3]))

  prompts: list[Prompt] = []
  for _, _, document, start in candidates:
    if len(prompts) == count:
      break
    length = min_tokens + _hash(seed, document.path, start, "length") % (
      max_tokens - min_tokens + 1
    )
    # Four times the usual length of a token, so that the window's end is not among those taken.
    window = document.text[start : start + 16 * max_tokens]
    tokens = encode_texts(tokenizer, [window])[0][:length]
    if len(tokens) == length:
      prompts.append(Prompt(tuple(tokens), document.path, document.text.count("\n", 0, start) + 1))
  if len(prompts) < count:
    raise UserError(
      f"only {len(prompts)} of {count} prompts of {min_tokens} to {max_tokens} tokens could be "
      "cut; give more or longer documents, or ask for fewer or shorter prompts"
    )
  return prompts
