# SPDX-License-Identifier: Apache-2.0
"""Every source, on every kind of target: the tokens of plain decoding, and fewer passes."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import Aded, Combined, Datastore, PromptLookup, Suffix, TokenRecycling
from jaxdec.io.datastore import build_datastore
from tests.decoding.targets import target

# A ragged batch: nothing to look up, something, and a text that repeats itself.
PROMPTS = [[7], [1, 2, 3, 1, 2], [4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4, 5]]
OPTIONS = dict(max_new_tokens=24, stop=None, seed=[3, 4, 5])
SAMPLED, GREEDY = Sampler(temperature=1.0), Sampler()
SOURCES = {
  "prompt_lookup": lambda: (PromptLookup(num_matches=3, ngram_min=1), None),
  "token_recycling": lambda: (TokenRecycling(size=12), None),
  "suffix": lambda: (Suffix(num_drafts=6), None),
  "suffix_path": lambda: (Suffix(num_drafts=6, mode="path", store=64, answer=32), None),
  "combined": lambda: (
    Combined(sources=(Suffix(num_drafts=6), TokenRecycling(size=12)), size=8),
    None,
  ),
  "aded": lambda: (Aded(size=8, slots=256), None),
  "datastore": lambda: (Datastore(num_drafts=6, shortest=1), store()),
}


def store():
  """The prompts, noise, and runs of each token: what the targets write now and then."""
  rng = np.random.default_rng(0)
  corpus = [np.asarray([*p, *rng.integers(0, 13, 60)]) for p in PROMPTS]
  corpus.append(np.repeat(np.arange(13), 5))
  return {k: jnp.asarray(v) for k, v in build_datastore(corpus).items()}


@functools.cache
def plain(kind, sampler, rows):
  return generate(*target(kind), PROMPTS[-rows:], sampler=sampler, **_options(rows)).tokens


def _options(rows):
  return OPTIONS | {"seed": OPTIONS["seed"][-rows:]}


CASES = [
  ("attention", SAMPLED, 3),
  ("attention", GREEDY, 1),
  ("hybrid", SAMPLED, 3),
  *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    ("linear", SAMPLED, 3), ("linear", GREEDY, 1), ("hybrid", GREEDY, 1), ("attention", GREEDY, 3),
  )),
]  # fmt: skip


@pytest.mark.parametrize("kind,sampler,rows", CASES)
@pytest.mark.parametrize("name", SOURCES)
def test_output_is_plain_decodings(name, kind, sampler, rows):
  drafter, params = SOURCES[name]()
  out = generate(
    *target(kind), PROMPTS[-rows:], sampler=sampler, drafter=drafter, drafter_params=params,
    **_options(rows),
  )  # fmt: skip
  assert out.tokens == plain(kind, sampler, rows)
  # One of 13 tokens is guessed now and then, and greedy decoding of a tiny model goes in circles.
  assert out.stats.tokens_per_step > 1.0
