# SPDX-License-Identifier: Apache-2.0
"""Sharded loss and gradients equal those of one device, and a whole run does too."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.models import Decoder, tiny_llama
from jaxdec.training import LanguageModel, MeshConfig, Trainer, read_metrics
from tests.training import tiny

LAYOUTS = ("unrolled", "scanned")
MESHES = (
  MeshConfig(data=2, fsdp=2, tensor=2),
  MeshConfig(data=8),
  MeshConfig(fsdp=4, tensor=2),
)


def loss_and_gradients(layout, mesh):
  trainer = Trainer(tiny.task(layout), tiny.config(None, mesh=mesh), data=tiny.Batches())
  state = trainer.init_state()
  batch = trainer.place_batch(next(tiny.Batches()))
  with trainer._context():
    loss, _, gradients = jax.jit(trainer._gradients)(state.params, {}, batch, jax.random.key(0))
  return state, float(loss), jax.device_get(gradients)


@pytest.fixture(scope="module", params=LAYOUTS)
def single(request):
  return request.param, *loss_and_gradients(request.param, MeshConfig())


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"d{m.data}f{m.fsdp}t{m.tensor}")
def test_sharded_equals_single_device(single, mesh):
  layout, state, loss, gradients = single
  sharded, sharded_loss, sharded_gradients = loss_and_gradients(layout, mesh)
  np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
  jax.tree.map(
    # Only the order of float32 sums differs.
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    sharded_gradients,
    gradients,
  )
  for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(sharded.params)):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6, atol=1e-7)
  split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(sharded.params))
  assert (split > 0) == (mesh.fsdp * mesh.tensor > 1)


def test_parameters_and_moments_are_really_split():
  trainer = Trainer(
    tiny.task("scanned"), tiny.config(None, "muon", mesh=MESHES[0]), data=tiny.Batches()
  )
  state = trainer.init_state()
  kernel = state.params["stack"]["block_0"]["mlp"]["gate"]["kernel"]
  assert kernel.shape == (2, 32, 64)
  assert kernel.addressable_shards[0].data.shape == (2, 16, 32)
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
    if "gate" in str(path) and leaf.shape == kernel.shape
  ]
  assert moments and all(m.sharding == kernel.sharding for m in moments)


def test_trainer_on_a_mesh_and_resumed_on_another(tmp_path):
  """Training on 2 x 2 x 2 devices follows one device; a checkpoint moves between meshes."""

  def train(folder, mesh, steps=6, data=None):
    config = tiny.config(folder, "muon", steps=steps, checkpoint_every=3, mesh=mesh)
    return Trainer(tiny.task("scanned"), config, data=data or tiny.Batches()).train()

  class Stops(tiny.Batches):
    def __next__(self):
      if self.index == 4:
        raise OSError("preempted")
      return super().__next__()

  one = train(tmp_path / "one", MeshConfig())
  with pytest.raises(OSError, match="preempted"):
    train(tmp_path / "eight", MESHES[0], data=Stops())
  eight = train(tmp_path / "eight", MESHES[2])
  assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(eight.params))
  a, b = ([r["loss"] for r in read_metrics(tmp_path / f)] for f in ("one", "eight"))
  assert len(a) == len(b) == 6
  np.testing.assert_allclose(a, b, rtol=1e-4)
  for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params)):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-3, atol=2e-4)


def test_model_that_does_not_divide_is_refused_before_compilation():
  config = tiny_llama(
    vocab_size=64, dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=36
  )
  settings = tiny.config(None, mesh=MeshConfig(tensor=8))
  with pytest.raises(
    UserError, match=r"layers_0/mlp/\w+/kernel: dimension . \('mlp'\) has size 36"
  ):
    Trainer(LanguageModel(Decoder(config)), settings, data=tiny.Batches())
