# SPDX-License-Identifier: Apache-2.0
"""DSpark: DFlash with a bias by the token before and a confidence that cuts blocks short."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import VOCAB, init, random_batch, replace, run, target
from universal import Universal

from jaxdec.drafting.base import Context
from jaxdec.drafting.dflash import DFlash
from jaxdec.drafting.dspark import DSpark
from jaxdec.drafting.objectives import Slots, Term, value
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.errors import UserError


class TestDSpark(Universal):
  kind = DSpark
  options = {"rank": 4, "markov": "rnn", "threshold": 0.5, "widths": (4,)}  # noqa: RUF012
  overfit_options = {  # noqa: RUF012
    "objective": (Term("hard"), Term("confidence")),
    "threshold": 0.2,
    "widths": (),
  }


def test_without_its_additions_it_is_dflash():
  """Rank 0, no confidence, cross-entropy alone: the same weights, logits, loss and gradients."""
  t = target()
  options = {"num_heads": 3, "num_layers": 2, "num_anchors": 5}
  flash = DFlash.for_target(t.model.config, labels="from_anchor", **options)
  spark = DSpark.for_target(t.model.config, rank=0, objective="hard", **options)
  params = init(flash, t)
  ours = init(spark, t)
  assert jax.tree.structure(params) == jax.tree.structure(ours)
  jax.tree.map(np.testing.assert_array_equal, params, ours)
  batch = random_batch(3, rows=2, length=12)
  output = run(t, batch, flash.capture)

  def both(f):
    return [jax.jit(f, static_argnums=0)(drafter, params) for drafter in (flash, spark)]

  def training(drafter, params):
    rng = jax.random.key(2)
    logits = [
      drafter.head(params, t, e.depth, e.states)
      for e in drafter.examples(params, t, output, batch, rng)
    ]
    loss = lambda p: drafter.loss(p, t, output, batch, rng)[0]  # noqa: E731
    return logits, jax.value_and_grad(loss)(params)

  jax.tree.map(np.testing.assert_array_equal, *both(training))
  context = Context(
    root=jnp.asarray([3, 4]), length=jnp.asarray([0, 0]), history=batch["tokens"], target=t,
    sampler=None,
  )  # fmt: skip
  state = flash.init_state(2, 16)
  draft = lambda drafter, params: drafter.propose(params, state, context, None)[0]  # noqa: E731
  jax.tree.map(np.testing.assert_array_equal, *both(draft))


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn"])
def test_bias_by_hand(markov):
  """Depth k at slot t: the bias of ``x_{t+k}``, teacher-forced, on top of DFlash's logits."""
  t, r = target(), 4
  options = {"num_heads": 3, "num_layers": 1}
  spark = DSpark.for_target(t.model.config, rank=r, markov=markov, **options)
  flash = DFlash.for_target(t.model.config, labels="from_anchor", **options)
  params = TestDSpark.params(spark)
  batch = random_batch(1, rows=1, length=9)
  output = run(t, batch, spark.capture)

  @jax.jit
  def logits(params):
    return [
      [d.head(params, t, e.depth, e.states)[0] for e in d.examples(params, t, output, batch)]
      for d in (spark, flash)
    ] + [[e.states[0] for e in flash.examples(params, t, output, batch)]]

  ours, base, hidden = jax.device_get(logits(params))
  p = jax.tree.map(np.asarray, params["markov"])
  sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
  text = np.asarray(batch["tokens"][0])
  for slot in range(5):
    s = np.zeros(r)
    for k in range(1, 4):
      h, e = hidden[k - 1][slot], p["w1"][text[slot + k]]
      if markov == "vanilla":
        latent = e
      elif markov == "gated":
        latent = e * sigmoid(np.concatenate([h, e]) @ p["gate"]["kernel"] + p["gate"]["bias"])
      else:
        z = np.concatenate([s, e, h]) @ p["joint"]["kernel"] + p["joint"]["bias"]
        g, latent = sigmoid(z[:r]), np.tanh(z[2 * r :])
        s = g * s + (1 - g) * np.tanh(z[r : 2 * r])
      expected = base[k - 1][slot] + latent @ p["w2"]
      np.testing.assert_allclose(ours[k - 1][slot], expected, atol=2e-5)


def test_confidence_cuts_before_and_never_reads_the_slot_it_cuts():
  t = target()
  paths = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
  whole = TestDSpark.make(tree=StaticTree.from_paths(paths), threshold=None)
  params = TestDSpark.params(whole, 2.0)
  batch = random_batch(2, rows=3, length=6)
  context = Context(
    root=batch["tokens"][:, 0], length=jnp.zeros(3, jnp.int32), history=batch["tokens"], target=t,
    sampler=None,
  )  # fmt: skip
  state = whole.init_state(3, 16)

  @jax.jit
  def draft(params):
    block = whole._block(params, state, context)
    tree = whole.propose(params, state, context, None)[0]
    cut = replace(whole, threshold=0.5).propose(params, state, context, None)[0]
    other = tree.replace(tokens=tree.tokens.at[:, 1].set((tree.tokens[:, 1] + 1) % VOCAB))
    chances = whole.acceptance(params, block, tree), whole.acceptance(params, block, other)
    return tree, cut, chances

  tree, cut, (chance, other) = jax.device_get(draft(params))
  np.testing.assert_array_equal(tree.tokens, cut.tokens)
  assert tree.valid.all()
  moved = np.any(chance != other, axis=0)
  assert moved[[3, 4]].all() and not moved[[0, 1, 2, 5, 6]].any()  # its children's, not its own
  expected = chance >= 0.5
  for node in range(1, 7):
    expected[:, node] &= expected[np.arange(3), tree.parent[:, node]]
  np.testing.assert_array_equal(cut.valid, expected)
  assert 0 < cut.valid[:, 1:].mean() < 1


def test_confidence_learns_alpha_and_moves_no_draft():
  rng = np.random.default_rng(0)
  logits, teacher = (jnp.asarray(rng.normal(size=(1, 6, VOCAB))) for _ in range(2))
  alpha = jnp.minimum(jax.nn.softmax(logits), jax.nn.softmax(teacher)).sum(-1)

  def loss(confidence, logits):
    zero = jnp.zeros((1, 6))
    slots = Slots(logits, teacher, zero.astype(int), zero + 1, zero, zero, confidence=confidence)
    return jnp.sum(value((Term("confidence"),), slots))

  at_alpha, draft = jax.grad(loss, argnums=(0, 1))(jnp.log(alpha / (1 - alpha)), logits)
  np.testing.assert_allclose(at_alpha, 0, atol=1e-6)
  assert not np.any(draft)
  with pytest.raises(UserError, match="confidence head"):
    loss(None, logits)


def test_settings():
  config = target().model.config
  for wrong in (
    {"markov": "gru"}, {"rank": -1}, {"objective": "hard", "threshold": 0.5},
    {"temperatures": (1.0,)}, {"widths": (9,)},
  ):  # fmt: skip
    with pytest.raises(UserError, match=list(wrong)[-1]):
      DSpark.for_target(config, **wrong)
  assert DSpark.for_target(config).has_confidence
