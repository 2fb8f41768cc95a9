# SPDX-License-Identifier: Apache-2.0
"""The folder that ``jaxdec regenerate`` leaves, as a corpus: what the target wrote is learned.

``regenerated.json`` says what was asked of whom; ``shard-00002-of-00008.jsonl`` holds one line a
prompt: its number, its documents as ``{"tokens": [...], "answers": [[begin, end], ...]}`` with the
answers as stretches of tokens, and the text for whoever reads along. The ids are those the target
drew: text would not always be tokenised into the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdec.data.chat import read_lines
from jaxdec.data.corpus import Corpus
from jaxdec.data.documents import DEFAULT_SHARES, SplitShares, check_split, split_of
from jaxdec.errors import UserError

HEAD = "regenerated.json"


def is_regenerated(path: str | Path) -> bool:
  """Whether a folder is one of ``jaxdec regenerate``."""
  return (Path(path) / HEAD).is_file()


def shard_name(shard: int, count: int) -> str:
  return f"shard-{shard:05d}-of-{count:05d}.jsonl"


def shard_rows(rows: int, shard: int, count: int) -> range:
  """The prompts of a shard: neighbours, as evenly many as can be."""
  return range(shard * rows // count, (shard + 1) * rows // count)


def tokenizer_hash(tokenizer: Any) -> str:
  """Tells tokenizers apart; ids of one mean nothing to another."""
  return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:16]


def read_head(folder: str | Path) -> dict[str, Any]:
  """What ``regenerated.json`` says."""
  path = Path(folder) / HEAD
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}); regenerate into a new folder") from error


def read_records(folder: str | Path) -> Iterator[dict[str, Any]]:
  """The lines of all shards.

  Raises:
    UserError: a shard is missing, damaged, or not finished.
  """
  head = read_head(folder)
  count = head["shards"]
  for shard in range(count):
    path, wanted = Path(folder) / shard_name(shard, count), shard_rows(head["rows"], shard, count)
    found = 0
    if wanted and not path.is_file():
      raise UserError(f"{path} is missing; the command that began this folder makes it")
    for number, record in read_lines(path) if wanted else ():
      if not isinstance(record.get("documents"), list) or record.get("index") not in wanted:
        raise UserError(f"{path}, line {number}: no record of this shard; remove the file")
      found += 1
      yield record
    if found != len(wanted):
      raise UserError(
        f"{path} holds {found} of {len(wanted)} prompts; the command that began it goes on with it"
      )


def regenerated_corpus(
  folder: str | Path, tokenizer: Any, split: str = "all", *, shares: SplitShares = DEFAULT_SHARES
) -> Corpus:
  """The documents of a split (by the prompt's number); only the target's tokens are labels.

  Raises:
    UserError: see ``read_records``; also where another tokenizer made the ids.
  """
  check_split(split)
  if read_head(folder)["tokenizer"] != tokenizer_hash(tokenizer):
    raise UserError(
      f"the tokens in {str(folder)!r} come from another tokenizer than this model's; regenerate "
      "with this model"
    )
  ids, labels = [], []
  for record in read_records(folder):
    if split != "all" and split_of(f"{HEAD}#{record['index']}", shares) != split:
      continue
    for document in record["documents"]:
      mask = np.zeros(len(document["tokens"]), np.bool_)
      for begin, end in document["answers"]:
        mask[begin:end] = True
      ids.append(document["tokens"])
      labels.append(mask)
  return Corpus.from_token_lists(ids, labels=labels)
