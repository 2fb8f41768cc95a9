# SPDX-License-Identifier: Apache-2.0
"""Who decides: the rules that turn target logits at tree nodes into an accepted path.

* ``match`` (default, lossless): one target draw per position, keyed by (request, position); a draft
  is accepted iff it equals the draw. Output equals plain decoding token for token, for any drafter
  and any tree.
* ``ratio`` (lossless in law): speculative sampling of chains drawn from a known law q (Leviathan et
  al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
* ``multi_round``, ``without_replacement`` (lossless in law): the same for trees whose siblings were
  drawn from q independently, or without replacement.
* ``point_mass`` (lossless in law): for any drafts, without the coupling to plain decoding.
* ``typical_lossy`` (NOT lossless): Medusa's typical acceptance (arXiv 2401.10774, section 2.3.2).
* ``gad_lossy`` (NOT lossless): among the target's best few, GAD++ (arXiv 2203.16487).
* ``unverified_lossy`` (NOT lossless): every draft is emitted.

At temperature 0 all but the last two are the greedy comparison, which is exact.

Index law, the same for all: the logits of node i judge its children; the token they predict sits at
absolute position ``length + depth[i] + 1``.
"""

from __future__ import annotations

from jaxdec.decoding.verify.base import Rule, Verdict, path_to
from jaxdec.decoding.verify.match import Match, match_whole_tree
from jaxdec.decoding.verify.rejection import (
  MultiRound,
  PointMass,
  Ratio,
  Rejection,
  WithoutReplacement,
)
from jaxdec.decoding.verify.trusting import GadLossy, UnverifiedLossy
from jaxdec.decoding.verify.typical import TypicalLossy
from jaxdec.errors import UserError, nearest

RULES: dict[str, Rule] = {
  rule.name: rule
  for rule in (
    Match(),
    Ratio(),
    MultiRound(),
    WithoutReplacement(),
    PointMass(),
    TypicalLossy(),
    GadLossy(),
    UnverifiedLossy(),
  )
}


def get_rule(rule: str | Rule) -> Rule:
  """The rule of that name, or the object itself."""
  if isinstance(rule, Rule):
    return rule
  if rule not in RULES:
    raise UserError(f"unknown rule {rule!r}{nearest(str(rule), RULES)}; known: {', '.join(RULES)}")
  return RULES[rule]


__all__ = [
  "RULES",
  "GadLossy",
  "Match",
  "MultiRound",
  "PointMass",
  "Ratio",
  "Rejection",
  "Rule",
  "TypicalLossy",
  "UnverifiedLossy",
  "Verdict",
  "WithoutReplacement",
  "get_rule",
  "match_whole_tree",
  "path_to",
]
