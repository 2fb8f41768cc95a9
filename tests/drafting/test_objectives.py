# SPDX-License-Identifier: Apache-2.0
"""Every term of an objective against its formula in float64, weights over depths, errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import VOCAB, init, loss_of, random_batch, randomized, run, target

from jaxdec.drafting import losses, objectives
from jaxdec.drafting.medusa import Medusa
from jaxdec.drafting.objectives import TERMS, Slots, Term
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.errors import UserError

RNG = np.random.default_rng(0)
LOGITS, TEACHER = 2 * RNG.normal(size=(2, 3, 11)), 2 * RNG.normal(size=(2, 3, 11))
LABELS = RNG.integers(0, 11, (2, 3))
WEIGHTS = np.array([[1.0, 0, 1], [1, 1, 0]])
CONFIDENCE, BASE = RNG.normal(size=(2, 3)), 2 * RNG.normal(size=(2, 3, 11))
PREDICTED, HIDDEN = 2 * RNG.normal(size=(2, 3, 5)), RNG.normal(size=(2, 3, 5))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def slots(kept=None, logits=LOGITS):
  """With ``kept``, teacher and logits are cut to these tokens."""
  teacher, mass = TEACHER, None
  if kept is not None:
    mass = np.log(np.exp(TEACHER).sum(-1))
    teacher, logits = TEACHER[..., kept], logits[..., kept]
  arrays = (logits, teacher, LABELS % logits.shape[-1], WEIGHTS, PREDICTED, HIDDEN)
  given = {"confidence": jnp.asarray(CONFIDENCE), "base": jnp.asarray(BASE)}
  if mass is not None:
    given["mass"] = jnp.asarray(mass)
  return Slots(*map(jnp.asarray, arrays), **given)


def reference(name, option, kept=None):
  kept = list(range(11)) if kept is None else list(kept)
  q, whole = softmax(LOGITS[..., kept]), softmax(TEACHER)
  p = softmax(TEACHER[..., kept])  # renormalised over the draft vocabulary
  alpha = np.minimum(whole[..., kept], q).sum(-1)
  kl = (p * np.log(p / q)).sum(-1)
  difference = np.abs(PREDICTED - HIDDEN)
  if name == "hard":
    labels = LABELS % len(kept)
    return -np.log(np.take_along_axis(q, labels[..., None], -1)[..., 0])
  if name == "soft":
    return -(p * np.log(softmax(LOGITS[..., kept] / (option or 1)))).sum(-1)
  if name == "kl":
    return kl
  if name in ("top_k", "list_mle"):
    order = np.argsort(-TEACHER[..., kept], -1)[..., : int(option or 10)]
    if name == "top_k":
      return -np.take_along_axis(p * np.log(q), order, -1).sum(-1)
    z = np.take_along_axis(LOGITS[..., kept], order, -1)
    return -sum(z[..., i] - np.log(np.exp(z[..., i:]).sum(-1)) for i in range(order.shape[-1]))
  if name == "tv":
    full = np.zeros_like(whole)
    full[..., kept] = q
    return 0.5 * np.abs(whole - full).sum(-1)
  if name == "nla":
    return -np.log(np.maximum(alpha, 1e-5))
  if name == "lk":
    share = np.exp(-(3 if option is None else option) * (alpha * WEIGHTS).sum() / WEIGHTS.sum())
    return share * kl + (1 - share) * (1 - alpha)
  if name == "confidence":
    c = 1 / (1 + np.exp(-CONFIDENCE))
    return -alpha * np.log(c) - (1 - alpha) * np.log(1 - c)
  if name == "base":
    law = softmax(BASE)
    return -np.log(np.take_along_axis(law, (LABELS % len(kept))[..., None], -1)[..., 0])
  if name == "smooth_l1":
    return np.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean(-1)
  assert name == "mse"
  return (difference**2).mean(-1)


STATES = ("smooth_l1", "mse", "confidence", "base")  # terms that don't look at the drafter's law
CASES = [(name, None) for name in TERMS] + [
  ("soft", 0.95), ("top_k", 3), ("list_mle", 4), ("lk", 0.0), ("lk", 1.0)]  # fmt: skip


@pytest.mark.parametrize("kept", [None, (0, 2, 3, 5, 6, 7, 8, 9, 10, 4)])
def test_terms_are_their_formulas(kept):
  kept = None if kept is None else sorted(kept)
  objective = tuple(Term(name, 1.0, option) for name, option in CASES)
  values = jax.jit(lambda s: [objectives.value((t,), s) for t in objective])(slots(kept))
  for value, (name, option) in zip(values, CASES):
    np.testing.assert_allclose(
      value, reference(name, option, kept), rtol=2e-5, atol=1e-6, err_msg=f"{name} {option}"
    )


def test_terms_add_up_with_their_weights():
  mixed = objectives.value((Term("smooth_l1"), Term("soft", 0.1)), slots())
  np.testing.assert_allclose(
    mixed, reference("smooth_l1", None) + 0.1 * reference("soft", None), rtol=1e-5
  )


def test_no_term_differentiates_the_teacher():
  """Nor the target's state through it; and all but those of other outputs move its logits."""

  def total(s, name):
    return jnp.sum(objectives.value(name, s))

  for name in TERMS:
    grads = jax.grad(lambda logits, name=name: total(slots().replace(logits=logits), name))
    assert np.any(grads(jnp.asarray(LOGITS))) == (name not in STATES), name
  for name in ("soft", "kl", "top_k", "list_mle"):
    to_teacher = jax.grad(lambda teacher, name=name: total(slots().replace(teacher=teacher), name))(
      jnp.asarray(TEACHER)
    )
    assert not np.any(to_teacher), name


def test_losses_of_a_perfect_drafter_are_their_floor():
  s = slots(logits=TEACHER)
  p = softmax(TEACHER)
  floor = {"kl": 0.0, "tv": 0.0, "nla": 0.0, "lk": 0.0, "soft": -(p * np.log(p)).sum(-1)}
  for name, value in floor.items():
    np.testing.assert_allclose(objectives.value(name, s), value, atol=1e-5, err_msg=name)


def test_gradient_of_nla_is_total_variation_over_alpha():
  s = slots()
  one = lambda name: jax.grad(  # noqa: E731
    lambda logits: jnp.sum(objectives.value(name, s.replace(logits=logits)))
  )(s.logits)
  alpha = losses.overlap(s.logits, s.teacher)
  np.testing.assert_allclose(one("nla"), one("tv") / alpha[..., None], rtol=1e-4, atol=1e-6)


def test_dpace_by_hand():
  """The middle slot of row 0 counts at depth 1 only, row 1 at depths 1 and 3."""
  probs = [np.array([[0.5, 0.2]]), np.array([[0.9, 0.4]]), np.array([[0.1, 0.7]])]
  counted = [np.array([[1.0, 1]]), np.array([[1.0, 0]]), np.array([[1.0, 0]])]
  got = objectives.dpace_weights(list(map(jnp.asarray, probs)), list(map(jnp.asarray, counted)))
  s = [0.75, 0.95, 0.55]
  c = np.cumprod(s)
  expected = [[c.sum(), 0.6], [c[1:].sum(), 0], [c[2], 0]]
  np.testing.assert_allclose(np.array(got)[:, 0], expected, rtol=1e-6)


def test_depths_and_normalisation():
  """``depth``: means added up; ``global``: one mean over all slots of all depths."""
  t = target()
  params = randomized(init(Medusa.for_target(t.model.config, num_heads=2), t))
  batch = random_batch(1, rows=1, length=9)
  output = run(t, batch)
  losses_of = {}
  for normalize in ("depth", "global"):
    drafter = Medusa.for_target(
      t.model.config, num_heads=2, depth_decay=0.5, normalize=normalize, objective="soft"
    )
    losses_of[normalize], metrics = loss_of(drafter, params, t, output, batch)
  first, second = metrics["depth_loss"]
  np.testing.assert_allclose(losses_of["depth"], 0.5 * first + 0.25 * second, rtol=1e-6)
  n, m = 9 - 2, 9 - 3
  expected = (0.5 * n * first + 0.25 * m * second) / (0.5 * n + 0.25 * m)
  np.testing.assert_allclose(losses_of["global"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["confidence", "base"])
def test_terms_of_heads_a_drafter_has_not(name):
  with pytest.raises(UserError, match=f"'{name}' is for drafters with a"):
    objectives.value(name, slots().replace(confidence=None, base=None))


def test_mistakes_are_named():
  t = target()
  make = lambda **o: Medusa.for_target(t.model.config, **o)  # noqa: E731
  with pytest.raises(UserError, match=r"'sofd' \(did you mean|'sofd'.*soft"):
    make(objective="sofd")
  with pytest.raises(UserError, match="empty"):
    make(objective=())
  with pytest.raises(UserError, match="weighting"):
    make(weighting="linear")
  with pytest.raises(UserError, match="share_head=False"):
    make(share_head=True, vocabulary=DraftVocabulary(range(5), VOCAB))
  with pytest.raises(UserError, match="subset of 9"):
    make(vocabulary=DraftVocabulary(range(5), 9))
  assert dataclasses.replace(make(), objective=(Term("kl"), Term("mse", 0.1))).objective
