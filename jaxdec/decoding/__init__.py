# SPDX-License-Identifier: Apache-2.0
"""Who decides: sampling, verification rules, and the decode loop."""

from jaxdec.decoding.executables import compilations
from jaxdec.decoding.generate import Generation, Piece, generate, generate_stream
from jaxdec.decoding.sampling import Sampler
from jaxdec.decoding.stats import Stats
from jaxdec.decoding.verify import (
  RULES,
  Match,
  MultiRound,
  PointMass,
  Ratio,
  Rule,
  TypicalLossy,
  Verdict,
  WithoutReplacement,
  get_rule,
)

__all__ = [
  "RULES",
  "Generation",
  "Match",
  "MultiRound",
  "Piece",
  "PointMass",
  "Ratio",
  "Rule",
  "Sampler",
  "Stats",
  "TypicalLossy",
  "Verdict",
  "WithoutReplacement",
  "compilations",
  "generate",
  "generate_stream",
  "get_rule",
]
