# SPDX-License-Identifier: Apache-2.0
"""EAGLE-1 and EAGLE-2: what is trained, on which slots, with which noise; the tree they draft."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ranked import assert_drafts_what_training_ranks
from toy_target import (
  VOCAB,
  batch_of,
  init,
  loss_of,
  random_batch,
  randomized,
  run,
  target,
  train,
)
from universal import PATHS, SAMPLERS, Universal, plain, start

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting.base import Context
from jaxdec.drafting.dynamic_tree import DynamicTree
from jaxdec.drafting.eagle import Eagle
from jaxdec.drafting.objectives import Term
from jaxdec.drafting.rollout import rollout_attention
from jaxdec.drafting.static_tree import StaticTree, greedy_tree
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.errors import UserError
from jaxdec.mixers import AttentionConfig

KEPT = (0, 1, 2, 5, 6, 9, 11, 12, 17, 20, 22)
# On one text drafting lives on features learned by heart, its own included.
BY_HEART = {
  "objective": (Term("smooth_l1"), Term("hard", 0.1)),
  "rollouts": 3,
  "noise": 0.0,
}


class TestEagle(Universal):
  kind = Eagle
  overfit_options = BY_HEART


@functools.cache
def random_drafter(**options):
  drafter = Eagle.for_target(target().model.config, **{"num_heads": 3, **options})
  return drafter, randomized(init(drafter, target()), scale=0.5)


@functools.cache
def data():
  """One batch with a gap in the mask, and the target on it."""
  batch = random_batch(5, rows=2, length=11)
  batch["loss_mask"] = batch["loss_mask"].at[0, 4].set(0)
  return batch, run(target(), batch)


def test_first_layer_has_no_input_norm():
  _, params = random_drafter()
  assert set(params) == {"fc", "blocks_0"}
  assert set(params["blocks_0"]) == {"mixer", "mlp", "mlp_norm"}
  assert params["fc"]["kernel"].shape == (64, 32)
  two = init(Eagle.for_target(target().model.config, num_layers=2), target())
  assert set(two["blocks_1"]) == {"mixer", "mlp", "mlp_norm", "mixer_norm"}


def test_loss_by_hand():
  """SmoothL1 to the target's next state + 0.1 CE to its law, where fed and guessed token count."""
  drafter, params = random_drafter(noise=0.0)
  batch, output = data()
  loss, metrics = loss_of(drafter, params, target(), output, batch, jax.random.key(0))
  states = drafter.teacher_forced(params, target(), output, batch, jax.random.key(0))
  assert len(states) == 1 and len(metrics["top1"]) == 1  # one depth is computed in training
  f, h = np.asarray(states[0], np.float64), np.asarray(output.hidden, np.float64)
  q = np.asarray(jax.nn.log_softmax(drafter.head(params, target(), 1, states[0])))
  p = np.asarray(jax.nn.softmax(output.logits))
  terms = []
  for row in range(2):
    for t in range(9):
      if batch["loss_mask"][row, t + 1] * batch["loss_mask"][row, t + 2] == 0:
        continue
      d = np.abs(f[row, t] - h[row, t + 1])
      terms.append(np.mean(np.where(d < 1, d * d / 2, d - 0.5)))
      terms[-1] -= 0.1 * np.sum(p[row, t + 1] * q[row, t])
  np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)


def test_deeper_steps_are_measured_and_not_trained():
  """Evaluating three depths gives the loss, and the gradient, of the one that is trained."""
  drafter, params = random_drafter(noise=0.0)
  batch, output = data()

  @functools.partial(jax.jit, static_argnums=0)
  def both(deep, params):
    rng = None if deep else jax.random.key(0)
    return jax.value_and_grad(drafter.loss, has_aux=True)(params, target(), output, batch, rng)

  (loss, metrics), gradient = both(False, params)
  (evaluated, deep), same = both(True, params)
  assert len(deep["top1"]) == 3
  np.testing.assert_allclose(loss, evaluated, rtol=1e-5)
  np.testing.assert_allclose(metrics["depth_loss"][0], deep["depth_loss"][0], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, same)


def test_noise_shrinks_with_the_document():
  """Uniform, 0.2 x 512 / T wide, T the length of the slot's own document."""
  drafter, _ = random_drafter()
  segments = jnp.asarray([[1] * 4 + [2] * 16])
  noise = drafter._noisy(jnp.zeros((1, 20, 4000)), segments, jax.random.key(0))[0]
  for part, length in ((noise[:4], 4), (noise[4:], 16)):
    half = 0.1 * 512 / length
    assert 0.99 * half < float(jnp.max(part)) < half and -half < float(jnp.min(part)) < -0.99 * half
    np.testing.assert_allclose(jnp.mean(part), 0, atol=0.02 * half)
    np.testing.assert_allclose(jnp.std(part), half / 3**0.5, rtol=0.02)
  batch, output = data()
  quiet = [loss_of(drafter, random_drafter()[1], target(), output, batch)[0] for _ in range(2)]
  assert quiet[0] == quiet[1]  # none when evaluating


def test_rollout_attention_sees_step_0_and_its_own_slot():
  """Against one softmax over all pairs of slot and step it may see, with grouped heads."""
  rng, t, steps = np.random.default_rng(0), 6, 3
  config = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
  q = rng.standard_normal((2, t, 4, 8)).astype(np.float32)
  k, v = rng.standard_normal((2, steps, 2, t, 2, 8)).astype(np.float32)
  pairs = [(jnp.asarray(k[j]), jnp.asarray(v[j])) for j in range(steps)]
  out = rollout_attention(jnp.asarray(q), pairs, jnp.ones((2, t), jnp.int32), config)
  for b in range(2):
    for slot in range(t):
      for head in range(4):
        g = head // 2
        keys = [*k[0, b, : slot + 1, g], *k[1:, b, slot, g]]
        values = [*v[0, b, : slot + 1, g], *v[1:, b, slot, g]]
        w = np.exp(np.asarray(keys) @ q[b, slot, head] / 8**0.5)
        expected = (w / w.sum()) @ np.asarray(values)
        np.testing.assert_allclose(out[b, slot, head], expected, atol=1e-5)


def test_draft_vocabulary_takes_columns_of_the_targets_head():
  whole, params = random_drafter()
  cut = dataclasses.replace(
    whole, vocabulary=DraftVocabulary(KEPT, VOCAB), tree=StaticTree.from_paths(PATHS)
  )
  assert whole.share_head and not cut.share_head
  x = jax.random.normal(jax.random.key(0), (3, 32))
  np.testing.assert_allclose(
    cut.head(params, target(), 1, x), whole.head(params, target(), 1, x)[:, KEPT], atol=1e-5
  )
  state, root = start(cut, params, target(), np.asarray(data()[0]["tokens"]), [8, 5])
  context = Context(
    root=root, length=jnp.asarray([8, 5]), history=None, target=target(), sampler=None
  )
  tree, _ = jax.jit(lambda s: cut.propose(params, s, context, None))(state)
  assert set(np.asarray(tree.tokens[:, 1:]).ravel().tolist()) <= set(KEPT)


def test_trees_draft_what_training_ranks():
  assert_drafts_what_training_ranks(*random_drafter(tree=StaticTree.from_paths(PATHS)))


def test_dynamic_tree_changes_no_token():
  """EAGLE-2's tree, twice as deep as trained, sampled."""
  drafter, params = random_drafter(tree=DynamicTree(num_nodes=10, max_depth=6, width=3))
  prompts = ((1, 2, 3, 4, 5), (7, 8))
  out = generate(
    target().model, target().params, [list(p) for p in prompts], max_new_tokens=20,
    sampler=SAMPLERS["sampled"], drafter=drafter, drafter_params=params, stop=None, seed=5,
  )  # fmt: skip
  assert out.tokens == plain("sampled", prompts, 20)


def test_impossible_settings_are_refused():
  with pytest.raises(UserError, match="eagle needs rollouts and num_layers of at least 1"):
    Eagle.for_target(target().model.config, rollouts=0)
  with pytest.raises(UserError, match="rolls out over the whole text, got attention with window=8"):
    Eagle.for_target(target().model.config, attention=AttentionConfig(4, 2, 8, window=8))


class Unshifted(Eagle):
  """Control: at slot t the token x_t, which the feature has read, in place of x_{t+1}."""

  def teacher_forced(self, params, target, output, batch, rng=None):
    late = {**batch, "tokens": jnp.roll(batch["tokens"], 1, axis=1)}
    return super().teacher_forced(params, target, output, late, rng)


@functools.cache
def text_of_the_target(rows=24, length=64, seed=0):
  """What the target writes at temperature 1: every token is a surprise that the next one needs."""
  t, rng = target(), np.random.default_rng(seed)
  prompts = rng.integers(0, VOCAB, (rows, 2)).tolist()
  out = generate(
    t.model, t.params, prompts, max_new_tokens=length - 2, sampler=Sampler(1.0), stop=None,
    seed=seed,
  )  # fmt: skip
  return batch_of([p + x for p, x in zip(prompts, out.tokens)])


@functools.cache
def trained(kind=Eagle):
  t = target()
  drafter = kind.for_target(t.model.config, num_heads=3, noise=0.0)
  return drafter, train(drafter, t, text_of_the_target(), 150, 5e-3)[0]


def held_out(drafter, params):
  batch = text_of_the_target(rows=6, seed=1)
  return loss_of(drafter, params, target(), run(target(), batch), batch)[1]


@pytest.mark.slow
def test_without_the_token_shift_accuracy_is_lost():
  shifted, control = (held_out(*trained(kind))["top1"] for kind in (Eagle, Unshifted))
  assert float(shifted[0]) > float(control[0]) + 0.1, (shifted, control)


@pytest.mark.slow
def test_dynamic_tree_accepts_more_than_the_best_static_one():
  t = target()
  drafter, params = trained()
  batch = text_of_the_target(rows=6, seed=1)
  table = drafter.accuracy(params, t, run(t, batch), batch)[0]
  shapes = {
    "static": greedy_tree(np.clip(table, 0, 1), 10),
    "dynamic": DynamicTree(num_nodes=10, max_depth=3, width=4),
  }
  prompts = np.random.default_rng(2).integers(0, VOCAB, (16, 4)).tolist()
  rate = {
    name: generate(
      t.model, t.params, prompts, max_new_tokens=48, sampler=Sampler(1.0), stop=None,
      drafter=dataclasses.replace(drafter, tree=tree, coupled=False), drafter_params=params,
    ).stats.tokens_per_step
    for name, tree in shapes.items()
  }  # fmt: skip
  assert rate["dynamic"] >= rate["static"], rate
