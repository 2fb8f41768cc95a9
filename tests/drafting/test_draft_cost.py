# SPDX-License-Identifier: Apache-2.0
"""Stopping rules under a cost model: replay, search, oracle heads, calibration."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting.base import Target
from jaxdec.drafting.draft_cost import (
  Costs,
  Rounds,
  best_fixed,
  best_threshold,
  drafts_made,
  measure_costs,
  record_rounds,
  replay,
)
from jaxdec.drafting.specdec import SpecDec
from jaxdec.drafting.stopping import calibration_error, fit_temperature
from jaxdec.training.tasks.stopping import LearnStopping
from tests.decoding.targets import target


@functools.cache
def synthetic(texts=6, length=300, most=8):
  """Drafts come in easy and hard stretches; the chance of each is known."""
  rng = np.random.default_rng(0)
  easy = rng.random((texts, length + most)) < 0.5
  chance = np.where(easy, 0.97, 0.15)
  right = rng.random(chance.shape) < chance
  window = lambda x: np.stack([x[:, i : i + length] for i in range(most)], axis=-1)  # noqa: E731
  return window(right), window(chance)


@pytest.mark.parametrize("draft", [0.02, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("narrow", [False, True])
def test_oracle_is_no_worse_than_every_fixed_length(draft, narrow):
  """An oracle of the outcome and the best of the grid, against all fixed lengths: with one width of
  verify pass, and with a pass as wide as the round."""
  right, _ = synthetic()
  sizes = range(2, 10) if narrow else [9]
  costs = Costs(draft, tuple((m, 1.0 + 0.02 * m) for m in sizes))
  rounds = Rounds(right, right.astype(np.float32))
  _, fixed = best_fixed(rounds, costs)
  assert best_threshold(rounds, costs)[2] >= fixed
  # The threshold's own merit: no bound on the length but that of the trees.
  alone = best_threshold(rounds, costs, lengths=[8])[2]
  if draft <= 0.2:
    assert alone > 1.01 * fixed
  else:  # two drafts a round at least are too many here
    assert best_fixed(rounds, costs)[0] == 1 and alone < fixed


def test_knowing_the_chances_helps_and_a_constant_head_does_not():
  right, chance = synthetic()
  costs = Costs(0.1, ((9, 1.0),))
  fixed = best_fixed(Rounds(right, right), costs)[1]
  assert best_threshold(Rounds(right, chance), costs, lengths=[8])[2] > 1.02 * fixed
  blind = Rounds(right, np.full(chance.shape, chance.mean()))
  assert best_threshold(blind, costs, lengths=[8])[2] <= fixed + 1e-9


def test_replay_by_hand():
  accepted = np.array([[[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]]], bool)
  rounds = Rounds(accepted, accepted.astype(np.float32))
  costs = Costs(1.0, ((4, 10.0), (3, 7.0)))
  np.testing.assert_allclose(costs.round(np.array([1, 2, 3])), [8, 9, 13])
  # t=0: 3 drafts, 2 right, 13 s; t=3: 3 drafts, all right, 13 s.
  assert replay(rounds, np.full((1, 4), 3), costs) == pytest.approx(7 / 26)
  # t=0: one draft, right, 8 s; t=2: one, wrong, 8 s; t=3: one, right, 8 s.
  assert replay(rounds, np.full((1, 4), 1), costs) == pytest.approx(5 / 24)
  chances = np.array([[0.9, 0.9, 0.9], [0.5, 0.9, 0.1]])
  np.testing.assert_array_equal(drafts_made(chances, 0.0), [2, 2])
  np.testing.assert_array_equal(drafts_made(chances, 0.15), [3, 2])
  np.testing.assert_array_equal(drafts_made(chances, 1.0), [3, 3])


def test_calibration():
  rng = np.random.default_rng(0)
  chance = rng.uniform(0.02, 0.98, 20_000)
  hit = (rng.random(chance.shape) < chance).astype(np.float32)
  weights = np.ones_like(hit)
  error = lambda p: float(calibration_error(*map(jnp.asarray, (p, hit, weights))))  # noqa: E731
  assert error(chance) < 0.015
  logit = np.log(chance / (1 - chance))
  assert error(1 / (1 + np.exp(-3 * logit))) > 0.1
  assert fit_temperature(3 * logit, hit) == pytest.approx(3, rel=0.05)
  shifted = float(calibration_error(jnp.full(4, 0.75), jnp.asarray([1, 0, 0, 0.0]), jnp.ones(4)))
  assert shifted == pytest.approx(0.5)


@functools.cache
def pair():
  """A target, a draft model that is the target with noise, texts the target wrote, a head."""
  model, params = target()
  keys = iter(jax.random.split(jax.random.key(1), 100))
  draft = jax.tree.map(
    lambda x: x + 0.2 * jnp.std(x) * jax.random.normal(next(keys), x.shape), params
  )
  drafter = SpecDec(model=model, num_drafts=4, num_blocks=1)
  prompts = np.random.default_rng(0).integers(0, 13, (24, 4)).tolist()
  out = generate(model, params, prompts, max_new_tokens=44, sampler=Sampler(1.0), stop=None)
  texts = np.concatenate([np.asarray(prompts), np.asarray(out.tokens)], axis=1)
  return model, params, drafter, draft, texts


def test_head_learns_to_predict_acceptance():
  """Better than the best constant, and calibrated; neither model changes."""
  model, params, drafter, draft, texts = pair()
  task = LearnStopping(drafter, draft, model, params, Sampler(1.0), rejection_weight=1.0)
  mask = np.ones(texts.shape)
  mask[:, :4] = 0
  batch = {
    "tokens": jnp.asarray(texts),
    "segment_ids": jnp.ones(texts.shape, jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape),
    "loss_mask": jnp.asarray(mask),
  }
  head = nn.unbox(task.init(jax.random.key(0)))
  optimizer = optax.adam(3e-3)

  @jax.jit
  def step(head, state, rng):
    loss = lambda h: task.loss(h, task.frozen, batch, rng)  # noqa: E731
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(head)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(head, updates), state, value, metrics

  state = optimizer.init(head)
  for i in range(300):
    head, state, *_ = step(head, state, jax.random.key(i))
  values, metrics = zip(*[step(head, state, jax.random.key(1000 + i))[2:] for i in range(8)])
  mean = lambda name: float(np.mean([m[name] for m in metrics]))  # noqa: E731
  a = mean("accepted")
  assert 0.3 < a < 0.95
  constant = -(a * np.log(a) + (1 - a) * np.log(1 - a))
  assert np.mean(values) < 0.97 * constant
  assert mean("ece") < 0.06
  # 44 of 48 positions are answers; 15% of them are read as they are.
  assert mean("weight") == pytest.approx(24 * 44 * 0.85, rel=0.05)
  gradients = jax.jit(
    jax.grad(lambda frozen: task.loss(head, frozen, batch, jax.random.key(0))[0])
  )(task.frozen)
  assert not any(np.any(g) for g in jax.tree.leaves(gradients))


def test_recorded_rounds_are_what_decoding_does():
  """Replaying a fixed length gives the very tokens per step that decoding has."""
  model, params, drafter, draft, _ = pair()
  head = drafter.init_params(jax.random.key(0))["head"]
  prompts, new = [[1, 2, 3], [4, 5, 6]], 60
  draft_params = {"model": draft, "head": head}
  fixed = SpecDec(model=model, num_drafts=4, num_blocks=1, threshold=1.0)
  out = generate(
    model, params, prompts, max_new_tokens=new, stop=None, drafter=fixed,
    drafter_params=draft_params,
  )  # fmt: skip
  texts = np.concatenate([np.asarray(prompts), np.asarray(out.tokens)], axis=1)
  rounds = record_rounds(drafter, draft_params, texts, 3, sampler=Sampler())
  one = Costs(0.0, ((5, 1.0),))
  whole = replay(rounds, np.full(rounds.accepted.shape[:2], 4), one)
  assert whole == pytest.approx(out.stats.tokens_per_step, rel=0.06)  # the last round is cut
  costs = measure_costs(drafter, draft_params, Target(model, params, None), [1, 5], repeats=3)
  assert costs.draft > 0 and len(costs.verify) == 2
