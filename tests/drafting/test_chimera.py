# SPDX-License-Identifier: Apache-2.0
"""Chimera: the tests that hold for all drafters, what its slots see, and what it reduces to."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_target import VOCAB, batch_of, init, logits_by_depth, random_batch, run, target
from universal import Universal

from jaxdec.drafting import Chimera, Medusa, TargetOutput
from jaxdec.drafting.chimera import _trigrams


class TestChimera(Universal):
  kind = Chimera
  overfit_options = {"objective": "hard", "share_head": True}  # noqa: RUF012

  def test_without_trigrams_a_fresh_head_is_a_fresh_medusa_head(self):
    """g = 0: what is left of residual decoding is the LM head on the target's state."""
    t, batch = target(), random_batch(3)
    output = run(t, batch)
    medusa = Medusa.for_target(t.model.config, num_heads=3)
    expected = logits_by_depth(medusa, init(medusa, t), t, output, batch)
    for share_head in (False, True):
      drafter = self.make(share_head=share_head)
      params = init(drafter, t)
      module = params["module"]
      for part in (module["reduce"], module["context"]["mixer"]["o"]):
        part["kernel"] = jnp.zeros_like(part["kernel"])
      for ours, theirs in zip(logits_by_depth(drafter, params, t, output, batch), expected):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)

  def test_a_trigram_is_three_tokens_of_one_document(self):
    positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2]])
    e = jnp.arange(8.0).reshape(1, 8, 1)
    expected = [
      [0, 0, 0],
      [0, 0, 1],
      [0, 1, 2],
      [1, 2, 3],
      [2, 3, 4],
      [5, 5, 5],
      [5, 5, 6],
      [5, 6, 7],
    ]
    np.testing.assert_array_equal(_trigrams(e, positions)[0], expected)

  def test_what_a_draft_sees(self):
    """Depth k at slot t: the states up to t, and tokens up to t + k; none later."""
    drafter, t = self.make(), target()
    params, batch = self.params(drafter), random_batch(0, rows=1, length=12)
    output, slot = run(t, batch), 4

    @functools.partial(jax.jit, static_argnums=2)
    def sensitivity(hidden, embedded, depth):
      module = drafter.module.bind({"params": params["module"]})

      def g(hidden, embedded):
        b = module.encode(_trigrams(embedded, batch["positions"]))
        ahead = [jnp.pad(b[:, k:], ((0, 0), (0, k), (0, 0))) for k in range(1, depth + 1)]
        out = module.rollout(hidden, ahead, batch["positions"], batch["segment_ids"])
        return jnp.sum(jnp.sin(out[-1][0, slot]))

      return jax.grad(g, argnums=(0, 1))(hidden, embedded)

    embedded = jax.random.normal(jax.random.key(1), output.hidden.shape)
    for depth in (1, 3):
      states, tokens = sensitivity(output.hidden, embedded, depth)
      seen = np.any(np.asarray(states[0]), axis=-1)
      np.testing.assert_array_equal(seen, np.arange(12) <= slot)
      # Outputs of earlier depths are detached, so gradients reach the newest trigram only.
      seen = np.any(np.asarray(tokens[0]), axis=-1)
      np.testing.assert_array_equal(
        seen, (np.arange(12) <= slot + depth) & (np.arange(12) > slot + depth - 3)
      )

  def test_earlier_drafts_enter_as_their_outputs(self):
    """Changing the first drafted token changes depth 3, out of its trigram's reach at depth 4."""
    drafter, t = self.make(num_heads=4), target()
    params, batch = self.params(drafter), random_batch(0, rows=1, length=12)
    output = run(t, batch)
    other = dict(batch, tokens=batch["tokens"].at[0, 5].add(1) % VOCAB)
    ours, theirs = (logits_by_depth(drafter, params, t, output, x)[3][0, 4] for x in (batch, other))
    assert float(jnp.abs(ours - theirs).max()) > 1e-4  # slot 4, depth 4: trigram of x_6, x_7, x_8


@pytest.mark.slow
def test_the_root_helps():
  """On first-order Markov text depth 1 beats Medusa's, which doesn't see the root."""
  rng, t = np.random.default_rng(0), target()
  matrix = rng.dirichlet(np.full(VOCAB, 0.08), VOCAB)
  law = jnp.log(jnp.asarray(matrix) + 1e-9)

  def rows(seed, count, length):
    rng, out = np.random.default_rng(seed), np.zeros((count, length), np.int32)
    out[:, 0] = rng.integers(0, VOCAB, count)
    for i in range(1, length):
      out[:, i] = np.argmax(np.cumsum(matrix[out[:, i - 1]], -1) > rng.random((count, 1)), -1)
    return batch_of(out)

  def teacher(batch):
    return TargetOutput(jax.nn.one_hot(batch["tokens"], 32), (), law[batch["tokens"]])

  test, accuracy = rows(999, 16, 64), {}
  for kind in (Medusa, Chimera):
    drafter = kind.for_target(t.model.config, num_heads=1)
    params, optimizer = init(drafter, t), optax.adam(optax.cosine_decay_schedule(1e-2, 150, 0.05))

    @jax.jit
    def step(params, state, batch, drafter=drafter, optimizer=optimizer):
      grads = jax.grad(lambda p: drafter.loss(p, t, teacher(batch), batch, None)[0])(params)
      updates, state = optimizer.update(grads, state)
      return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(150):
      params, state = step(params, state, rows(i, 8, 32))
    logits = logits_by_depth(drafter, params, t, teacher(test), test)[0]
    accuracy[kind] = float(jnp.mean(jnp.argmax(logits, -1) == test["tokens"][:, 2:]))
  best = np.max(matrix, -1)[np.asarray(test["tokens"])[:, 1:-1]].mean()
  assert accuracy[Chimera] > accuracy[Medusa] + 0.05
  assert accuracy[Chimera] > best - 0.08
