# SPDX-License-Identifier: Apache-2.0
"""Who decides: sampling, verification rules, the decode loop, and an engine for many requests."""

from jaxdec.decoding import lossy
from jaxdec.decoding.engine import Engine, EngineRequest, Event, QueueFull, Result
from jaxdec.decoding.executables import compilations
from jaxdec.decoding.generate import Generation, Piece, generate, generate_stream
from jaxdec.decoding.pearl import generate_pearl
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
  "Engine",
  "EngineRequest",
  "Event",
  "Generation",
  "Match",
  "MultiRound",
  "Piece",
  "PointMass",
  "QueueFull",
  "Ratio",
  "Result",
  "Rule",
  "Sampler",
  "Stats",
  "TypicalLossy",
  "Verdict",
  "WithoutReplacement",
  "compilations",
  "generate",
  "generate_pearl",
  "generate_stream",
  "get_rule",
  "lossy",
]
