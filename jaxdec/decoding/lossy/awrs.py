# SPDX-License-Identifier: Apache-2.0
"""Adaptive weighted rejection sampling of one token (arXiv 2504.05410).

Draws from ``p(t) ok(t) / Z`` without asking ``ok`` of the whole vocabulary: tokens come in Gumbel
order, that is drawn without replacement, until one passes. With it comes a weight w, an unbiased
estimate of ``Z = sum_t p(t) ok(t)``, and of more: ``E[w; token = t] = p(t) ok(t)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

Order = Iterable[tuple[int, float]]  # tokens with their probabilities, in a Gumbel order


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Attributes:

  token: None where nothing passed. weight: estimate of Z, 0 where nothing passed.
  calls: how often the constraint was asked.
  """

  token: int | None
  weight: float
  calls: int


def simple(order: Order, ok: Callable[[int], bool]) -> Drawn:
  """One order. After the first token t to pass the next one is asked as well.

  ``w = prod_rejected (1 - q) * (1 if the next passes else q_t)`` with ``q`` a token's share of the
  mass not rejected before it.
  """
  left, factor, calls = 1.0, 1.0, 0
  tokens = iter(order)
  for token, p in tokens:
    calls += 1
    q = p / max(left, p)  # rounding must not make the rest smaller than a part of it
    if ok(token):
      following = next(tokens, None)
      if following is None:
        return Drawn(token, factor, calls)
      return Drawn(token, factor if ok(following[0]) else factor * q, calls + 1)
    left, factor = left - p, factor * (1 - q)
  return Drawn(None, 0.0, calls)


def geometric(
  orders: Iterable[Order],
  ok: Callable[[int], bool],
  rng: np.random.Generator,
  max_rejects: int | None = None,
) -> Drawn:
  """A >= 2 independent orders, each up to its first token to pass; the first such one is kept.

  Rejected tokens are left out later. As if they weren't, every draw is preceded by
  ``Geometric(1 - rejected mass) - 1`` phantom rejects, which makes accepts and rejects those of
  draws with replacement; then ``w = min(A - 1, accepts) / (accepts + rejects - 1)``. Of less
  variance than ``simple`` for larger A. ``max_rejects`` stops there (still unbiased).
  """
  orders = list(orders)
  limit = np.inf if max_rejects is None else max_rejects
  verdicts: dict[int, bool] = {}
  left, accepts, rejects, kept = 1.0, 0, 0, None
  for order in orders:
    passed = False
    for token, p in order:
      if verdicts.get(token) is False:
        continue
      if left < 1:
        rejects += int(rng.geometric(min(max(left, p), 1.0))) - 1
        if rejects >= limit:
          break
      if token not in verdicts:
        verdicts[token] = bool(ok(token))
      if verdicts[token]:
        passed, accepts = True, accepts + 1
        kept = token if kept is None else kept
        break
      left, rejects = left - p, rejects + 1
      if rejects >= limit:
        break
    if not passed:  # the limit, or nothing passes at all
      break
  if kept is None:
    return Drawn(None, 0.0, len(verdicts))
  weight = min(len(orders) - 1, accepts) / (accepts + min(rejects, limit) - 1)
  return Drawn(kept, float(weight), len(verdicts))
