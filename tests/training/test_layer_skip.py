# SPDX-License-Identifier: Apache-2.0
"""LayerSkip's recipe: the loss of early exits and layer dropout."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.models import Decoder, stack_layers, tiny_llama
from jaxdec.training import LanguageModel
from jaxdec.training.tasks.layer_skip import LayerSkip
from tests.training import tiny

LAYERS = 4


@functools.cache
def task(layout="unrolled", **kwargs):
  config = tiny_llama(
    vocab_size=tiny.VOCAB, dim=16, num_layers=LAYERS, num_heads=2, num_kv_heads=1, head_dim=8,
    hidden_dim=24,
  )  # fmt: skip
  return LanguageModel(Decoder(config, layout=layout), **kwargs)


@functools.cache
def params():
  whole = nn.unbox(jax.jit(task().init)(jax.random.key(0)))
  return jax.tree.map(lambda x: x * 5, whole)


def test_weights_and_rates():
  skip = LayerSkip(scale=0.5, dropout=0.2)
  np.testing.assert_allclose(skip.weights(4), [0, 0.5, 1.5, 3 + 0.5 * 3])
  rates = skip.drop_rates(4)
  np.testing.assert_allclose(rates[[0, 3]], [0, 0.2])
  assert np.all(np.diff(rates) > 0)


@pytest.mark.parametrize("chunk", [None, 8])
def test_loss_weighs_exits_by_depth(chunk):
  """All exits at once: the weighted mean over models cut off after each layer."""
  skip, batch = LayerSkip(scale=0.5, exits=2), next(tiny.Batches(rows=2))
  ours, metrics = jax.jit(task(layer_skip=skip, loss_chunk=chunk).loss)(
    params(), {}, batch, jax.random.key(1)
  )
  losses = []
  for depth in range(2, LAYERS + 1):
    cut = dataclasses.replace(task().model.config, layers=task().model.config.layers[:depth])
    alone = LanguageModel(Decoder(cut))
    losses.append(float(jax.jit(alone.loss)(params(), {}, batch, None)[0]))
  weights = skip.weights(LAYERS)[1:]
  np.testing.assert_allclose(ours, weights @ losses / weights.sum(), rtol=1e-5)
  np.testing.assert_allclose(metrics["cross_entropy"], losses[-1], rtol=1e-5)
  np.testing.assert_allclose(metrics["exit_loss"], np.mean(losses[:-1]), rtol=1e-5)


def test_every_exit_comes_up():
  skip = LayerSkip(scale=0.5)
  draws = [int(skip.draw(jax.random.key(i), 6)[0][0]) for i in range(40)]
  assert set(draws) == {1, 2, 3, 4}
  with pytest.raises(UserError, match="a model of 4 layers has 2"):
    LayerSkip(exits=3).draw(jax.random.key(0), 4)
  with pytest.raises(UserError, match="dropout in"):
    LayerSkip(dropout=1.0)


def test_rows_leave_out_the_layers_they_are_told_to():
  """In both layouts: a row's output is that of a model without the layers it left out."""
  model, tokens = task().model, jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
  keep = jnp.asarray([[1, 1], [0, 1], [1, 1], [1, 0]], bool)
  flat = model.apply({"params": params()}, tokens, keep=keep).logits
  scanned = model.clone(layout="scanned")
  stacked = stack_layers(params(), model.config)
  np.testing.assert_allclose(
    scanned.apply({"params": stacked}, tokens, keep=keep).logits, flat, atol=1e-5
  )
  for row in range(2):
    kept = [i for i in range(LAYERS) if keep[i, row]]
    config = dataclasses.replace(model.config, layers=(model.config.layers[0],) * len(kept))
    rest = {k: v for k, v in params().items() if not k.startswith("layers_")}
    rest |= {f"layers_{new}": params()[f"layers_{old}"] for new, old in enumerate(kept)}
    alone = Decoder(config).apply({"params": rest}, tokens[row : row + 1]).logits
    np.testing.assert_allclose(flat[row], alone[0], atol=1e-5)


def test_dropout_rate_and_evaluation():
  skip = LayerSkip(dropout=0.5)
  keep = skip.keep(jax.random.key(0), LAYERS, 4000)
  np.testing.assert_allclose(1 - jnp.mean(keep, axis=1), skip.drop_rates(LAYERS), atol=0.03)
  # Evaluation drops nothing and counts the last layer only.
  batch, both = next(tiny.Batches(rows=2)), (task(), task(layer_skip=skip))
  plain, ours = (t.evaluate(params(), {}, batch, jax.random.key(0)) for t in both)
  np.testing.assert_allclose(ours["loss"], plain["loss"], rtol=1e-6)
  assert task(layer_skip=skip).config["layer_skip"]["dropout"] == 0.5
