# SPDX-License-Identifier: Apache-2.0
"""Clover-2: the tests that hold for all drafters, its start, its recurrence."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import (
  VOCAB,
  batch_of,
  init,
  logits_by_depth,
  loss_of,
  random_batch,
  randomized,
  run,
  target,
)
from universal import Universal, forced_logits

from jaxdec.decoding import generate
from jaxdec.drafting import Clover, Clover2, DraftVocabulary, Medusa, StaticTree
from jaxdec.drafting.clover import TokenAttention, head_rows
from jaxdec.drafting.losses import cross_entropy
from jaxdec.drafting.trained import lm_head_kernel
from jaxdec.mixers import NormConfig
from jaxdec.mixers.norms import rms_norm
from jaxdec.models import Decoder
from jaxdec.models.decoder import stack_layers


class TestClover2(Universal):
  kind = Clover2

  def test_token_attention_without_values_is_the_identity(self):
    module = TokenAttention(4, NormConfig(), jnp.float32)
    s, e = jax.random.normal(jax.random.key(0), (2, 1, 5, 32))
    params = randomized(nn.unbox(module.init(jax.random.key(1), s, e))["params"])
    assert float(jnp.abs(module.apply({"params": params}, s, e) - s).max()) > 1e-3
    params["v"] = jax.tree.map(jnp.zeros_like, params["v"])
    np.testing.assert_array_equal(module.apply({"params": params}, s, e), s)

  def test_token_attention_weighs_values_by_the_cosine_of_each_head(self):
    module = TokenAttention(4, NormConfig(), jnp.float32)
    s, e = jax.random.normal(jax.random.key(0), (2, 32))
    params = randomized(nn.unbox(module.init(jax.random.key(1), s, e))["params"])
    ours = module.apply({"params": params}, s[None, None], e[None, None])[0, 0]

    def dense(name, x):
      return np.asarray(x @ params[name]["kernel"] + params[name]["bias"])

    q = dense("q", rms_norm(s, params["norm"]["scale"], NormConfig()))
    k, v = dense("k", e), dense("v", e)
    expected = np.array(s)
    for h in range(4):
      i = slice(8 * h, 8 * h + 8)
      expected[i] += q[i] @ k[i] / np.linalg.norm(q[i]) / np.linalg.norm(k[i]) * v[i]
    np.testing.assert_allclose(ours, expected, atol=2e-6)

  def test_without_noise_head_1_is_the_lm_head_over_the_targets_last_layers(self):
    """``W RMS(RMS(layer(layer(g))))`` with the target's own weights, in both layouts."""
    t, drafter = target(), self.make(init_noise=0.0)
    batch = random_batch(3)
    output = run(t, batch, drafter.capture)
    block, bound = t.model.bind({"params": t.params}), batch["positions"]
    x = output.features[0]
    for _ in range(2):
      x = block.layers[-1](x, bound, batch["segment_ids"])
    expected = block.unembed(block.final_norm(block.final_norm(x)))[:, :-2]
    scanned = t.replace(
      model=Decoder(t.model.config, layout="scanned"), params=stack_layers(t.params, t.model.config)
    )
    for other in (t, scanned):
      ours = logits_by_depth(drafter, init(drafter, other), t, output, batch)[0]
      np.testing.assert_allclose(ours, expected, atol=2e-5)

  def test_tokens_are_rows_of_the_lm_head(self):
    for tied in (False, True):
      t = target(tied=tied)
      tokens = jnp.arange(VOCAB)[None]
      np.testing.assert_array_equal(head_rows(t, tokens)[0], lm_head_kernel(t).T)

  def test_it_reads_the_stream_before_the_final_norm(self):
    """The reference ships data of both kinds; a model given the wrong one learns another map."""
    t, drafter = target(), self.make()
    assert drafter.capture == (t.model.config.num_layers,)
    batch = random_batch(1)
    output = run(t, batch, drafter.capture)
    normed = t.model.bind({"params": t.params}).final_norm(output.features[0])
    np.testing.assert_allclose(normed, output.hidden, atol=1e-5)
    params = init(drafter, t)
    ours, other = (
      logits_by_depth(drafter, params, t, output.replace(features=(f,)), batch)[0]
      for f in (output.features[0], output.hidden)
    )
    assert float(jnp.abs(ours - other).max()) > 1e-2

  def test_deeper_than_trained_with_the_same_weights(self):
    """Depths 4 and 5 of a drafter of 3 are what a drafter of 5 gives in training."""
    t, drafter = target(), self.make()
    params = self.params(drafter)
    text = np.random.default_rng(0).integers(0, VOCAB, 12)
    served = forced_logits(drafter, params, t, text[None], np.array([4]), 5)
    deeper = self.make(num_heads=5)
    batch = batch_of([text])
    trained = logits_by_depth(deeper, params, t, run(t, batch, drafter.capture), batch)
    for depth in range(5):
      np.testing.assert_allclose(served[depth][0], trained[depth][0, 3], atol=3e-5)

  def test_a_draft_vocabulary_takes_columns_of_the_head(self):
    t, kept = target(), (0, 3, 4, 11, 20)
    states = jax.random.normal(jax.random.key(0), (2, 3, 32))
    cut = self.make(vocabulary=DraftVocabulary(kept, VOCAB)).head({}, t, 1, states)
    whole = self.make().head({}, t, 1, states)
    np.testing.assert_allclose(cut, whole[..., np.array(kept)], atol=1e-5)

  def test_state_has_one_shape_at_every_depth(self):
    drafter, t = self.make(tree=StaticTree.chain(8)), target()
    step = drafter.step(self.params(drafter), None, type("C", (), {"target": t})())
    s = jnp.ones((2, 1, 32))
    for level in range(1, 4):
      logits, s = step(s, level, jnp.ones((2, 2), jnp.int32), np.zeros(2, np.int32))
      assert logits.shape == (2, 2, VOCAB) and s.shape == (2, 2, 32)

  def test_every_depth_trains_the_layers_and_the_token_attentions(self):
    drafter, t = self.make(), target()
    params, batch = self.params(drafter), random_batch(0)
    output = run(t, batch, drafter.capture)
    grads = jax.grad(lambda p: loss_of(drafter, p, t, output, batch)[0])(params)
    silent = [k for k, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert not silent


class TestClover(Universal):
  kind = Clover

  def test_a_fresh_head_is_a_fresh_medusa_head(self):
    """No noise: nothing is added to the target's state, and each head is the LM head on it."""
    t, drafter = target(), self.make(init_noise=0.0)
    medusa = Medusa.for_target(t.model.config, num_heads=3, share_head=True)
    batch = random_batch(3)
    output = run(t, batch)
    for ours, theirs in zip(
      logits_by_depth(drafter, init(drafter, t), t, output, batch),
      logits_by_depth(medusa, init(medusa, t), t, output, batch),
    ):
      np.testing.assert_allclose(ours, theirs, atol=2e-6)

  def test_every_depth_has_weights_of_its_own(self):
    """The loss at depth k trains attention decoders 1..k and head k, no other head."""
    drafter, t = self.make(), target()
    params, batch = self.params(drafter), random_batch(0)
    output = run(t, batch)
    grads = jax.jit(jax.jacrev(lambda p: loss_of_depths(drafter, p, t, output, batch)))(params)
    for k in range(3):
      for j in range(3):
        head = np.any(grads[f"residual_{j}"]["kernel"][k])
        attend = np.any(grads[f"attend_{j}"]["v"]["kernel"][k])
        assert head == (j == k) and attend == (j <= k)


def loss_of_depths(drafter, params, t, output, batch):
  """Cross-entropy of each depth, ``[K]``."""
  logits = logits_by_depth(drafter, params, t, output, batch)
  return jnp.stack(
    [jnp.mean(cross_entropy(x, batch["tokens"][:, 1 + k :])) for k, x in enumerate(logits, 1)]
  )


@pytest.mark.slow
def test_default_objective_learns_states_and_laws():
  """SmoothL1 and soft labels together, as published, on one text: drafts come true."""
  from toy_target import greedy_text, overfit_batch, train

  t = target(seed=1)
  text = greedy_text(t, range(1, 9), 256)
  drafter = Clover2.for_target(t.model.config, num_heads=3)
  params, metrics = train(drafter, t, overfit_batch(text), 300, 3e-3)
  assert np.all(np.asarray(metrics["top1"]) >= 0.95), metrics["top1"]
  out = generate(
    t.model, t.params, [[int(x) for x in text[:8]]], max_new_tokens=len(text) - 8, drafter=drafter,
    drafter_params=params, stop=None,
  )  # fmt: skip
  assert out.stats.tokens_per_step >= 3.4
