# SPDX-License-Identifier: Apache-2.0
"""A draft vocabulary: the subset of the target's tokens a drafter may guess.

Used by EAGLE-3 (arXiv 2503.01840), FR-Spec and VocabTrim (arXiv 2506.22694). What is emitted never
depends on it, since the target decides over its whole vocabulary.
"""

from __future__ import annotations

import numpy as np

from jaxdec.errors import UserError


class DraftVocabulary:
  """A subset of the target's tokens the drafter may guess; hashable, so that it can be static.

  Interchange form (EAGLE-3 checkpoints): ids ascend, ``d2t[i] = ids[i] - i`` is an offset,
  ``t2d`` marks the kept tokens.
  """

  def __init__(self, ids, vocab_size: int):
    self.ids = np.unique(np.asarray(ids, np.int32))
    self.vocab_size = vocab_size
    if not len(self.ids) or self.ids[0] < 0 or self.ids[-1] >= vocab_size:
      raise UserError(f"draft vocabulary ids must lie in 0..{vocab_size - 1} and not be empty")
    self._hash = hash((self.ids.tobytes(), vocab_size))

  @classmethod
  def most_frequent(cls, counts, size: int) -> DraftVocabulary:
    """The ``size`` tokens of the largest ``counts [V]`` (of the labels of the training set)."""
    counts = np.asarray(counts)
    return cls(np.argsort(-counts, kind="stable")[:size], len(counts))

  @property
  def d2t(self) -> np.ndarray:
    return self.ids - np.arange(len(self.ids), dtype=np.int32)

  @property
  def t2d(self) -> np.ndarray:
    mask = np.zeros(self.vocab_size, bool)
    mask[self.ids] = True
    return mask

  def __hash__(self):
    return self._hash

  def __eq__(self, other):
    return (
      isinstance(other, DraftVocabulary)
      and self.vocab_size == other.vocab_size
      and (np.array_equal(self.ids, other.ids))
    )

  def __repr__(self):
    return f"DraftVocabulary({len(self.ids)} of {self.vocab_size})"
