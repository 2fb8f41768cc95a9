# SPDX-License-Identifier: Apache-2.0
"""How many nodes to draft, and how deep: from measured times of a pass (Dovetail, 2412.18934).

A larger tree gains tokens and costs time, ``verify(N)`` for N nodes and ``draft`` a level. On a CPU
``verify`` rises from the first node on; on an accelerator it is flat for hundreds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxdec.drafting.static_tree import StaticTree, expected_tokens, greedy_tree
from jaxdec.errors import UserError


def choose_budget(
  accuracy, verify: Mapping[int, float], draft: float = 0.0
) -> tuple[StaticTree, float]:
  """The static tree of the most tokens a second; a dynamic tree may take its size and depth.

    max over N, d of  tokens(tree of N nodes, d deep) / (verify(N) + d draft)

  Args:
    accuracy: ``[D, R]``, chance that the draft of rank r at depth d is right, as ``greedy_tree``
      takes it (``measure_accuracy`` gives it).
    verify: seconds of the target's pass by its number of nodes, as measured (``{1: ..}`` is plain
      decoding); linear between, and nothing beyond the largest is tried.
    draft: seconds of drafting one level.

  Returns:
    The tree, and its tokens a second. One without drafts says: don't draft.

  Raises:
    UserError: no time, or one that isn't positive.
  """
  if not verify or min(verify) < 1 or min(verify.values()) <= 0 or draft < 0:
    raise UserError(
      "choose_budget needs positive seconds by number of nodes, such as {1: 0.010, 16: 0.014}, and "
      f"draft seconds of at least 0; got {dict(verify)} and {draft}"
    )
  sizes = sorted(verify)
  seconds = [verify[n] for n in sizes]
  best: tuple[float, StaticTree] | None = None
  for depth in range(1, len(accuracy) + 1):
    for n in range(sizes[0], sizes[-1] + 1):
      tree = greedy_tree(accuracy, n, depth)
      time = float(np.interp(tree.num_nodes, sizes, seconds)) + tree.max_depth * draft
      rate = expected_tokens(tree, accuracy) / time
      if best is None or rate > best[0]:  # of equals the shallowest, then the smallest
        best = rate, tree
  return best[1], best[0]
