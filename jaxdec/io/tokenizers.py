# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, over the ``tokenizers`` package (no transformers).

``tokenizer.json`` says everything about the segmentation; whether a beginning-of-sequence token is
put in front is read from its post-processor and, where given, from ``add_bos_token`` in
``tokenizer_config.json``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxdec.errors import UserError
from jaxdec.io.folders import read_json

# Small files that belong to a tokenizer and are carried from load to save as they are.
_EXTRAS = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
)
_REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are not (yet) a character


class Tokenizer:
  """A tokenizer with the ids a decoder needs.

  Attributes:
    vocab_size: number of base tokens (added special tokens apart).
    eos_ids: ids that end a sequence. bos_id: id put before every text, or None.
  """

  def __init__(
    self,
    backend: Any,
    *,
    eos_ids: Iterable[int] = (),
    bos_id: int | None = None,
    model_vocab_size: int | None = None,
    extras: dict[str, str] | None = None,
  ):
    """Wraps a ``tokenizers.Tokenizer``; ``model_vocab_size`` bounds the ids ``encode`` may give."""
    self.backend = backend
    self.vocab_size = backend.get_vocab_size(with_added_tokens=False)
    self.eos_ids = tuple(eos_ids)
    self.bos_id = bos_id
    self._limit = model_vocab_size
    self._extras = dict(extras or {})

  def encode(self, text: str, *, add_special: bool = True) -> list[int]:
    """Token ids of ``text``; ``add_special`` adds ``bos_id`` and what else the file says.

    Raises:
      UserError: the text contains a special token the model has no embedding for.
    """
    ids = self.backend.encode(text, add_special_tokens=add_special).ids
    if add_special and self.bos_id is not None and ids[:1] != [self.bos_id]:
      ids = [self.bos_id, *ids]
    if self._limit is not None and ids and max(ids) >= self._limit:
      token = self.backend.id_to_token(max(ids))
      raise UserError(
        f"the text contains the token {token!r} (id {max(ids)}), and the model has only "
        f"{self._limit} embeddings; remove it from the text."
      )
    return ids

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Text of token ids."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def stream(self, *, skip_special: bool = True) -> TextStream:
    """An incremental decoder for one sequence."""
    return TextStream(self, skip_special)

  def token_id(self, token: str) -> int | None:
    """Id of a token string, or None."""
    return self.backend.token_to_id(token)

  @property
  def extras(self) -> dict[str, str]:
    """The small files that came with the tokenizer (its chat template), by name."""
    return dict(self._extras)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes ``tokenizer.json`` and the small files that came with it."""
    folder = Path(folder)
    (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
    extras = self._extras or {"tokenizer_config.json": self._config_json()}
    for name, text in extras.items():
      (folder / name).write_text(text, encoding="utf-8")

  def _config_json(self) -> str:
    """The least that transformers needs to pick its generic fast tokenizer."""
    import json

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if self.bos_id is not None:
      config["bos_token"] = self.backend.id_to_token(self.bos_id)
    if self.eos_ids:
      config["eos_token"] = self.backend.id_to_token(self.eos_ids[0])
    return json.dumps(config, indent=2) + "\n"


class TextStream:
  """Decodes token by token, giving out only text that later tokens can't change.

  A window of tokens is decoded with and without the new ones; their difference is the new text. It
  is held back while it ends in an incomplete character.
  """

  def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
    self._tokenizer, self._skip = tokenizer, skip_special
    self._ids: list[int] = []
    self._start = self._read = 0

  def push(self, ids: int | Sequence[int]) -> str:
    """Text that became certain with ``ids``."""
    self._ids += [ids] if isinstance(ids, int) else [int(i) for i in ids]
    before, after = self._texts()
    if after.endswith(_REPLACEMENT) or len(after) <= len(before):
      return ""
    self._start, self._read = self._read, len(self._ids)
    return after[len(before) :]

  def finish(self) -> str:
    """What was held back, incomplete characters included."""
    before, after = self._texts()
    self._start = self._read = len(self._ids)
    return after[len(before) :]

  def _texts(self) -> tuple[str, str]:
    def decode(ids):
      return self._tokenizer.decode(ids, skip_special=self._skip)

    return decode(self._ids[self._start : self._read]), decode(self._ids[self._start :])


def _token_text(value: Any) -> str | None:
  """``"</s>"`` or ``{"content": "</s>", ...}``, both in use."""
  return value.get("content") if isinstance(value, dict) else value


def load_tokenizer(
  folder: str | os.PathLike,
  *,
  model_vocab_size: int | None = None,
  eos_ids: Iterable[int] = (),
  bos_id: int | None = None,
) -> Tokenizer:
  """The tokenizer of a model folder.

  Args:
    folder: holds ``tokenizer.json``.
    model_vocab_size: V of the model it must fit.
    eos_ids, bos_id: what the model's own files say; where they name no EOS, the tokenizer's own.

  Raises:
    UserError: no ``tokenizer.json``, an unreadable one, or more tokens than model embeddings.
  """
  folder = Path(folder)
  path = folder / "tokenizer.json"
  if not path.is_file():
    old = [n for n in ("tokenizer.model", "vocab.json") if (folder / n).is_file()]
    hint = f" ({old[0]} alone is not enough: convert it to tokenizer.json)" if old else ""
    raise UserError(f"folder '{folder}' has no tokenizer.json{hint}; copy it beside the weights.")
  import tokenizers

  try:
    backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
  except Exception as error:  # the package raises bare Exception
    raise UserError(
      f"{path} is not a tokenizer the tokenizers package can read: {error}."
    ) from None
  backend.no_padding()
  backend.no_truncation()
  size = backend.get_vocab_size(with_added_tokens=False)
  if model_vocab_size is not None and size > model_vocab_size:
    raise UserError(
      f"the tokenizer in '{folder}' has {size} tokens and the model's vocabulary "
      f"{model_vocab_size}; use the tokenizer the model was trained with."
    )
  extras = {n: (folder / n).read_text(encoding="utf-8") for n in _EXTRAS if (folder / n).is_file()}
  config = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in extras else {}
  eos = list(eos_ids)
  eos_token = _token_text(config.get("eos_token"))
  eos_id = backend.token_to_id(eos_token) if eos_token else None
  if eos_id is not None and not eos:
    eos.append(eos_id)
  return Tokenizer(
    backend,
    eos_ids=eos,
    bos_id=_leading_id(backend, config, bos_id),
    model_vocab_size=model_vocab_size,
    extras=extras,
  )


def _leading_id(backend: Any, config: dict[str, Any], bos_id: int | None) -> int | None:
  """The id put before every text: by the post-processor, or because ``add_bos_token`` asks."""
  bos_token = _token_text(config.get("bos_token"))
  named = backend.token_to_id(bos_token) if bos_token else None
  candidates = [i for i in (named, bos_id) if i is not None]
  first = backend.encode("a", add_special_tokens=True).ids[:1]
  if first and first[0] in candidates:
    return first[0]
  return candidates[0] if config.get("add_bos_token") and candidates else None
