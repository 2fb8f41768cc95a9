# SPDX-License-Identifier: Apache-2.0
"""Tokens per step with bootstrap intervals over prompts; paired differences of drafters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 4000
LEVEL = 95  # per cent of the resamples inside an interval


def tokens_per_step(row: Mapping[str, Any]) -> tuple[float, float, float]:
  """Mean over verify passes, all prompts pooled, and the interval over resampled prompts.

  The first token of a prompt comes from prefill and is no pass's.
  """
  tokens, passes = counts(row)
  draws = _draws(len(tokens))
  low, high = np.percentile(_ratio(tokens, passes, draws), _tails())
  return float(tokens.sum() / passes.sum()), float(low), float(high)


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float]:
  """Tokens per step of ``one`` less those of ``other`` on the same prompts, and its interval."""
  a, b = counts(one), counts(other)
  draws = _draws(len(a[0]))
  apart = _ratio(*a, draws) - _ratio(*b, draws)
  low, high = np.percentile(apart, _tails())
  return float(a[0].sum() / a[1].sum() - b[0].sum() / b[1].sum()), float(low), float(high)


def counts(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and passes of each prompt that took a pass at all."""
  tokens = np.array(row["tokens_by_prompt"], float) - 1
  passes = np.array(row["passes_by_prompt"], float)
  return tokens[passes > 0], passes[passes > 0]


def expected_speedup(tokens: float, depth: int, draft_cost: float, verify_cost: float) -> float:
  """``tau / (c D + v)``: D drafter passes at c and one verify pass at v plain passes each."""
  return tokens / (draft_cost * depth + verify_cost)


def verdict(low: float, high: float, *, strict: bool) -> str:
  """What an interval of ``larger - smaller`` says about the claim that it is positive."""
  if low > 0:
    return "holds"
  if high < 0:
    return "violated"
  return "undecided" if strict else "not violated"


def order(
  rows: Mapping[str, Mapping[str, Any]], claims: Sequence[tuple[str, str, bool]]
) -> list[dict[str, Any]]:
  """One row per claim ``(larger, smaller, strict)`` whose drafters are both there."""
  out = []
  for larger, smaller, strict in claims:
    if larger in rows and smaller in rows:
      value, low, high = difference(rows[larger], rows[smaller])
      out.append({
        "claim": f"{larger} {'>' if strict else '≥'} {smaller}", "difference": value, "low": low,
        "high": high, "verdict": verdict(low, high, strict=strict),
      })  # fmt: skip
  return out


def _draws(count: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _ratio(tokens: np.ndarray, passes: np.ndarray, draws: np.ndarray) -> np.ndarray:
  return tokens[draws].sum(1) / passes[draws].sum(1)


def _tails() -> tuple[float, float]:
  return (100 - LEVEL) / 2, (100 + LEVEL) / 2
