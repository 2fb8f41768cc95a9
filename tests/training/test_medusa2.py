# SPDX-License-Identifier: Apache-2.0
"""Medusa-2: what moves and what doesn't, from where it starts, and what comes out."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.append(str(Path(__file__).parents[1] / "drafting"))
from toy_target import VOCAB, batch_of, randomized, target

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import Hydra, Medusa, StaticTree
from jaxdec.drafting.lora import LoRA
from jaxdec.errors import UserError
from jaxdec.models import Decoder
from jaxdec.models.decoder import stack_layers
from jaxdec.training import OptimizerConfig, Trainer, TrainerConfig
from jaxdec.training.tasks.distill import Distill
from jaxdec.training.tasks.medusa2 import Medusa2

DRAFTER = Medusa.for_target(target().model.config, num_heads=2, share_head=True)


def batch(seed=0):
  return batch_of(np.random.default_rng(seed).integers(0, VOCAB, (2, 16)))


@functools.cache
def tuning(keep="kl", **options):
  t = target()
  return Medusa2(DRAFTER, t.model, t.params, lora=LoRA(rank=4), keep=keep, **options)


@functools.cache
def fresh(keep="kl"):
  import flax.linen as nn

  return nn.unbox(tuning(keep).init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def loss_of(task, params, frozen, batch):
  return task.loss(params, frozen, batch, None)


@functools.partial(jax.jit, static_argnums=0)
def gradients(task, params, frozen, batch):
  return jax.grad(lambda *a: task.loss(*a, batch, None)[0], argnums=(0, 1))(params, frozen)


def test_it_starts_as_the_model_with_its_heads():
  """LoRA zero: the KL term is 0, the heads' loss and metrics are Medusa-1's, in both terms."""
  t = target()
  loss, metrics = loss_of(tuning(), fresh(), tuning().frozen, batch())
  first = Distill(DRAFTER, t.model, t.params)
  expected, theirs = loss_of(first, fresh()["heads"], first.frozen, batch())
  np.testing.assert_allclose(metrics["kept"], 0, atol=1e-6)
  np.testing.assert_allclose(loss, 0.01 * expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(metrics["top1"], theirs["top1"])
  loss, metrics = loss_of(tuning("hard"), fresh("hard"), tuning("hard").frozen, batch())
  np.testing.assert_allclose(loss, metrics["kept"] + 0.2 * expected, rtol=1e-5)
  logits = t.model.apply({"params": t.params}, batch()["tokens"]).logits[:, :-1]
  labels = batch()["tokens"][:, 1:]
  data = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  np.testing.assert_allclose(metrics["kept"], jnp.mean(data), rtol=1e-5)


def test_the_heads_loss_reaches_the_model_and_nothing_frozen():
  task = tuning("hard")
  params = randomized(fresh("hard"))
  ours, frozen = gradients(task, params, task.frozen, batch())
  assert all(np.any(g) for g in jax.tree.leaves(ours))
  assert not any(np.any(g) for g in jax.tree.leaves(frozen))
  # With the other term alone the LoRA's gradient differs: the heads' loss is in it.
  alone = tuning("hard", head_weight=0.0)
  other, _ = gradients(alone, params, alone.frozen, batch())
  a, b = (g["lora"]["layers_0"]["mixer"]["q"]["b"] for g in (ours, other))
  assert float(jnp.abs(a - b).max()) > 1e-4 * float(jnp.abs(b).max())
  assert not any(np.any(g) for g in jax.tree.leaves(other["heads"]))


def test_the_model_learns_at_a_quarter_of_the_rate():
  """One Adam step moves every trained entry of a and b by rate / 4, of the heads by rate."""
  task, params = tuning(), randomized(fresh())
  grads, _ = gradients(task, params, task.frozen, batch())
  optimizer = optax.adam(1e-3, eps=1e-20)
  updates, _ = optimizer.update(grads, optimizer.init(params))
  new = optax.apply_updates(params, updates)

  def largest(old, new):
    return max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (old, new))))

  assert largest(params["heads"], new["heads"]) == pytest.approx(1e-3, rel=1e-2)
  stored = params["lora"], new["lora"]
  old, new = (jax.tree.map(lambda x: x * task.backbone_rate, x) for x in stored)
  assert largest(old, new) == pytest.approx(2.5e-4, rel=1e-2)


@functools.cache
def trained():
  """Both stages, by the trainer."""
  t = target()
  before = jax.tree.map(np.array, t.params)
  config = TrainerConfig(
    steps=4, progress=False, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
  )
  batches = [batch(i) for i in range(4)]
  heads = Trainer(Distill(DRAFTER, t.model, t.params), config, data=batches).train().params
  task = Medusa2(DRAFTER, t.model, t.params, heads, lora=LoRA(rank=4), keep="hard")
  started = task.init(jax.random.key(0))["heads"]
  result = Trainer(task, config, data=batches).train().params
  return task, before, heads, started, result


def test_frozen_parameters_are_bit_identical_and_the_rest_moved():
  task, before, heads, started, result = trained()
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, task.frozen["target"]))
  import flax.linen as nn

  jax.tree.map(np.testing.assert_array_equal, heads, nn.unbox(started))  # stage 2 goes on
  new, new_heads = task.result(result)
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, dict(new))
  dense = {"q", "k", "v", "o", "gate", "up", "down"}
  for path, moved in jax.tree_util.tree_leaves_with_path(changed):
    names = [key.key for key in path]
    assert moved == (names[-1] == "kernel" and names[-2] in dense), names
  assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (heads, new_heads))))


def test_lossless_with_the_tuned_target():
  """Drafting with the new heads changes no token of the new target."""
  task, *_, result = trained()
  t = target()
  new, heads = task.result(result)
  heads = randomized(heads, scale=1.0)
  tree = StaticTree.from_paths([(0,), (1,), (0, 0), (1, 0)])
  drafter = dataclasses.replace(DRAFTER, tree=tree)
  prompts = [[1, 2, 3, 4, 5], [7, 8]]
  for sampler in (Sampler(), Sampler(1.0)):
    options = dict(max_new_tokens=20, sampler=sampler, stop=None)
    plain = generate(t.model, new, prompts, **options).tokens
    ours = generate(t.model, new, prompts, drafter=drafter, drafter_params=heads, **options).tokens
    assert ours == plain
  assert plain != generate(t.model, t.params, prompts, **options).tokens


def test_both_results_are_saved_and_belong_together(tmp_path):
  from jaxdec.drafting.base import Target
  from jaxdec.drafting.checkpoint import load_drafter
  from jaxdec.io import load_checkpoint

  task, *_, result = trained()
  drafter, new, _ = task.finish(result, [batch(9)], tmp_path / "run", num_nodes=4)
  task.finish(result, [batch(9)], tmp_path / "run", num_nodes=4)  # as a finished run's repetition
  _, params = load_checkpoint(tmp_path / "run" / "target")[:2]
  params = jax.tree.map(np.asarray, params)
  jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, dict(new)))
  loaded, _ = load_drafter(tmp_path / "run", Target(task.model, params, None))
  assert loaded == drafter
  with pytest.raises(UserError, match="other"):  # the original target is another
    load_drafter(tmp_path / "run", target())


def test_scanned_layers_give_the_same_loss():
  t = target()
  config = t.model.config
  scanned = Medusa2(
    DRAFTER, Decoder(config, layout="scanned"), stack_layers(t.params, config), lora=LoRA(rank=4)
  )
  params = randomized(fresh())
  stacked = {**params, "lora": stack_layers(params["lora"], config)}
  ours = loss_of(tuning(), params, tuning().frozen, batch())[0]
  theirs = loss_of(scanned, stacked, scanned.frozen, batch())[0]
  np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_only_medusa_heads_let_the_model_learn():
  t = target()
  with pytest.raises(UserError, match=r"Medusa heads, got 'hydra'"):
    Medusa2(Hydra.for_target(t.model.config), t.model, t.params)
  with pytest.raises(UserError, match="keep must be"):
    Medusa2(DRAFTER, t.model, t.params, keep="soft")
