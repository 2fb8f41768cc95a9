# SPDX-License-Identifier: Apache-2.0
"""HASS (arXiv 2408.15766): EAGLE trained on what it will see, and on what the target would try.

The layer is EAGLE's. Training rolls it out n = 3 times ("harmonized context alignment"): rollout j
feeds at slot t the feature that rollout j-1 predicted for it, detached, and sees true features up
to slot t - j + 1. The loss of every rollout is EAGLE's plus

  -sum_{v in top-K of p} p_v log q_v       K = 10, weight 1 ("harmonized objective distillation")

The reference code steps back once a rollout: the gradient is that of the sum, not of the mean.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxdec.drafting.eagle import Eagle
from jaxdec.drafting.objectives import Objective, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hass(Eagle):
  """HASS. ``rollouts``: n; ``objective``: its last term is the top-K distillation."""

  name: ClassVar[str] = "hass"

  rollouts: int = 3
  objective: Objective = (Term("smooth_l1"), Term("soft", 0.1), Term("top_k", 1.0, 10))
