# SPDX-License-Identifier: Apache-2.0
"""Prompts behind a prefix held once continue as they do behind their own copy of it."""

from __future__ import annotations

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.decoding import shared_prefix as shared
from jaxdec.drafting.token_recycling import TokenRecycling
from jaxdec.errors import UserError
from jaxdec.mixers.attention import KVState
from tests.decoding.targets import Letters, target

RNG = random.Random(0)
text = lambda n: [RNG.randrange(13) for _ in range(n)]  # noqa: E731
PREFIX = text(37)
SUFFIXES = [text(n) for n in (1, 9, 20, 4)]
TREE = [[text(20)], [text(3), text(18)], [text(5), text(1), text(16), text(9)]]
GREEDY, PLAIN = Sampler(), Sampler(temperature=1.0)


def run(kind, prompts=SUFFIXES, **options):
  model, params = target(kind)
  return generate(
    model, params, prompts, **{"max_new_tokens": 9, "stop": None, "seed": 5, **options}
  )


@functools.cache
def plain(kind, tree=False, sampler=GREEDY):
  levels = [*(TREE if tree else [[PREFIX]]), SUFFIXES]
  whole = [[t for level in levels for t in level[i * len(level) // 4]] for i in range(4)]
  return run(kind, whole, sampler=sampler).tokens


@pytest.mark.parametrize(
  "kind, sampler",
  [
    ("attention", GREEDY),
    ("attention", PLAIN),
    ("linear", GREEDY),
    ("hybrid", PLAIN),
    pytest.param("recurrent", PLAIN, marks=pytest.mark.slow),
  ],
)
def test_one_prefix(kind, sampler):
  got = run(kind, shared_prefix=PREFIX, sampler=sampler).tokens
  assert got == plain(kind, sampler=sampler)


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_prefixes_that_branch(kind):
  assert run(kind, shared_prefix=TREE).tokens == plain(kind, tree=True)
  if kind == "attention":
    # Chunks that end inside the prefixes.
    assert run(kind, shared_prefix=TREE, prefill_chunk=7).tokens == plain(kind, tree=True)
    # In another order it is another text.
    other = [TREE[0], TREE[1][::-1], TREE[2]]
    assert run(kind, shared_prefix=other).tokens != plain(kind, tree=True)


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_speculation_over_a_shared_prefix(kind):
  out = run(kind, shared_prefix=TREE, drafter=TokenRecycling(), sampler=PLAIN)
  assert out.tokens == plain(kind, tree=True, sampler=PLAIN)
  assert out.stats.tokens_per_step > 1


def test_the_prefix_is_held_once():
  model, params = target("hybrid")
  sharing = shared.Sharing(((tuple(PREFIX),),))
  prompts = [PREFIX + s for s in SUFFIXES]
  state, output = shared.prefill(params, prompts, sharing, model=model, capacity=64)
  (layer,) = (s for s in state.layers if isinstance(s, KVState))
  assert [s.k.shape[0] for s in layer.shared] == [1] and layer.k.shape[0] == 4
  np.testing.assert_array_equal(layer.length, [len(p) for p in prompts])
  np.testing.assert_array_equal(layer.own, [len(s) for s in SUFFIXES])
  # The state says to more tokens what that of the whole prompts says.
  more = jnp.tile(jnp.arange(4, dtype=jnp.int32), (4, 1))
  read = jax.jit(
    lambda tokens, state, positions: model.apply(
      {"params": params}, tokens, state, positions, method="extend"
    )
  )
  got = read(more, state, layer.length[:, None] + jnp.arange(4)).logits
  for i, prompt in enumerate(prompts):
    tokens = jnp.asarray([[*prompt, *range(4), *[0] * (61 - len(prompt) - 4)]])
    positions = jnp.where(jnp.arange(61) < len(prompt) + 4, jnp.arange(61), -1)[None]
    want = read(tokens, model.init_state(1, 64), positions).logits[0]
    np.testing.assert_allclose(got[i], want[len(prompt) : len(prompt) + 4], atol=2e-4)
    np.testing.assert_allclose(
      model.apply({"params": params}, output.hidden[i, 0], method="unembed"),
      want[len(prompt) - 1],
      atol=2e-4,
    )


def test_common_beginnings_are_found():
  assert shared.common_beginning([[1, 2, 3, 4], [1, 2, 3], [1, 2, 4, 4, 5]]) == [1, 2]
  assert shared.common_beginning([[1, 2, 3], [1, 2, 3]]) == [1, 2]  # each keeps a token
  assert shared.common_beginning([[1], [1, 2]]) == [] == shared.common_beginning([[1, 2], [2, 2]])
  model, _ = target("attention")
  long = text(shared.SHORTEST)
  for prompts, found in (
    ([[*long, 1], [*long, 2, 3]], True),
    ([[*long, 1]], False),
    ([[*long[:-1], 1, 1], [*long[:-1], 2, 1]], False),
  ):
    rows, sharing = shared.parse(True, prompts, model.config, None)
    assert rows == prompts and (sharing is not None) == found
  assert run("attention", [long + s for s in SUFFIXES], shared_prefix=True).tokens == (
    run("attention", [long + s for s in SUFFIXES]).tokens
  )


def test_texts_and_mistakes():
  got = run("attention", ["ab", "cde"], shared_prefix="abcdefgh", tokenizer=Letters())
  want = run("attention", ["abcdefghab", "abcdefghcde"], tokenizer=Letters())
  assert (got.tokens, got.text) == (want.tokens, want.text)
  for options, message in (
    ({"shared_prefix": [[PREFIX, PREFIX, PREFIX]]}, "level 0 has 3 prefixes.*the 4 prompts"),
    ({"shared_prefix": [TREE[2], TREE[1]]}, "level 1 has 2 prefixes.*the 4 before it"),
    ({"shared_prefix": [99]}, "level 0: prompt 0 holds token id 99"),
    ({"shared_prefix": 7}, "must be True, a text"),
    ({"shared_prefix": PREFIX, "prepack": True}, "can't be packed"),
    ({"shared_prefix": [1] * 150}, "over the model's limit of 160"),
    (
      {"shared_prefix": PREFIX, "drafter": TokenRecycling(learn_prompt=True)},
      "those of a shared prefix are not kept",
    ),
  ):
    with pytest.raises(UserError, match=message):
      run("attention", **options)
