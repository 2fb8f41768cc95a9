# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents: one flat array of ids and where each document begins.

Tokenising is done once and kept on disk, under a name that is the hash of every text, every setting
and the whole tokenizer: whatever changes, the name changes with it, so nothing stale is ever read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from jaxdec.data.documents import Document
from jaxdec.data.tokenizer_training import END_OF_TEXT
from jaxdec.errors import UserError

_FORMAT = "jaxdec-corpus-1"


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """Documents as ids; document i is `tokens[offsets[i]:offsets[i+1]]`, its end-of-text included.

  `labels` says which tokens may be learned (the answers of a conversation); None: all of them.
  """

  tokens: Integer[np.ndarray, "tokens"]
  offsets: Integer[np.ndarray, "boundaries"]
  num_bytes: int = 0  # of text, for bits per byte; 0 where it is not known
  labels: Bool[np.ndarray, "tokens"] | None = None

  def __post_init__(self):
    if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
      raise ValueError(
        f"offsets must run from 0 to the number of tokens {len(self.tokens)}, "
        f"got {self.offsets[0]} to {self.offsets[-1]}"
      )
    if self.labels is not None and self.labels.shape != self.tokens.shape:
      raise ValueError(
        f"labels must be one a token, got {self.labels.shape} for {self.tokens.shape}"
      )

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, index: int) -> Integer[np.ndarray, "tokens"]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    return self.tokens[self.offsets[index] : self.offsets[index + 1]]

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of the ids, boundaries and labels; part of every iterator's state."""
    digest = hashlib.sha256(np.ascontiguousarray(self.offsets, dtype=np.int64).tobytes())
    for start in range(0, len(self.tokens), 1 << 24):
      digest.update(np.asarray(self.tokens[start : start + (1 << 24)], dtype=np.int32).tobytes())
    if self.labels is not None:
      digest.update(np.packbits(self.labels).tobytes())
    return digest.hexdigest()[:16]

  @classmethod
  def from_token_lists(
    cls,
    documents: Iterable[Sequence[int] | np.ndarray],
    *,
    num_bytes: int = 0,
    labels: Iterable[Sequence[bool] | np.ndarray] | None = None,
  ) -> Corpus:
    """A corpus of documents that are ids already; nothing is appended to them.

    `labels` are one list a document, as long as it.
    """
    arrays = [np.asarray(ids, dtype=np.int32) for ids in documents]
    offsets = np.cumsum([0, *(len(a) for a in arrays)], dtype=np.int64)
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    if labels is not None:
      parts = [np.asarray(mask, np.bool_) for mask in labels]
      labels = np.concatenate(parts) if parts else np.zeros(0, np.bool_)
    return cls(tokens, offsets, num_bytes, labels)


def cache_folder() -> Path:
  """Where tokenised text is kept: `$JAXDEC_CACHE`, else `~/.cache/jaxdec`; safe to delete."""
  default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdec"
  return Path(os.environ.get("JAXDEC_CACHE") or default)


def _raw_tokenizer(tokenizer: Any) -> Any:
  """The `tokenizers.Tokenizer` inside a wrapper, or the object itself."""
  for name in ("backend_tokenizer", "backend", "tokenizer", "_tokenizer"):
    inner = getattr(tokenizer, name, None)
    if inner is not None and hasattr(inner, "encode_batch") and hasattr(inner, "to_str"):
      return inner
  return tokenizer


def end_of_text_id(tokenizer: Any) -> int:
  """The id that closes a document: the tokenizer's first end-of-sequence id.

  Raises:
    UserError: if the tokenizer declares none.
  """
  for name in ("eos_ids", "eos_token_id", "eos_id"):
    value = getattr(tokenizer, name, None)
    if isinstance(value, int):
      return value
    if value:
      return int(next(iter(value)))
  find = getattr(tokenizer, "token_to_id", None)
  found = find(END_OF_TEXT) if find else None
  if found is None:
    raise UserError(
      f"the tokenizer declares no end-of-text token such as {END_OF_TEXT!r}; pass eos_id=..."
    )
  return found


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
  """Ids without special tokens; a special token's name inside a text is encoded as plain text."""
  raw = _raw_tokenizer(tokenizer)
  if not (hasattr(raw, "encode_batch") and hasattr(raw, "encode_special_tokens")):
    return [list(tokenizer.encode(text)) for text in texts]
  before, raw.encode_special_tokens = raw.encode_special_tokens, True
  try:
    return [e.ids for e in raw.encode_batch(texts, add_special_tokens=False)]
  finally:
    raw.encode_special_tokens = before


def _batches(items: Iterable, size: int) -> Iterator[list]:
  iterator = iter(items)
  while batch := list(itertools.islice(iterator, size)):
    yield batch


def _tokenize(texts: list[str], tokenizer: Any, first: list[int], eos_id: int) -> Corpus:
  documents = (
    [*first, *ids, eos_id]
    for batch in _batches(texts, 256)
    for ids in encode_texts(tokenizer, batch)
  )
  return Corpus.from_token_lists(documents, num_bytes=sum(len(t.encode()) for t in texts))


def tokenize_documents(
  documents: Iterable[Document | str],
  tokenizer: Any,
  *,
  eos_id: int | None = None,
  cache: str | os.PathLike | bool = True,
) -> Corpus:
  """Encodes every document and appends the end-of-text id.

  Where the tokenizer has a beginning-of-sequence id (`bos_id`), that goes before each document, as
  before each prompt.

  Args:
    documents: texts, in the order they are to have.
    tokenizer: a `tokenizers.Tokenizer`, or anything that holds one or has `encode(text) -> ids`.
    eos_id: closes each document; the tokenizer's own if left out.
    cache: a folder, True for `cache_folder()`, or False. A tokenizer that cannot be written down as
      text is never cached, because a change in it could not be seen.
  """
  texts = [d if isinstance(d, str) else d.text for d in documents]
  eos_id = end_of_text_id(tokenizer) if eos_id is None else eos_id
  bos_id = getattr(tokenizer, "bos_id", None)
  first = [] if bos_id is None else [int(bos_id)]
  raw = _raw_tokenizer(tokenizer)
  if cache is False or not hasattr(raw, "to_str"):
    return _tokenize(texts, tokenizer, first, eos_id)

  digest = hashlib.sha256(json.dumps([_FORMAT, first, eos_id, raw.to_str()]).encode())
  for text in texts:
    encoded = text.encode()
    digest.update(len(encoded).to_bytes(8, "little") + encoded)
  root = cache_folder() if cache is True else Path(cache)
  folder = root / "corpus" / digest.hexdigest()[:32]
  if (corpus := _read(folder)) is not None:
    return corpus
  corpus = _tokenize(texts, tokenizer, first, eos_id)
  _write(folder, corpus)
  return _read(folder) or corpus


def _read(folder: Path) -> Corpus | None:
  """The corpus kept in `folder`, mapped into memory, or None where it is absent or damaged."""
  try:
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    corpus = Corpus(tokens, np.load(folder / "offsets.npy", allow_pickle=False), meta["num_bytes"])
  except (OSError, ValueError, KeyError, TypeError, EOFError):
    return None
  return corpus if corpus.fingerprint == meta.get("fingerprint") else None


def _write(folder: Path, corpus: Corpus) -> None:
  """Writes beside, then renames: a reader sees all of it or nothing. A full disk is no error."""
  narrow = len(corpus.tokens) == 0 or int(corpus.tokens.max()) < 2**16
  partial = None
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    np.save(partial / "tokens.npy", corpus.tokens.astype(np.uint16 if narrow else np.int32))
    np.save(partial / "offsets.npy", corpus.offsets)
    meta = {"num_bytes": corpus.num_bytes, "fingerprint": corpus.fingerprint}
    (partial / "meta.json").write_text(json.dumps(meta))
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    partial.rename(folder)
  except OSError:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)
