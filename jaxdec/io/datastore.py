# SPDX-License-Identifier: Apache-2.0
"""Corpora for the ``datastore`` drafter on disk: built once, loaded as arrays.

A folder holds ``datastore.json`` (what it was built from, and the tokenizer's fingerprint: ids of
another tokenizer would draft nonsense without any error) and ``datastore.safetensors``, two int32
arrays of one entry a token: 8 bytes a token on disk and on the device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxdec.data.regenerated import tokenizer_hash
from jaxdec.drafting.datastore import CONTEXT, SEPARATOR, Datastore
from jaxdec.errors import UserError
from jaxdec.io import folders

CONFIG_FILE, ARRAYS_FILE = "datastore.json", "datastore.safetensors"


def build_datastore(documents: Iterable[np.ndarray]) -> dict[str, Int[np.ndarray, "_"]]:
  """``tokens`` and ``order``, the parameters of ``Datastore``, from documents of token ids.

  Every place with a token is sorted by the ``CONTEXT`` tokens before it, nearest first; equal
  contexts keep the corpus's order. Prefix doubling: ``log2(CONTEXT)`` sorts.

  Raises:
    UserError: no token at all, or more than int32 can count.
  """
  gap = np.full(1, SEPARATOR, np.int32)
  parts = [np.full(CONTEXT, SEPARATOR, np.int32)]  # no context reaches before the beginning
  for document in documents:
    parts += [np.asarray(document, np.int32), gap]
  tokens = np.concatenate(parts)
  places = np.flatnonzero(tokens != SEPARATOR)
  if not len(places):
    raise UserError("the corpus holds no token; give files with some text")
  if len(tokens) >= 2**31:
    raise UserError(f"a datastore holds fewer than 2^31 tokens, got {len(tokens):,}")
  # rank[p] orders places by their last `known` tokens.
  rank = np.concatenate([gap, tokens[:-1]]).astype(np.int64) - SEPARATOR
  known = 1
  while known < CONTEXT:
    earlier = np.concatenate([np.zeros(known, np.int64), rank[:-known]])
    rank = np.unique(rank * (int(rank.max()) + 1) + earlier, return_inverse=True)[1]
    known *= 2
  order = places[np.argsort(rank[places], kind="stable")]
  return {"tokens": tokens, "order": order.astype(np.int32)}


def save_datastore(
  folder: str | os.PathLike,
  params: Mapping[str, np.ndarray],
  tokenizer: Any,
  extra: Mapping[str, Any] | None = None,
) -> Path:
  """Writes a new folder; all of it or nothing.

  Raises:
    UserError: the folder holds something already.
  """
  from safetensors.numpy import save

  target = folders.check_target(folder, False)
  config = {
    "format": 1,
    "tokens": len(params["order"]),
    "largest_id": int(params["tokens"].max()),
    "tokenizer": tokenizer_hash(tokenizer),
    **dict(extra or {}),
  }
  with folders.replacing(target) as work:
    (work / ARRAYS_FILE).write_bytes(save({k: np.ascontiguousarray(v) for k, v in params.items()}))
    (work / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
  return target


def load_datastore(
  folder: str | os.PathLike, tokenizer: Any = None, vocab_size: int | None = None
) -> tuple[Datastore, dict[str, Any]]:
  """The drafter and its parameters.

  Args:
    tokenizer: of the target; None where it is used with token ids only, which is not checked.
    vocab_size: of the target.

  Raises:
    UserError: missing or damaged files, or a corpus of another tokenizer.
  """
  import jax.numpy as jnp
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  folder = Path(folder).expanduser()
  for name in (CONFIG_FILE, ARRAYS_FILE):
    if not (folder / name).is_file():
      raise UserError(f"'{folder}' holds no {name}; build a datastore with jaxdec datastore")
  config = folders.read_json(folder / CONFIG_FILE)
  if tokenizer is not None and config.get("tokenizer") != tokenizer_hash(tokenizer):
    raise UserError(
      f"the datastore in '{folder}' was built with another tokenizer (fingerprint "
      f"{config.get('tokenizer')} against {tokenizer_hash(tokenizer)} of this model); build one "
      "with jaxdec datastore --model for this model"
    )
  if vocab_size is not None and not config.get("largest_id", 0) < vocab_size:
    raise UserError(
      f"the datastore in '{folder}' holds token id {config['largest_id']}, the model has "
      f"{vocab_size} tokens; build one with jaxdec datastore --model for this model"
    )
  try:
    arrays = load_file(folder / ARRAYS_FILE)
    found = (arrays["tokens"].dtype, arrays["order"].dtype, len(arrays["order"]))
  except (SafetensorError, KeyError) as error:
    raise UserError(f"{folder / ARRAYS_FILE} is damaged ({error}); build it again") from error
  if found != (np.int32, np.int32, config.get("tokens")):
    raise UserError(f"{folder / ARRAYS_FILE} does not belong to its {CONFIG_FILE}; build it again")
  return Datastore(), {name: jnp.asarray(arrays[name]) for name in ("tokens", "order")}
