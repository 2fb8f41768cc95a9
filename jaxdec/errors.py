# SPDX-License-Identifier: Apache-2.0
"""The one exception for users' mistakes; the command line prints its sentence and exits 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """One clear sentence: what was received, what was expected, what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
  """`` (did you mean 'x'?)``, or the empty string where nothing is near."""
  match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f" (did you mean {match[0]!r}?)" if match else ""
