# SPDX-License-Identifier: Apache-2.0
"""Drafters without parameters that guess from the text and from their own passes: on every kind of
target the tokens of plain decoding."""

from __future__ import annotations

import functools

import pytest

from jaxdec.decoding import generate
from jaxdec.drafting import Aggressive, Jacobi, LexicalUnits, Lookahead, SpeculativeJacobi
from tests.decoding.targets import target
from tests.drafting.test_sources_lossless import CASES

# A ragged batch; the last prompt has each of the 13 tokens once: a place to copy from at any time.
PROMPTS = [[7], [1, 2, 3, 1, 2], [4, 0, 8, 12, 1, 5, 10, 2, 6, 9, 3, 11, 7]]
DRAFTERS = {
  "aggressive": Aggressive(num_drafts=4),
  "jacobi": Jacobi(num_drafts=4),
  "lookahead": Lookahead(window=3, ngram=3, guesses=3, num_drafts=4),
  "lexical_units": LexicalUnits(dim=16, vocab_size=13, pad=12, num_heads=2),
  "sjd": SpeculativeJacobi(num_drafts=4, fill="repeat"),
}


def written(kind, sampler, rows, drafter=None):
  return generate(
    *target(kind), PROMPTS[-rows:], sampler=sampler, drafter=drafter, max_new_tokens=24, stop=None,
    seed=[3, 4, 5][-rows:],
  )  # fmt: skip


@functools.cache
def plain(kind, sampler, rows):
  return written(kind, sampler, rows).tokens


@pytest.mark.parametrize("kind,sampler,rows", CASES)
@pytest.mark.parametrize("name", DRAFTERS)
def test_output_is_plain_decodings(name, kind, sampler, rows):
  out = written(kind, sampler, rows, DRAFTERS[name])
  assert out.tokens == plain(kind, sampler, rows)
  # A greedy text goes in circles, not along the prompt; and a Jacobi iteration owes no more than a
  # token a pass, which in one short text may be all.
  circles = name == "aggressive" and sampler.greedy
  alone = name in ("jacobi", "sjd") and rows == 1
  if not (circles or alone):
    assert out.stats.tokens_per_step > 1.0
