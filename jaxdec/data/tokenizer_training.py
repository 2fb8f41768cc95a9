# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer for code, trained and saved so that transformers can load it.

Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) loses nothing: all 256
bytes are entries, so any text comes back exactly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from jaxdec.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# Merges never cross these pieces. In order: line ends with the indentation that follows, so that a
# new line at a known depth is one token; a word with the one character before it (" if", ".join",
# "_name", "(self"); at most three digits; operators; what is left of white space.
SPLIT_PATTERN = "|".join(
  (
    r"(?:[ \t]*\r?\n)+[ \t]*",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+",
    r"\s+(?=\s\S)|\s+",
  )
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096):
  """A `tokenizers.Tokenizer` of exactly `vocab_size` entries; entry 0 is `<|endoftext|>`.

  The result depends on the texts and their order alone.

  Raises:
    UserError: if `vocab_size` cannot hold the 256 bytes, or the texts are too few to fill it.
  """
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

  if vocab_size < 257:
    raise UserError(f"vocab_size must be at least 257 (256 bytes and one end), got {vocab_size}")
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  if tokenizer.get_vocab_size() != vocab_size:
    raise UserError(
      f"the texts are too few for vocab_size={vocab_size}: only {tokenizer.get_vocab_size()} "
      "entries were found; give more text or a smaller vocabulary"
    )
  return tokenizer


def save_tokenizer(tokenizer, folder: str | os.PathLike, *, model_max_length: int = 2048) -> Path:
  """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers' AutoTokenizer reads them.

  Both are replaced whole, never left half written.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "unk_token": None,
    "add_prefix_space": False,
    # Tidying of spaces around punctuation would break the exact round trip.
    "clean_up_tokenization_spaces": False,
    "model_max_length": model_max_length,
  }
  files = {
    "tokenizer.json": tokenizer.to_str(pretty=True),
    "tokenizer_config.json": json.dumps(config, indent=2),
  }
  for name, content in files.items():
    partial = folder / f".{name}.partial"
    partial.write_text(content + "\n", encoding="utf-8")
    os.replace(partial, folder / name)
  return folder


def train_python_tokenizer(folder: str | os.PathLike, *, vocab_size: int = 4096):
  """Trains on the train split of `python_stdlib`, saves into `folder`, returns the tokenizer."""
  from jaxdec.data import python_stdlib

  texts = (document.text for document in python_stdlib.sources("train"))
  tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
  save_tokenizer(tokenizer, folder)
  return tokenizer
