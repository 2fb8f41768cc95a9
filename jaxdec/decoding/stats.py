# SPDX-License-Identifier: Apache-2.0
"""What a generation cost and how well the drafts did."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stats:
  """Counts of one ``generate`` call.

  Attributes:
    tokens_per_step: mean tokens emitted per target verify pass and live row, bonus included, after
      cutting at stops and budget; plain decoding has 1.0. The first token of a row comes from
      prefill and is not counted.
    accepted_by_depth: ``[D]``; fraction of those passes that emitted a draft of depth d and more.
      ``1 + sum`` of it is ``tokens_per_step`` exactly.
    target_passes: verify passes of the target over the whole batch (its rows share a pass).
    row_steps: passes in which each row was live.
    new_tokens: tokens returned, all rows.
    prefill_seconds: reading the prompts and drawing the first tokens.
    decode_seconds: the decode loop, host work between its segments included.
    draft_seconds, verify_seconds: ``decode_seconds`` split by the measured shares of proposing and
      of verifying and committing; None unless ``profile=True``, because the loop is one program
      whose parts can't be timed inside it.
    compile_seconds: compiling, in none of the above; 0 when everything had been compiled before.
  """

  tokens_per_step: float
  accepted_by_depth: tuple[float, ...]
  target_passes: int
  row_steps: tuple[int, ...]
  new_tokens: int
  prefill_seconds: float
  decode_seconds: float
  compile_seconds: float
  draft_seconds: float | None = None
  verify_seconds: float | None = None

  @property
  def tokens_per_second(self) -> float:
    """New tokens per second of prefill and decoding."""
    return self.new_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)


def acceptance(
  counts: np.ndarray, lengths: list[int], max_depth: int
) -> tuple[float, tuple[float, ...], tuple[int, ...]]:
  """``tokens_per_step, accepted_by_depth, row_steps`` of what was kept.

  Args:
    counts: ``[B, steps]`` tokens emitted per row and pass (0 once done).
    lengths: tokens kept per row, the prefill's one included (stop strings may cut emitted ones).
  """
  kept = []
  row_steps = []
  for row, length in zip(counts, lengths):
    before = 1 + np.concatenate([[0], np.cumsum(row)[:-1]]) if row.size else np.zeros(0, np.int64)
    live = np.minimum(row, np.maximum(length - before, 0))
    live = live[live > 0]
    kept.append(live)
    row_steps.append(len(live))
  kept = np.concatenate(kept) if kept else np.zeros(0)
  if not kept.size:
    return 1.0, (0.0,) * max_depth, tuple(row_steps)
  by_depth = tuple(float(np.mean(kept > d)) for d in range(1, max_depth + 1))
  return float(np.mean(kept)), by_depth, tuple(row_steps)
