# SPDX-License-Identifier: Apache-2.0
"""BlockFFN layers: routing, the two sparsity losses, and decoding with the experts in use."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import EarlyExit
from jaxdec.errors import UserError
from jaxdec.mixers import AttentionConfig
from jaxdec.models import (
  BlockFFNConfig,
  Decoder,
  DecoderConfig,
  LayerConfig,
  MLPConfig,
  stack_layers,
)
from jaxdec.models.block_ffn import (
  BlockFFN,
  ChunkFactor,
  SparsityLosses,
  activation_locality,
  chunk_activation,
  chunk_sparsity,
  router_logits,
  shares,
)
from jaxdec.models.families import config_from_hf, config_to_hf
from jaxdec.training import Trainer, read_metrics
from jaxdec.training.tasks.language_model import LanguageModel
from tests.training import tiny

DIM, E, F = 12, 6, 5
FFN = BlockFFNConfig(E, F)


@functools.cache
def block(union=None):
  module = BlockFFN(dataclasses.replace(FFN, union=union), DIM)
  params = nn.unbox(module.init(jax.random.key(0), jnp.zeros((1, 1, DIM))))["params"]
  params["router_norm"]["scale"] = jnp.linspace(0.5, 2.0, E)
  return module, params


def inputs(seed=0, shape=(2, 7)):
  return jax.random.normal(jax.random.key(seed), (*shape, DIM))


def test_output_is_the_sum_over_experts():
  module, p = block()
  x = inputs()
  ours = module.apply({"params": p}, x)
  r = np.maximum(np.asarray(x) @ p["router"]["kernel"], 0)
  a = r / np.sqrt(np.mean(r**2, -1, keepdims=True) + 1e-6) * p["router_norm"]["scale"]
  expected = np.zeros(x.shape)
  for e in range(E):
    hidden = jax.nn.silu(x @ p["up"]["kernel"][:, e * F : (e + 1) * F])
    expected += a[..., e : e + 1] * np.asarray(hidden @ p["down"]["kernel"][e * F : (e + 1) * F])
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_no_active_expert_gives_zero():
  module, p = block()
  p = {**p, "router": {"kernel": -jnp.ones((DIM, E))}}
  x = jnp.ones((1, 2, DIM))
  np.testing.assert_array_equal(module.apply({"params": p}, x), jnp.zeros((1, 2, DIM)))
  grads = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x) ** 2))(p)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("union", [1, 3, 6])
def test_union_of_experts_is_the_dense_layer(union):
  """Whether the experts in use fit in the union or not; with few in use they do fit."""
  module, p = block(union)
  dense, _ = block()
  run = jax.jit(lambda p, x: module.apply({"params": p}, x, method="union"))
  few = {**p, "router": {"kernel": p["router"]["kernel"].at[:, 1:5].set(0.0)}}
  for params in (p, few):
    for shape in ((1, 1), (2, 7)):
      x = inputs(3, shape)
      np.testing.assert_allclose(run(params, x), dense.apply({"params": params}, x), atol=1e-5)


def test_union_reads_only_the_experts_in_use():
  """NaN in every other expert's weights does no harm, as long as the union is large enough."""
  module, p = block(2)
  kernel = p["router"]["kernel"].at[:, jnp.asarray([0, 2, 3, 5])].set(0.0)
  bad = {
    "router": {"kernel": kernel},
    "router_norm": p["router_norm"],
    "up": {"kernel": p["up"]["kernel"].at[:, : 1 * F].set(jnp.nan)},
    "down": {"kernel": p["down"]["kernel"].at[2 * F : 4 * F].set(jnp.nan)},
  }
  good = {**p, "router": {"kernel": kernel}}
  x = inputs(1, (1, 4))
  ours = module.apply({"params": bad}, x, method="union")
  np.testing.assert_allclose(ours, block()[0].apply({"params": good}, x), atol=1e-5)


@functools.cache
def target(union=None, layout="unrolled"):
  layer = LayerConfig(AttentionConfig(2, 1, 8), BlockFFNConfig(E, F, union=union))
  plain = LayerConfig(AttentionConfig(2, 1, 8), MLPConfig(16))
  config = DecoderConfig(
    vocab_size=13, dim=DIM, layers=(layer, plain) * 2, max_length=128, family="jaxdec"
  )
  model = Decoder(config, layout=layout)
  whole = Decoder(config)
  params = nn.unbox(jax.jit(whole.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
  params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)
  return model, stack_layers(params, config) if layout == "scanned" else params


@pytest.mark.parametrize("sampler", [Sampler(), pytest.param(Sampler(1.0), marks=pytest.mark.slow)])
def test_speculation_on_it_is_lossless(sampler):
  """A target that decodes with unions of experts, drafted by its own first layers."""
  model, params = target(union=4)
  dense, _ = target()
  run = functools.partial(
    generate, prompts=[[1, 2, 3], [4]], max_new_tokens=20, sampler=sampler, stop=None
  )
  drafter = EarlyExit(exit=2, num_drafts=3)
  assert run(model, params, drafter=drafter).tokens == run(dense, params).tokens


def test_config_and_layouts():
  model, params = target(union=4)
  fields = config_to_hf(model.config)
  assert fields["layers"][0]["mlp"]["kind"] == "block_ffn"
  assert "kind" not in fields["layers"][1]["mlp"]
  assert config_from_hf(fields) == model.config
  with pytest.raises(UserError, match="no block_ffn layers"):
    config_to_hf(dataclasses.replace(model.config, family="llama"), "llama")
  with pytest.raises(UserError, match=r"union in 1\.\.6"):
    BlockFFNConfig(E, F, union=7)
  scanned, stacked = target(layout="scanned")
  tokens = jnp.asarray([[1, 2, 3, 4]])
  sown = {}
  for name, (m, p) in {"flat": (target()[0], params), "scan": (scanned, stacked)}.items():
    out, kept = m.apply({"params": p}, tokens, mutable=["intermediates"])
    sown[name] = out.logits, router_logits(kept)
  np.testing.assert_allclose(sown["scan"][0], sown["flat"][0], atol=1e-5)
  assert len(sown["scan"][1]) == len(sown["flat"][1]) == 2
  for a, b in zip(sown["scan"][1], sown["flat"][1]):
    np.testing.assert_allclose(a, b, atol=1e-5)
  with pytest.raises(UserError, match="BlockFFN layers"):
    router_logits({})


# The losses.


def ones(shape=(1, 8)):
  return jnp.ones(shape, jnp.int32)


def test_chunk_loss_counts_experts_that_a_chunk_touches():
  idle = -jnp.ones((1, 8, E))
  assert float(chunk_activation(idle, ones() > 0, 4)) == 0.0
  # Constant shares 1/E: 1 - (1 - 1/E)^C, in every chunk.
  even = jnp.ones((1, 8, E))
  expected = 1 - (1 - 1 / E) ** 4
  np.testing.assert_allclose(chunk_activation(even, ones() > 0, 4), expected, rtol=1e-4)
  # A whole share twice, one each chunk: one expert of E is touched for sure.
  single = idle.at[:, jnp.asarray([1, 6]), 2].set(3.0)
  np.testing.assert_allclose(chunk_activation(single, ones() > 0, 4), 1 / E, rtol=1e-4)
  # Padding touches nothing, and chunks of padding alone don't count.
  padded = jnp.concatenate([even, even], axis=1)
  real = jnp.arange(16)[None] < 8
  np.testing.assert_allclose(chunk_activation(padded, real, 4), expected, rtol=1e-4)


def test_shares_sum_to_one_or_zero():
  z = jnp.asarray([[1.0, -2.0, 3.0], [-1.0, -1.0, 0.0]])
  np.testing.assert_allclose(jnp.sum(shares(z), -1), [1.0, 0.0], atol=1e-5)


def test_locality_pulls_neighbours_to_one_side():
  z = 0.01 * jax.random.normal(jax.random.key(0), (1, 2, E))
  gradient = jax.grad(lambda z: activation_locality(z, ones((1, 2))))(z)
  np.testing.assert_array_equal(jnp.sign(gradient[0, 1]), -jnp.sign(z[0, 0]))
  # The earlier one is pushed to the side of the later one: sigmoid(a z_1) - sigmoid(a z_2).
  np.testing.assert_array_equal(jnp.sign(gradient[0, 0]), jnp.sign(z[0, 0] - z[0, 1]))


def test_locality_does_not_cross_documents():
  z = jax.random.normal(jax.random.key(0), (1, 8, E))
  segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]])
  joint = activation_locality(z, segments)
  alone = [activation_locality(z[:, a:b], ones((1, b - a))) for a, b in ((0, 3), (3, 7))]
  np.testing.assert_allclose(joint, (2 * alone[0] + 3 * alone[1]) / 5, rtol=1e-5)


def test_sparsity_metrics_by_hand():
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.normal(size=(2, 9, E)))
  segments = jnp.asarray([[1] * 5 + [2] * 4, [1] * 6 + [0] * 3])
  for n in (1, 3):
    fractions = []
    for row in range(2):
      for s in range(9 - n + 1):
        seg = np.asarray(segments[row, s : s + n])
        if seg[0] > 0 and np.all(seg == seg[0]):
          fractions.append(np.mean(np.all(np.asarray(z[row, s : s + n]) <= 0, axis=0)))
    np.testing.assert_allclose(chunk_sparsity(z, segments, n), np.mean(fractions), rtol=1e-6)
  assert chunk_sparsity(z, segments, 3) <= chunk_sparsity(z, segments, 1)


def test_factor_follows_the_loss():
  def run(losses, warmup=4, period=2):
    schedule = ChunkFactor(0.05, warmup, period)

    def step(state, loss):
      state = schedule.follow(state, loss)
      return state, state.now

    return jax.lax.scan(step, schedule.begin(), jnp.asarray(losses, jnp.float32))[1]

  falling = run([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5])
  np.testing.assert_array_equal(falling[:4], np.float32(0.05))
  np.testing.assert_allclose(falling[4:], [0.05, 0.0375, 0.025, 0.025], rtol=1e-6)
  rising = run([1, 1, 1.001, 1.001, 1.001, 1.001])
  np.testing.assert_allclose(rising[3:5], [0.05 * 1.0125, 0.05 * 1.025], rtol=1e-6)
  bounded = run([1e-3, 1e-3, 1, 1, 1])
  np.testing.assert_allclose(bounded[4], 0.2, rtol=1e-6)
  with pytest.raises(UserError, match="positive factor"):
    ChunkFactor(period=0)


# Training.


def sparse_model(layout="scanned"):
  layer = LayerConfig(AttentionConfig(2, 1, 8), BlockFFNConfig(8, 8))
  config = DecoderConfig(vocab_size=tiny.VOCAB, dim=16, layers=(layer,) * 2, max_length=64)
  return Decoder(config, layout=layout)


def test_task_adds_the_losses_to_the_language_model():
  model, losses = sparse_model(), SparsityLosses(chunk_length=8)
  batch = next(tiny.Batches(rows=2))
  task = LanguageModel(model, sparsity=losses)
  params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
  loss, metrics = jax.jit(task.loss)(params, {}, batch, jax.random.key(0))
  alone = jax.jit(LanguageModel(model).loss)(params, {}, batch, jax.random.key(0))[0]
  extra = 2e-3 * metrics["locality_loss"] + 5e-2 * metrics["chunk_loss"]
  np.testing.assert_allclose(loss, alone + extra, rtol=1e-5)
  np.testing.assert_allclose(metrics["cross_entropy"], alone, rtol=1e-5)
  assert 0 < metrics["cls_8"] <= metrics["tls"] < 1
  # The factor may come with the batch; recomputation changes nothing.
  factor = {**batch, "chunk_factor": jnp.zeros(batch["tokens"].shape)}
  again = LanguageModel(model.clone(remat="full"), sparsity=losses)
  loss, metrics = jax.jit(again.loss)(params, {}, factor, jax.random.key(0))
  np.testing.assert_allclose(loss, alone + 2e-3 * metrics["locality_loss"], rtol=1e-5)
  with pytest.raises(UserError, match="BlockFFN layers"):
    dense = tiny.task(sparsity=losses)
    jax.eval_shape(dense.loss, jax.eval_shape(dense.init, jax.random.key(0)), {}, batch, None)


def by_hand(losses, factor, warmup, period):
  """Factors of the steps with these chunk losses, by the schedule's definition."""
  out, start, end = [factor], factor, factor
  for step in range(1, len(losses)):
    since, now = step - warmup, out[-1]
    if since >= 0 and since % period == 0 and step >= 2 * period:
      before = np.mean(losses[step - 2 * period : step - period])
      rho = np.mean(losses[step - period : step]) / before
      rho = min(max(rho, 1.025) if rho > 1 else rho, 4 * factor / now)
      start, end = now, rho * now
    moved = (since % period + 1) / period if since >= 0 else 0.0
    out.append(start + (end - start) * moved)
  return out


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_trainer_follows_the_loss_and_resumes_to_the_bit(accumulate, tmp_path):
  """Each step weighs by the losses before it; a run broken off between two values goes on alike."""

  class Broken(tiny.Batches):
    def __next__(self):
      if self.index + 1 == self.broken:
        raise OSError("disk gone")
      return super().__next__()

  schedule = ChunkFactor(5e-2, 2, 2)

  def train(folder, broken=None):
    data = Broken(rows=4)
    data.broken = broken
    task = LanguageModel(sparse_model(), sparsity=SparsityLosses(0.0, schedule, chunk_length=8))
    config = tiny.config(folder, steps=9, checkpoint_every=4, accumulate=accumulate)
    return Trainer(task, config, data=data).train().params

  reference = train(tmp_path / "whole")
  rows = list(read_metrics(tmp_path / "whole"))
  losses, factors = ([row[name] for row in rows] for name in ("chunk_loss", "chunk_factor"))
  np.testing.assert_allclose(factors, by_hand(losses, 5e-2, 2, 2), rtol=1e-5)
  assert len(set(factors)) > 4
  terms = [row["cross_entropy"] + f * row["chunk_loss"] for row, f in zip(rows, factors)]
  np.testing.assert_allclose([row["loss"] for row in rows], terms, rtol=1e-5)
  with pytest.raises(OSError, match="disk gone"):
    train(tmp_path / "run", broken=7)
  resumed = train(tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, resumed, reference)
  again = [row["chunk_factor"] for row in read_metrics(tmp_path / "run")]
  assert again == factors


@pytest.mark.slow
def test_losses_make_chunks_sparse():
  """With the losses on, 8 neighbours leave more experts idle, at the same language-model loss."""

  def trained(sparsity):
    task = LanguageModel(sparse_model(), sparsity=sparsity)
    params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch):
      (_, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(params, {}, batch, None)
      updates, state = optimizer.update(grads, state)
      return optax.apply_updates(params, updates), state, metrics

    state, batches = optimizer.init(params), tiny.Batches(rows=16)
    for _ in range(250):
      params, state, metrics = step(params, state, next(batches))
    return {k: float(v) for k, v in metrics.items()}

  off = trained(SparsityLosses(locality=0.0, chunk=0.0, chunk_length=8))
  on = trained(SparsityLosses(locality=2e-3, chunk=5e-2, chunk_length=8))
  assert on["cls_8"] > off["cls_8"] + 0.1
  assert on["cross_entropy"] < off["cross_entropy"] + 0.05
