# SPDX-License-Identifier: Apache-2.0
"""HASS: EAGLE's layer, its rollouts, and the gradient that is their sum."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from toy_target import init, random_batch, randomized, run, target
from universal import Universal

from jaxdec.drafting.eagle import Eagle
from jaxdec.drafting.hass import Hass
from jaxdec.drafting.objectives import Term


class TestHass(Universal):
  kind = Hass
  options = {"noise": 0.0}  # noqa: RUF012
  overfit_options = {"objective": (Term("smooth_l1"), Term("hard"))}  # noqa: RUF012


@functools.cache
def hass(**options):
  options = {"num_heads": 3, "noise": 0.0, **options}
  drafter = Hass.for_target(target().model.config, **options)
  return drafter, randomized(init(drafter, target()), scale=0.5)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(drafter, params, batch, output):
  return jax.value_and_grad(
    lambda p: drafter.loss(p, target(), output, batch, jax.random.key(0))[0]
  )(params)


@functools.cache
def data():
  batch = random_batch(5, rows=2, length=11)
  return batch, run(target(), batch)


def gradient(drafter, params):
  return _gradient(drafter, params, *data())


def test_one_rollout_is_eagle_and_the_top_k_term():
  drafter, params = hass(rollouts=1)
  shared = {f.name: getattr(drafter, f.name) for f in dataclasses.fields(Eagle)}
  eagle = Eagle(**shared)
  assert eagle.objective == (*Eagle.objective, Term("top_k", 1.0, 10))
  jax.tree.map(np.testing.assert_array_equal, init(drafter, target()), init(eagle, target()))
  jax.tree.map(np.testing.assert_array_equal, gradient(drafter, params), gradient(eagle, params))


def test_gradient_is_the_sum_over_rollouts_of_one_step_losses():
  """Each rollout, differentiated alone with what it is fed held constant, and then summed."""
  drafter, params = hass(objective="mse")
  batch, output = data()
  t = batch["tokens"].shape[1]

  def step_loss(j, states):
    error = (states[j] - output.hidden[:, j + 1 : t - 1]) ** 2
    return jnp.mean(error)

  @functools.partial(jax.jit, static_argnums=0)
  def alone(j, params):
    def loss(p):
      return step_loss(j, drafter.teacher_forced(p, target(), output, batch))

    return jax.value_and_grad(loss)(params)

  parts = [alone(j, params) for j in range(3)]
  loss, whole = gradient(drafter, params)
  np.testing.assert_allclose(loss, sum(x for x, _ in parts), rtol=1e-5)
  jax.tree.map(
    lambda g, *p: np.testing.assert_allclose(g, sum(p), atol=1e-5), whole, *(g for _, g in parts)
  )


def test_rollout_feeds_at_slot_t_the_prediction_for_slot_t():
  """Rollout 2 is rollout 1 over features whose last one is rollout 1's own, slot by slot."""
  drafter, params = hass()
  batch, output = data()
  states = drafter.teacher_forced(params, target(), output, batch)
  for slot in range(1, 8):  # the second rollout's guess for slot + 1, fed f^_slot
    fed = output.hidden.at[:, slot].set(drafter.predicted(params, states[0])[:, slot - 1])
    again = _one_step(drafter, params, output.replace(hidden=fed), batch)
    np.testing.assert_allclose(again[:, slot], states[1][:, slot - 1], atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def _one_step(drafter, params, output, batch):
  return dataclasses.replace(drafter, num_heads=1).teacher_forced(params, target(), output, batch)[
    0
  ]
