# SPDX-License-Identifier: Apache-2.0
"""Distillation: the frozen target, the folder a run leaves, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "drafting"))
from toy_target import VOCAB, init, loss_of, random_batch, randomized, run, target

from jaxdec.decoding import generate
from jaxdec.drafting.checkpoint import (
  fingerprint,
  from_config,
  load_drafter,
  save_drafter,
  to_config,
)
from jaxdec.drafting.dynamic_tree import DynamicTree
from jaxdec.drafting.hydra import Hydra
from jaxdec.drafting.kinds import KINDS
from jaxdec.drafting.medusa import Medusa
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.errors import UserError
from jaxdec.models import Decoder, stack_layers, tiny_llama
from jaxdec.training import OptimizerConfig, Trainer, TrainerConfig
from jaxdec.training.tasks.distill import Distill, finish, measure_accuracy


def make(cls=Medusa, t=None, **options):
  t = t or target()
  return cls.for_target(t.model.config, **{"num_heads": 2, **options})


def small_config(**options):
  return TrainerConfig(
    steps=3,
    progress=False,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    **options,
  )


def numpy_batch(seed, rows=2, length=16):
  return {k: np.array(v) for k, v in random_batch(seed, rows, length).items()}


@pytest.mark.parametrize(
  ("kind", "options"),
  [
    ("medusa", {"share_head": True}),
    ("eagle", {}),
    pytest.param("hass", {"rollouts": 3}, marks=pytest.mark.slow),
    ("eagle3", {}),
  ],
)
def test_flops_are_those_of_the_compiled_step(kind, options):
  """Each use of the layers and of the head counts: of the depths trained, not of those measured."""
  config = tiny_llama(
    vocab_size=1024, dim=256, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64,
    hidden_dim=256, tie_embeddings=True, max_length=128,
  )  # fmt: skip
  length, model = 128, Decoder(config)
  init = lambda: nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))  # noqa: E731
  drafter = KINDS[kind].for_target(config, num_heads=4, **options)
  task = Distill(drafter, model, jax.jit(init)()["params"])
  params = jax.eval_shape(lambda: nn.unbox(task.init(jax.random.key(0))))
  batch = numpy_batch(0, rows=1, length=length)
  step = jax.jit(jax.grad(task.loss, has_aux=True))
  compiled = step.lower(params, task.frozen, batch, jax.random.key(0)).compile()
  xla = compiled.cost_analysis()["flops"] / length
  # Not done: the last slots of each depth, and gradients of the first matrices' inputs.
  assert 0.9 <= xla / task.flops_per_token(params, length) <= 1.1


def test_target_stays_bit_identical_and_gets_no_gradient():
  """U8."""
  t = target()
  task = Distill(make(Hydra), t.model, t.params)
  before = jax.tree.map(np.array, t.params)
  batch = numpy_batch(0)
  params = init(task.drafter, t)

  def loss(params, frozen):
    return task.loss(params, frozen, batch, jax.random.key(0))[0]

  to_target = jax.jit(jax.grad(loss, argnums=1))(params, task.frozen)
  assert all(not np.any(g) for g in jax.tree.leaves(to_target))
  to_drafter = jax.jit(jax.grad(loss))(params, task.frozen)
  assert any(np.any(g) for g in jax.tree.leaves(to_drafter))

  trainer = Trainer(task, small_config(), data=[numpy_batch(i) for i in range(3)])
  state = trainer.init_state()
  assert jax.tree.structure(state.params) == jax.tree.structure(params)  # no target leaf is trained
  trainer.train()
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, t.params))


def test_no_backward_pass_through_the_target():
  """The gradient program holds one product with each target matrix, the forward one."""
  t = target()
  task = Distill(make(Medusa, share_head=False), t.model, t.params)
  batch = numpy_batch(0)
  params = init(task.drafter, t)

  def products(f, *args):
    text = str(jax.make_jaxpr(f)(*args))
    return sum(line.count("dot_general[") for line in text.splitlines())

  forward = products(lambda f: task.teacher(f, batch)[1], task.frozen)
  states = dataclasses.replace(run(t, batch), logits=None)
  drafter_only = products(
    jax.grad(lambda p, out: task.drafter.loss(p, t, out, batch)[0]), params, states
  )
  whole = products(jax.grad(lambda p, f: task.loss(p, f, batch, None)[0]), params, task.frozen)
  assert whole == forward + drafter_only


def test_both_layouts_teach_the_same():
  t = target()
  scanned = Decoder(t.model.config, layout="scanned")
  stacked = stack_layers(t.params, t.model.config)
  batch = numpy_batch(1)
  losses = []
  for cls in (Medusa, KINDS["eagle3"]):
    drafter = make(cls)
    params = randomized(init(drafter, t))
    for model, weights in ((t.model, t.params), (scanned, stacked)):
      task = Distill(drafter, model, weights)
      losses.append(
        jax.jit(lambda p, f, task=task: task.loss(p, f, batch, None)[0])(params, task.frozen)
      )
    np.testing.assert_allclose(losses[-2], losses[-1], rtol=1e-5)


def test_training_lowers_the_loss_and_reports_by_depth():
  t = target()
  task = Distill(make(Hydra), t.model, t.params)
  batch = numpy_batch(2)
  config = TrainerConfig(
    steps=30, progress=False, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
  )
  result = Trainer(task, config, data=[batch] * 30, eval_data=[batch]).train()
  start = loss_of(task.drafter, init(task.drafter, t), t, run(t, batch), batch)[0]
  assert float(result.metrics["loss"]) < 0.8 * float(start)
  assert np.shape(result.metrics["top1"]) == (2,) and np.shape(result.metrics["overlap"]) == (2,)
  assert 1 <= float(result.metrics["tokens_per_step"]) <= 3


@functools.cache
def trained():
  t = target()
  drafter = make(Hydra)
  return t, drafter, randomized(init(drafter, t))


def test_rank_table_is_counted_over_all_batches():
  t, drafter, params = trained()
  task = Distill(drafter, t.model, t.params)
  batches = [numpy_batch(3), numpy_batch(4, rows=2, length=16)]
  batches[1]["loss_mask"][:, 5:] = 0
  table = measure_accuracy(task, params, batches)
  top1 = weights = 0
  for batch in batches:
    _, metrics = loss_of(drafter, params, t, run(t, batch), batch)
    top1 += float(metrics["top1"][0]) * float(metrics["weight"])
    weights += float(metrics["weight"])
  assert table[0, 0] == pytest.approx(top1 / weights, abs=1e-6)
  assert np.all(table.sum(1) <= 1 + 1e-6) and table.shape == (2, 10)


def test_a_finished_run_decodes_from_its_folder(tmp_path):
  t, drafter, params = trained()
  task = Distill(drafter, t.model, t.params)
  folder = tmp_path / "run"
  done = finish(task, params, [numpy_batch(5)], str(folder), num_nodes=6, extra={"data": "toy"})
  assert isinstance(done.tree, StaticTree) and done.num_nodes == 6
  loaded, weights = load_drafter(folder, t)
  assert loaded == done and hash(loaded) == hash(done)
  jax.tree.map(np.testing.assert_array_equal, params, weights)
  described = json.loads((folder / "drafter.json").read_text())
  assert described["data"] == "toy" and len(described["accuracy"]) == 2
  assert described["target"]["vocab_size"] == VOCAB
  prompt = [[1, 2, 3]]
  plain = generate(t.model, t.params, prompt, max_new_tokens=12, stop=None)
  ours = generate(
    t.model, t.params, prompt, max_new_tokens=12, stop=None, drafter=loaded, drafter_params=weights
  )
  assert ours.tokens == plain.tokens


def test_dynamic_trees_are_kept():
  t, _, params = trained()
  drafter = make(Hydra, tree=DynamicTree(num_nodes=5, max_depth=2, width=3))
  done = finish(Distill(drafter, t.model, t.params), params, [numpy_batch(5)])
  assert done.tree == drafter.tree


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_configurations_round_trip(kind):
  options = {"tree": DynamicTree(num_nodes=5, max_depth=2, width=3)}
  if kind == "eagle3":
    options |= {"vocabulary": DraftVocabulary([1, 4, 7], VOCAB), "tree": StaticTree.chain(3)}
  drafter = make(KINDS[kind], **options)
  again = from_config(json.loads(json.dumps(to_config(drafter))))
  assert again == drafter and hash(again) == hash(drafter) and type(again) is type(drafter)


def test_fingerprint_ignores_layout_and_precision():
  t = target()
  plain = fingerprint(t.model, t.params)
  stacked = fingerprint(
    Decoder(t.model.config, layout="scanned"), stack_layers(t.params, t.model.config)
  )
  half = fingerprint(t.model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), t.params))
  assert plain == stacked == half
  changed = dict(t.params)
  changed["final_norm"] = jax.tree.map(lambda x: x * 1.5, t.params["final_norm"])
  assert fingerprint(t.model, changed)["weights"] != plain["weights"]


def save(folder):
  t, drafter, params = trained()
  save_drafter(folder, drafter, params, t)
  return t


def test_a_drafter_for_another_target_is_refused(tmp_path):
  save(tmp_path)
  with pytest.raises(UserError, match="vocabulary 23 against 29, width 32 against 16"):
    load_drafter(tmp_path, target(vocab=29, dim=16))
  with pytest.raises(UserError, match="same sizes but other weights"):
    load_drafter(tmp_path, target(seed=1))
  drafter, _ = load_drafter(tmp_path, target(seed=1), strict=False)
  assert drafter.name == "hydra"


def test_damaged_folders_are_named(tmp_path):
  t = save(tmp_path)
  with pytest.raises(UserError, match="does not exist"):
    load_drafter(tmp_path / "nowhere", t)
  weights = tmp_path / "drafter.safetensors"
  content = weights.read_bytes()
  weights.write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match=r"drafter\.safetensors is truncated or damaged"):
    load_drafter(tmp_path, t)
  flipped = bytearray(content)
  flipped[-1] ^= 1
  weights.write_bytes(bytes(flipped))
  with pytest.raises(UserError, match="checksums differ"):
    load_drafter(tmp_path, t)
  weights.unlink()
  with pytest.raises(UserError, match=r"holds no drafter\.safetensors"):
    load_drafter(tmp_path, t)
  weights.write_bytes(content)
  config = tmp_path / "drafter.json"
  text = config.read_text()
  config.write_text(text[:40])
  with pytest.raises(UserError, match=r"drafter\.json is damaged"):
    load_drafter(tmp_path, t)
  config.write_text(text.replace('"hydra"', '"hydro"'))
  with pytest.raises(UserError, match="did you mean 'hydra'"):
    load_drafter(tmp_path, t)
  config.write_text(text.replace('"num_blocks"', '"num_block"'))
  with pytest.raises(UserError, match="did you mean 'num_blocks'"):
    load_drafter(tmp_path, t)


def test_a_failed_save_leaves_the_old_drafter(tmp_path, monkeypatch):
  t = save(tmp_path)
  _, drafter, params = trained()
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

  def full(self, data):
    raise OSError("no space left")

  monkeypatch.setattr(Path, "write_bytes", full)
  with pytest.raises(OSError, match="no space"):
    save_drafter(tmp_path, drafter, jax.tree.map(lambda x: x + 1, params), t)
  monkeypatch.undo()
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
  load_drafter(tmp_path, t)


def test_boxed_target_parameters_are_laid_out_by_name():
  """A target fresh from init carries logical axes; the task unboxes it inside the step."""
  t = target()
  boxed = jax.eval_shape(lambda: t.model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
  boxed = jax.tree.map(
    lambda box, leaf: box.replace_boxed(leaf), boxed["params"], t.params,
    is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))  # fmt: skip
  drafter = make(Medusa)
  params = randomized(init(drafter, t))
  batch = numpy_batch(6)
  losses = [
    float(task.loss(params, task.frozen, batch, None)[0])
    for task in (Distill(drafter, t.model, t.params), Distill(drafter, t.model, boxed))
  ]
  assert losses[0] == losses[1]
