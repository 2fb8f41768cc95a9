# SPDX-License-Identifier: Apache-2.0
"""A hybrid model whose sequences are split computes what one device does, in every layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.mixers import AttentionConfig, LinearAttentionConfig, RopeConfig
from jaxdec.models import Decoder, DecoderConfig
from jaxdec.models.config import LayerConfig, MLPConfig
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.training import LanguageModel, MeshConfig, Trainer, read_metrics
from tests.training import tiny

MIXERS = (
  LinearAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, decay="data", rope=RopeConfig()),
  AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
)
CASES = {
  "lasp2": (MeshConfig(seq=4), SequenceConfig()),
  "ring": (MeshConfig(seq=2, tensor=2, fsdp=2), SequenceConfig(linear="scan", attention="ring")),
  "zigzag": (
    MeshConfig(data=2, seq=4),
    SequenceConfig(linear="gather", attention="allgather", layout="zigzag"),
  ),
  "ulysses": (
    MeshConfig(data=2, seq=2),
    SequenceConfig(linear="chain", attention="ulysses", layout="zigzag"),
  ),
}


def task(sequence=None, layout="unrolled", **kwargs):
  layers = tuple(LayerConfig(mixer, MLPConfig(64)) for mixer in MIXERS)
  config = DecoderConfig(vocab_size=tiny.VOCAB, dim=32, layers=layers, tie_embeddings=True)
  return LanguageModel(Decoder(config, layout=layout, sequence=sequence, **kwargs))


def loss_and_gradients(mesh, sequence=None, layout="unrolled"):
  trainer = Trainer(task(sequence, layout), tiny.config(None, mesh=mesh), data=tiny.Batches())
  params = trainer.init_state().params
  batch = trainer.place_batch(next(tiny.Batches()))
  with trainer._context():
    loss, metrics, gradients = jax.jit(trainer._gradients)(params, {}, batch, jax.random.key(0))
  return float(loss), jax.device_get((metrics, gradients))


@pytest.fixture(scope="module")
def single():
  return loss_and_gradients(MeshConfig())


@pytest.mark.parametrize(
  "case",
  ["lasp2", "zigzag", *(pytest.param(c, marks=pytest.mark.slow) for c in ("ring", "ulysses"))],
)
def test_split_sequences_equal_one_device(single, case):
  """Packed documents straddle the shards, rows end in padding, labels cross every border."""
  loss, (metrics, gradients) = loss_and_gradients(*CASES[case])
  np.testing.assert_allclose(loss, single[0], rtol=1e-6)
  np.testing.assert_allclose(metrics["weight"], single[1][0]["weight"])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradients, single[1][1]
  )


def test_a_wrong_neighbour_shows():
  """Control: shards in the wrong order change the loss by far more than rounding."""
  mesh, sequence = CASES["lasp2"]
  trainer = Trainer(task(sequence), tiny.config(None, mesh=mesh), data=tiny.Batches())
  params = trainer.init_state().params
  batch = next(tiny.Batches())
  shifted = {name: np.roll(x, tiny.LENGTH // 4, axis=1) for name, x in batch.items()}
  losses = []
  with trainer._context():
    loss = jax.jit(lambda p, b: trainer.task.loss(p, {}, b, None)[0])
    for rows in (batch, shifted):
      losses.append(float(loss(params, trainer.place_batch(rows))))
  assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.slow
def test_training_on_split_sequences_follows_one_device_and_resumes_elsewhere(tmp_path):
  """A zigzag run on 2 x 4 devices, continued with contiguous shards on 4, is the plain run."""

  class Stops(tiny.Batches):
    def __next__(self):
      if self.index == 4:
        raise OSError("preempted")
      return super().__next__()

  def train(folder, case=None, data=None):
    mesh, sequence = CASES[case] if case else (MeshConfig(), None)
    config = tiny.config(folder, steps=6, checkpoint_every=3, mesh=mesh)
    return Trainer(task(sequence, "scanned"), config, data=data or tiny.Batches()).train()

  one = train(tmp_path / "one")
  with pytest.raises(OSError, match="preempted"):
    train(tmp_path / "split", "zigzag", Stops())
  split = train(tmp_path / "split", "lasp2")
  losses = [[row["loss"] for row in read_metrics(tmp_path / f)] for f in ("one", "split")]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  # As a whole: Adam turns rounding into a step of its own where a gradient is nearly zero.
  for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(split.params)):
    x, y = np.asarray(x), np.asarray(y)
    assert np.linalg.norm(x - y) <= 2e-3 * np.linalg.norm(y)


def test_what_does_not_fit_is_refused_before_compilation():
  mesh = MeshConfig(seq=4)
  with pytest.raises(UserError, match=r"over 4 devices, and the model has no sequence-parallel"):
    Trainer(task(), tiny.config(None, mesh=mesh), data=tiny.Batches())
  trainer = Trainer(task(SequenceConfig()), tiny.config(None, mesh=mesh), data=tiny.Batches())
  with pytest.raises(UserError, match=r"sequences of 18 tokens.*mesh axis seq of size 4"):
    trainer.compile({"tokens": np.zeros((8, 18), np.int32)})
  with pytest.raises(UserError, match=r"linear='gathr' \(did you mean 'gather'\?\) is not one of"):
    SequenceConfig(linear="gathr")


def test_without_a_mesh_nothing_changes():
  """The attribute alone adds nothing to the program."""
  plain, split = task(), task(SequenceConfig())
  params = jax.eval_shape(plain.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  texts = [
    jax.jit(lambda p, t, m=x.model: m.apply({"params": p}, t).logits)
    .lower(params, tokens)
    .as_text()
    for x in (plain, split)
  ]
  assert texts[0] == texts[1]
