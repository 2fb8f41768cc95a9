# SPDX-License-Identifier: Apache-2.0
"""The text side of decoding: stop strings found to the token, streaming without retractions."""

from __future__ import annotations

from jaxdec.decoding.request import TextCodec


class RowText:
  """Follows one row's new tokens.

  Args:
    tokenizer: None for rows of bare token ids.
    strings: stop strings. The tokens end with the one that completes a stop string; the text ends
      before the string.
  """

  def __init__(self, tokenizer: TextCodec | None, strings: tuple[str, ...] = ()):
    self.tokenizer, self.strings = tokenizer, strings
    self.tokens: list[int] = []
    self.text = "" if tokenizer is not None else None
    self.stopped = False
    self._sent = 0

  def extend(self, tokens: list[int]) -> None:
    """Adds tokens, up to the one that completes a stop string."""
    if self.stopped or not tokens:
      return
    before = len(self.tokens)
    self.tokens += tokens
    if self.tokenizer is None:
      return
    self.text = self.tokenizer.decode(self.tokens)
    if any(s in self.text for s in self.strings):
      # Decode ever longer prefixes: the first that holds a stop string ends the row.
      for n in range(before + 1, len(self.tokens) + 1):
        text = self.tokenizer.decode(self.tokens[:n])
        found = [text.index(s) for s in self.strings if s in text]
        if found:
          self.tokens, self.text, self.stopped = self.tokens[:n], text[: min(found)], True
          break

  def take(self, final: bool) -> str | None:
    """Text that can't change any more and was not taken before.

    Held back until ``final``: an unfinished character (decoded as U+FFFD) and what may be the
    beginning of a stop string.
    """
    if self.text is None:
      return None
    end = len(self.text)
    if not final and not self.stopped:
      end -= max((len(s) - 1 for s in self.strings), default=0)
      held = self.text.find("\ufffd", max(0, len(self.text) - 4))
      end = min(end, held) if held >= 0 else end
    piece = self.text[self._sent : max(end, self._sent)]
    self._sent += len(piece)
    return piece
