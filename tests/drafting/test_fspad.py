# SPDX-License-Identifier: Apache-2.0
"""FSPAD: at the start EAGLE, and each view learns from its own term."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusion import interaction
from lookahead import accuracy, counting, counting_target
from toy_target import (
  init,
  logits_by_depth,
  loss_of,
  random_batch,
  randomized,
  run,
  target,
  train,
)
from universal import Universal

from jaxdec.drafting.eagle import Eagle
from jaxdec.drafting.fspad import Fspad
from jaxdec.drafting.objectives import Term

NEW = ("gate", "up", "down", "aligned", "read_view")


class TestFspad(Universal):
  kind = Fspad
  overfit_options = {  # noqa: RUF012
    "objective": (Term("smooth_l1"), Term("hard", 0.1)),
    "rollouts": 3,
    "noise": 0.0,
  }


@functools.cache
def pair(**options):
  """FSPAD at its start, but for EAGLE's own random weights; and the EAGLE that has them."""
  options = {"num_heads": 3, "noise": 0.0, **options}
  fspad, eagle = (k.for_target(target().model.config, **options) for k in (Fspad, Eagle))
  params = init(fspad, target())
  shared = randomized({k: v for k, v in params.items() if k not in NEW}, scale=0.5)
  return fspad, {**params, **shared}, eagle, shared


@functools.cache
def data():
  batch = random_batch(5, rows=2, length=11)
  return batch, run(target(), batch)


def test_it_starts_as_eagle():
  """Logits of every depth and the loss, exactly; also after its new parts are switched off."""
  fspad, params, eagle, shared = pair()
  batch, output = data()
  assert set(params) == {*NEW, *shared}
  assert set(init(eagle, target())) == set(shared)
  ours, theirs = (
    logits_by_depth(d, p, target(), output, batch) for d, p in ((fspad, params), (eagle, shared))
  )
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  losses = [
    loss_of(d, p, target(), output, batch)[0] for d, p in ((fspad, params), (eagle, shared))
  ]
  np.testing.assert_allclose(*losses, rtol=1e-6)
  moved = randomized(params, scale=0.5)  # control: with other weights it is something else
  assert (
    float(jnp.max(jnp.abs(logits_by_depth(fspad, moved, target(), output, batch)[0] - ours[0])))
    > 0.1
  )
  off = Fspad.for_target(target().model.config, sampling=False, split=False)
  assert set(init(off, target())) == set(shared)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(drafter, params, batch, output):
  return jax.grad(lambda p: drafter.loss(p, target(), output, batch, jax.random.key(0))[0])(params)


def test_each_view_learns_from_its_own_term():
  """One step: d CE / dN = 0 and d SmoothL1 / dM = 0; with more steps too, what is fed is cut."""
  for rollouts in (1, 2):
    for objective, still, learns in (
      ("soft", "aligned", "read_view"),
      ("smooth_l1", "read_view", "aligned"),
    ):
      fspad, params, *_ = pair(objective=objective, rollouts=rollouts)
      gradient = _gradient(fspad, randomized(params), *data())
      assert not np.any(gradient[still]["kernel"]), (objective, rollouts)
      assert np.any(gradient[learns]["kernel"])
      assert all(np.any(gradient[name]["kernel"]) for name in ("gate", "up", "down", "fc"))


def test_the_zero_gate_learns_at_once():
  fspad, params, *_ = pair()
  gradient = _gradient(fspad, params, *data())
  assert np.any(gradient["gate"]["kernel"]) and not np.any(params["gate"]["kernel"])


@pytest.mark.parametrize(("sampling", "split"), [(False, True), (True, False), (True, True)])
def test_each_part_changes_what_it_is_for(sampling, split):
  """Sampling: the token decides how a feature is read. Split: what the head reads isn't fed on."""
  t, options = target(), {"num_heads": 2, "noise": 0.0}
  fspad = Fspad.for_target(t.model.config, sampling=sampling, split=split, **options)
  params = randomized(init(fspad, t), scale=0.5)
  own = {"gate": sampling, "up": sampling, "down": sampling, "aligned": split, "read_view": split}
  assert {name for name in NEW if name in params} == {name for name, on in own.items() if on}
  mixed = interaction(fspad, params)
  assert mixed > 0.1 if sampling else mixed < 1e-5
  batch, output = data()

  @jax.jit
  def rolled(params):
    states = fspad.teacher_forced(params, t, output, batch)
    fed = [fspad.predicted(params, x) for x in states]
    return fed, [fspad.head(params, t, k, x) for k, x in enumerate(states, 1)]

  fed, logits = rolled(params)
  if not split:  # one vector for both
    unembed = t.model.apply({"params": t.params}, fed[0], method="unembed")
    np.testing.assert_allclose(logits[0], unembed, atol=1e-5)
    return
  view = jax.tree.map(lambda x: -x, params["read_view"])
  other_fed, other_logits = rolled({**params, "read_view": view})
  for k in range(2):
    np.testing.assert_array_equal(other_fed[k], fed[k])
    assert float(jnp.max(jnp.abs(other_logits[k] - logits[k]))) > 0.1


@pytest.mark.slow
def test_each_part_drafts_longer():
  """EAGLE, with feature sampling, with both: simulated tokens per step at equal steps."""
  t, lengths = counting_target(hidden=0.0), []
  for sampling, split in ((False, False), (True, False), (True, True)):
    drafter = Fspad.for_target(
      t.model.config, num_heads=2, noise=0.0, sampling=sampling, split=split
    )
    params, _ = train(drafter, t, counting, 60, 3e-3)
    lengths.append(1 + np.sum(np.cumprod(accuracy(drafter, params, t))))
  assert lengths == sorted(lengths) and lengths[2] > lengths[0] + 0.1, lengths
