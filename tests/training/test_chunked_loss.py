# SPDX-License-Identifier: Apache-2.0
"""A loss whose logits exist a few tokens at a time is the plain loss, gradients included."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.models import Decoder, tiny_llama
from jaxdec.parallel import make_mesh, rules
from jaxdec.training import LanguageModel

LENGTH, VOCABULARY = 32, 64


def model(tied):
  return Decoder(
    tiny_llama(
      vocab_size=VOCABULARY, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
      hidden_dim=16, tie_embeddings=tied, logit_cap=5.0,
    )
  )  # fmt: skip


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCABULARY, (4, LENGTH)).astype(np.int32)
  segments = np.where(np.arange(LENGTH) < 20, 1, 2).astype(np.int32)[None].repeat(4, 0)
  segments[0, -5:] = 0  # padding
  return {"tokens": tokens, "segment_ids": segments, "loss_mask": segments > 0}


def run(batch, tied, chunk, mesh=None):
  task = LanguageModel(model(tied), z_loss=0.01, loss_chunk=chunk)
  params = nn.unbox(task.init(jax.random.key(0)))
  grad = jax.jit(jax.value_and_grad(lambda p, b: task.loss(p, {}, b, None), has_aux=True))
  if mesh is None:
    return grad(params, batch)
  boxed = jax.eval_shape(task.init, jax.random.key(0))
  params = jax.device_put(params, rules.shardings(boxed, rules.DEFAULT, mesh))
  placed = {
    k: jax.device_put(v, rules.batch_sharding(mesh, rules.DEFAULT)) for k, v in batch.items()
  }
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules.DEFAULT.flax()):
    return grad(params, placed)


def agree(one, other):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), one, other)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 8, 100])
def test_equals_the_plain_loss(batch, tied, chunk):
  agree(run(batch, tied, chunk), run(batch, tied, None))


@pytest.mark.parametrize("tied", [True, False])
def test_split_batch_length_vocabulary_and_width(batch, tied):
  """The vocabulary lies over tensor, the head's width over fsdp, the tokens over all axes."""
  mesh = make_mesh(fsdp=2, tensor=2, seq=2)
  agree(run(batch, tied, 4, mesh), run(batch, tied, None))


def test_no_array_of_all_logits(batch):
  """Compiled for longer rows, no buffer has the size of all logits; with the plain loss one has."""

  def largest(chunk):
    task = LanguageModel(model(True), loss_chunk=chunk)
    params = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    tokens = {"tokens": jax.ShapeDtypeStruct((1, 4096), jnp.int32)}
    step = jax.jit(jax.grad(lambda p, b: task.loss(p, {}, b, None)[0]))
    return step.lower(params, tokens).as_text().count(f"tensor<1x4096x{VOCABULARY}xf32>")

  assert largest(128) == 0 < largest(None)


def test_a_wrong_head_shows(batch):
  """Control: the check would see a loss of other logits."""
  (loss, _), _ = run(batch, True, 8)
  (other, _), _ = run({**batch, "tokens": batch["tokens"][:, ::-1].copy()}, True, 8)
  assert abs(float(loss - other)) > 1e-4
