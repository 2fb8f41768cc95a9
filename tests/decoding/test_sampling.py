# SPDX-License-Identifier: Apache-2.0
"""The sampling law against a sorting reference, its noise against its law."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding.sampling import (
  ACCEPT,
  DRAFT,
  RESAMPLE,
  Sampler,
  gumbel,
  position_keys,
  request_keys,
)
from jaxdec.errors import UserError
from tests.decoding.chi_square import chi_square_p


def reference(logits: np.ndarray, sampler: Sampler) -> np.ndarray:
  """The law of one row, by sorting, in float64."""
  z = logits.astype(np.float64) / sampler.temperature
  keep = np.ones(z.shape, bool)
  if sampler.top_k is not None:
    keep &= z >= np.sort(z)[::-1][min(sampler.top_k, z.size) - 1]
  p = np.where(keep, np.exp(z - z.max()), 0)
  p /= p.sum()
  if sampler.top_p is not None:
    order = np.argsort(-p, kind="stable")
    last = np.searchsorted(np.cumsum(p[order]), sampler.top_p)
    keep &= p >= p[order[min(last, z.size - 1)]]
  if sampler.min_p is not None:
    keep &= p >= sampler.min_p * p.max()
  p = np.where(keep, p, 0)
  return p / p.sum()


@pytest.mark.parametrize("options", [
  {}, {"top_k": 1}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 0.9}, {"top_p": 0.05}, {"top_p": 1.0},
  {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 7, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
  {"top_k": 3, "temperature": 2.5},
])  # fmt: skip
@pytest.mark.parametrize("vocab", [1, 17, 131])
def test_law_equals_sorting_reference(options, vocab):
  sampler = Sampler(**{"temperature": 1.0, **options})
  logits = np.random.default_rng(vocab).normal(size=(9, vocab)).astype(np.float32) * 3
  got = np.exp(np.asarray(sampler.log_probs(jnp.asarray(logits))))
  want = np.stack([reference(row, sampler) for row in logits])
  np.testing.assert_array_equal(got > 0, want > 0)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_ties_are_all_kept():
  logits = jnp.asarray([[2.0, 1.0, 1.0, 1.0, 0.0]])
  kept = lambda s: np.isfinite(np.asarray(s.log_probs(logits)))[0].tolist()  # noqa: E731
  assert kept(Sampler(temperature=1.0, top_k=2)) == [True, True, True, True, False]
  assert kept(Sampler(temperature=1.0, top_p=0.6)) == [True, True, True, True, False]
  assert kept(Sampler(temperature=1.0, top_k=1)) == [True, False, False, False, False]


def test_greedy_is_the_first_maximum():
  logits = jnp.asarray([[0.0, 3.0, 3.0, 1.0]])
  sampler = Sampler(top_k=2, top_p=0.1)
  assert int(sampler.draw(logits, request_keys(0, 1), jnp.asarray([4]))[0]) == 1
  np.testing.assert_array_equal(np.exp(sampler.log_probs(logits)), [[0, 1, 0, 0]])


def test_bfloat16_logits_are_processed_in_float32():
  logits = jax.random.normal(jax.random.key(0), (3, 40)).astype(jnp.bfloat16)
  sampler = Sampler(temperature=0.7, top_p=0.9)
  a, b = sampler.log_probs(logits), sampler.log_probs(logits.astype(jnp.float32))
  assert a.dtype == jnp.float32
  np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sampler", [Sampler(temperature=1.0), Sampler(temperature=0.7, top_p=0.8)])
def test_draws_have_the_law(sampler):
  logits = jax.random.normal(jax.random.key(1), (11,)) * 1.5
  n = 200_000
  keys = request_keys(7, 4)
  positions = jnp.broadcast_to(jnp.arange(n // 4), (4, n // 4))
  drawn = jax.jit(sampler.draw)(jnp.broadcast_to(logits, (4, n // 4, 11)), keys, positions)
  law = np.exp(np.asarray(sampler.log_probs(logits), np.float64))
  assert chi_square_p(np.bincount(np.asarray(drawn).ravel(), minlength=11), law) > 1e-4
  # Neighbouring positions are independent: the pairs have the product law.
  pairs = np.asarray(drawn)[:, :-1] * 11 + np.asarray(drawn)[:, 1:]
  assert (
    chi_square_p(np.bincount(pairs[:, ::2].ravel(), minlength=121), np.outer(law, law).ravel())
    > 1e-4
  )


def test_noise_is_a_function_of_request_and_position_alone():
  logits = jax.random.normal(jax.random.key(2), (3, 5, 23))
  keys = request_keys(5, 3)
  positions = jnp.asarray([[3, 9, 4, 4, 0]] * 3)
  sampler = Sampler(temperature=1.0)
  together = sampler.draw(logits, keys, positions)
  for b in range(3):
    for t in range(5):
      alone = sampler.draw(logits[b : b + 1, t], keys[b : b + 1], positions[b : b + 1, t])
      assert int(alone[0]) == int(together[b, t])


def test_seed_lists_give_each_row_what_it_has_alone():
  rows = request_keys([11, 5, 11], 3)
  alone = [request_keys(s, 1)[0] for s in (11, 5, 11)]
  assert all((jax.random.key_data(a) == jax.random.key_data(b)).all() for a, b in zip(rows, alone))
  integer = jax.random.key_data(request_keys(11, 3))
  assert len({tuple(np.asarray(k).tolist()) for k in integer}) == 3


def test_purposes_have_independent_noise():
  keys, position = request_keys(0, 1), jnp.asarray([6])
  noise = [
    np.asarray(gumbel(position_keys(keys, position, tag), 2000))[0]
    for tag in (None, ACCEPT, RESAMPLE, DRAFT)
  ]
  correlation = np.corrcoef(noise) - np.eye(4)
  assert np.abs(correlation).max() < 0.1  # 4.5 standard errors


@pytest.mark.parametrize("options, word", [
  ({"temperature": -0.1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
  ({"top_k": 0}, "top_k"), ({"top_k": 1.5}, "top_k"), ({"top_p": 0.0}, "top_p"),
  ({"top_p": 1.2}, "top_p"), ({"min_p": -0.1}, "min_p"), ({"min_p": 2}, "min_p"),
])  # fmt: skip
def test_bad_options_are_named(options, word):
  with pytest.raises(UserError, match=word):
    Sampler(**options)
