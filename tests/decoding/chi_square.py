# SPDX-License-Identifier: Apache-2.0
"""A chi-square test without scipy."""

from __future__ import annotations

import math

import numpy as np


def chi_square_p(observed: np.ndarray, law: np.ndarray) -> float:
  """p-value of Pearson's test of counts against probabilities; cells expecting < 5 are merged."""
  observed = np.asarray(observed, np.float64).ravel()
  expected = np.asarray(law, np.float64).ravel() * observed.sum()
  if np.any(observed[expected == 0] > 0):
    return 0.0  # something impossible was seen
  small = expected < 5
  cells = [(observed[~small], expected[~small])]
  if small.any() and expected[small].sum() > 0:
    cells.append((observed[small].sum()[None], expected[small].sum()[None]))
  o, e = (np.concatenate(x) for x in zip(*cells))
  return survival(float(((o - e) ** 2 / e).sum()), len(o) - 1)


def survival(statistic: float, degrees: int) -> float:
  """P(chi-square with ``degrees`` > statistic): the regularised upper incomplete gamma function."""
  if degrees < 1:
    return 1.0
  a, x = degrees / 2, statistic / 2
  if x <= 0:
    return 1.0
  if x < a + 1:  # series for the lower function
    term = total = 1 / a
    n = a
    for _ in range(10_000):
      n += 1
      term *= x / n
      total += term
      if term < total * 1e-15:
        break
    return 1 - total * math.exp(-x + a * math.log(x) - math.lgamma(a))
  b, c = x + 1 - a, 1e300  # Lentz's continued fraction for the upper one
  d = 1 / b
  h = d
  for i in range(1, 10_000):
    an = -i * (i - a)
    b += 2
    d = 1 / (an * d + b)
    c = b + an / c
    h *= d * c
    if abs(d * c - 1) < 1e-15:
      break
  return h * math.exp(-x + a * math.log(x) - math.lgamma(a))
