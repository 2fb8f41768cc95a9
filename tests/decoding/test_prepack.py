# SPDX-License-Identifier: Apache-2.0
"""Packed prefill is padded prefill, for every mixer, and packs as well as it promises."""

from __future__ import annotations

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate, loop
from jaxdec.decoding import prepack as packing
from jaxdec.drafting.token_recycling import TokenRecycling
from jaxdec.errors import UserError
from tests.decoding.targets import target

RNG = random.Random(0)
PROMPTS = [[RNG.randrange(13) for _ in range(n)] for n in (3, 40, 1, 17, 64, 23, 2)]
CAPACITY = 96


@functools.cache
def compiled(kind):
  model, _ = target(kind)
  extend = lambda params, x, state, positions: model.apply(  # noqa: E731
    {"params": params}, x, state, positions, method="extend"
  )
  return jax.jit(extend)


@pytest.mark.parametrize(
  "kind", ["attention", "linear", "hybrid", pytest.param("recurrent", marks=pytest.mark.slow)]
)
def test_states_and_outputs_equal_those_of_padded_prefill(kind):
  model, params = target(kind)
  history = np.zeros((len(PROMPTS), CAPACITY), np.int32)
  for i, prompt in enumerate(PROMPTS):
    history[i, : len(prompt)] = prompt
  lengths = np.asarray([len(p) for p in PROMPTS], np.int32)
  static = dict(model=model, capture=(0,))
  for keep in (None, 64):
    state, output = packing.prefill(params, PROMPTS, capacity=CAPACITY, keep=keep, **static)
    wanted, reference = loop.prefill(params, history, lengths, chunk=64, keep=keep, **static)
    for name in ("hidden", "features"):
      for got, want in zip(
        *(jax.tree.leaves(getattr(x, name)) for x in (output, reference)), strict=True
      ):
        assert got.shape == want.shape
        for i, n in enumerate(lengths if keep else [1] * len(PROMPTS)):
          np.testing.assert_allclose(got[i, :n], want[i, :n], atol=1e-4, err_msg=f"{name} {i}")
  # States are compared by what they say to more tokens: slots beyond a length hold no meaning.
  np.testing.assert_array_equal(state.length, wanted.length)
  more = jnp.tile(jnp.arange(4, dtype=jnp.int32), (len(PROMPTS), 1))
  positions = jnp.asarray(lengths)[:, None] + jnp.arange(4)
  logits = [compiled(kind)(params, more, s, positions).logits for s in (state, wanted)]
  np.testing.assert_allclose(*logits, atol=1e-4)


def test_a_prompt_sees_nothing_of_its_row_and_order_changes_nothing():
  model, params = target("hybrid")
  options = dict(model=model, capacity=CAPACITY)
  last = lambda prompts: np.asarray(packing.prefill(params, prompts, **options)[1].hidden)  # noqa: E731
  whole = last(PROMPTS)
  changed = [*PROMPTS[:3], [(t + 1) % 13 for t in PROMPTS[3]], *PROMPTS[4:]]
  other = last(changed)
  same = [i for i in range(len(PROMPTS)) if i != 3]
  np.testing.assert_array_equal(other[same], whole[same])
  assert np.abs(other[3] - whole[3]).max() > 1e-2
  order = [4, 2, 6, 0, 5, 1, 3]
  np.testing.assert_allclose(last([PROMPTS[i] for i in order]), whole[order], atol=1e-5)


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_generate_gives_the_same_tokens(kind):
  model, params = target(kind)
  options = dict(max_new_tokens=12, stop=None, seed=3)
  for sampler in (Sampler(), Sampler(temperature=1.0)):
    plain = generate(model, params, PROMPTS, sampler=sampler, **options)
    for prepack in (True, "auto"):
      out = generate(model, params, PROMPTS, sampler=sampler, prepack=prepack, **options)
      assert out.tokens == plain.tokens
  learning = TokenRecycling(learn_prompt=True)  # wants the hidden states of all prompt tokens
  out = generate(model, params, PROMPTS, sampler=sampler, prepack=True, drafter=learning, **options)
  assert out.tokens == plain.tokens


@pytest.mark.parametrize("seed", range(5))
def test_packing_fits_and_wastes_little(seed):
  rng = np.random.default_rng(seed)
  lengths = np.minimum(np.ceil(rng.lognormal(3.5, 1.0, rng.integers(1, 80))), 300).astype(int)
  prompts = [[i % 13] * n for i, n in enumerate(lengths)]
  tokens, where = packing.pack(prompts)
  assert tokens.shape[1] >= lengths.max() and tokens.shape[1] <= max(64, 9 / 8 * lengths.max() + 1)
  bins = packing.first_fit_decreasing(lengths, tokens.shape[1])
  assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
  fewest = -(-lengths.sum() // tokens.shape[1])  # no packing does better
  assert len(bins) <= 11 / 9 * fewest + 2 / 3 or len(bins) <= fewest + 1
  for i, prompt in enumerate(prompts):
    slots = slice(where.offset[i], where.offset[i] + lengths[i])
    assert tokens[where.row[i], slots].tolist() == prompt
    assert (where.segment_ids[where.row[i], slots] == i).all()
    assert where.positions[where.row[i], slots].tolist() == list(range(lengths[i]))
  assert (where.segment_ids >= 0).sum() == lengths.sum()


def test_the_rule_of_auto_and_mistakes():
  assert packing.pays([[1] * 200] + [[1] * 10] * 9, 256)
  assert not packing.pays([[1] * 200] * 10, 256)
  model, params = target("attention")
  with pytest.raises(UserError, match="prepack must be True, False or 'auto', got 'yes'"):
    generate(model, params, [[1]], max_new_tokens=1, prepack="yes")
  values = np.zeros((1, 16))
  with pytest.raises(UserError, match="leave one out"):
    generate(model, params, [[1]], max_new_tokens=1, prepack=True, prefix=[(0, values)])
