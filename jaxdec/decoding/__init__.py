# SPDX-License-Identifier: Apache-2.0
"""Who decides: sampling, verification rules, and the decode loop."""

from jaxdec.decoding.executables import compilations
from jaxdec.decoding.generate import Generation, Piece, generate, generate_stream
from jaxdec.decoding.sampling import Sampler
from jaxdec.decoding.stats import Stats
from jaxdec.decoding.verify import RULES, Match, Ratio, Rule, TypicalLossy, Verdict, get_rule

__all__ = [
  "RULES",
  "Generation",
  "Match",
  "Piece",
  "Ratio",
  "Rule",
  "Sampler",
  "Stats",
  "TypicalLossy",
  "Verdict",
  "compilations",
  "generate",
  "generate_stream",
  "get_rule",
]
