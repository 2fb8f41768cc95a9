# SPDX-License-Identifier: Apache-2.0
"""Regular expressions and JSON schemas as constraints, by the ``llguidance`` library.

Its matcher follows a grammar over the bytes of tokens. Needs the ``grammar`` extra.
"""

from __future__ import annotations

import json
import types
from typing import Any

from jaxdec.decoding.request import TextCodec
from jaxdec.errors import UserError
from jaxdec.models.config import DecoderConfig


def regex(pattern: str, tokenizer: TextCodec, config: DecoderConfig) -> Grammar:
  """The whole new text matches a regular expression (of the Rust ``regex`` syntax, no look-around).

  Args:
    tokenizer: the model's. config: the model's, for its vocabulary and EOS ids.

  Raises:
    UserError: an invalid pattern, a model without EOS ids, or ``llguidance`` missing.
  """
  return Grammar(_library().LLMatcher.grammar_from_regex(pattern), tokenizer, config)


def json_schema(schema: dict | str, tokenizer: TextCodec, config: DecoderConfig) -> Grammar:
  """The new text is a JSON value of a schema; arguments and errors as of ``regex``."""
  try:
    text = json.dumps(json.loads(schema) if isinstance(schema, str) else schema)
  except (TypeError, ValueError) as error:
    raise UserError(f"the schema is not JSON: {error}") from None
  return Grammar(_library().LLMatcher.grammar_from_json_schema(text), tokenizer, config)


class Grammar:
  """A constraint: new texts are those of a grammar, ended by an EOS id."""

  def __init__(self, grammar: str, tokenizer: TextCodec, config: DecoderConfig):
    """``grammar``: what ``llguidance.LLMatcher`` takes."""
    library = _library()
    if not config.eos_ids:
      raise UserError("a grammar needs a model with an EOS id to end texts with; eos_ids is empty")
    self._ends = frozenset(config.eos_ids)
    vocab = _vocabulary(library, tokenizer, config)
    self._size = vocab.vocab_size
    # Errors are reported below, not printed.
    self._matcher = library.LLMatcher(vocab, grammar, log_level=0)
    if self._matcher.is_error():
      raise UserError(f"the grammar is invalid: {self._matcher.get_error().splitlines()[0]}")

  def start(self) -> Any:
    return self._matcher.deep_copy()

  def allows(self, state: Any, token: int) -> bool:
    if token in self._ends:
      return state.is_accepting()
    return token < self._size and state.validate_tokens([token]) == 1

  def advance(self, state: Any, token: int) -> Any:
    state = state.deep_copy()
    state.consume_token(token)
    return state


def _vocabulary(library, tokenizer: TextCodec, config: DecoderConfig):
  """The bytes of every token, as ``llguidance`` keeps them."""
  backend = getattr(tokenizer, "backend", None)
  if backend is not None:
    size = max(config.vocab_size, backend.get_vocab_size())
    return library.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=config.eos_ids[0])
  # Another tokenizer is asked for each token's text; parts of characters are never allowed.
  texts = ["" if t in config.eos_ids else _text(tokenizer, t) for t in range(config.vocab_size)]

  table = types.SimpleNamespace(
    eos_token_id=config.eos_ids[0],
    bos_token_id=config.bos_id,
    special_token_ids=[t for t, text in enumerate(texts) if not text],
    tokens=[text.encode() if text else f"<{t}>".encode() for t, text in enumerate(texts)],
  )
  return library.LLTokenizer(library.TokenizerWrapper(table))


def _text(tokenizer: TextCodec, token: int) -> str:
  try:
    text = tokenizer.decode([token])
  except (IndexError, KeyError):  # the model's vocabulary is larger than the tokenizer's
    return ""
  return "" if "\ufffd" in text else text


def _library():
  try:
    import llguidance
  except ImportError:
    raise UserError(
      "grammars need the llguidance package; install it with pip install 'jaxdec[grammar]'"
    ) from None
  return llguidance
