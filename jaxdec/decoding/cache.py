# SPDX-License-Identifier: Apache-2.0
"""How much room a request needs: capacities in buckets, so that few sizes are ever compiled."""

from __future__ import annotations


def bucket(size: int, smallest: int = 64) -> int:
  """``size`` rounded up to one of eight sizes per octave (at most 1/8 wasted)."""
  step = max(smallest // 8, 1 << max((size - 1).bit_length() - 4, 0))
  return max(smallest, -(-size // step) * step)


def capacity_for(
  padded_prompt: int, longest: int, max_new_tokens: int, num_nodes: int, max_depth: int
) -> int:
  """Positions the caches and the token history must hold.

  Writes are clamped by XLA, and a clamped write would overwrite live entries, so the end of every
  write must fit: the prompt's padding, and, at the last step, the tree's nodes and the
  ``max_depth + 1`` tokens emitted after the root (those beyond the accepted ones are garbage nobody
  reads).
  """
  return bucket(max(padded_prompt, longest + max_new_tokens + max(num_nodes, max_depth + 2)))
