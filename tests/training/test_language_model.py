# SPDX-License-Identifier: Apache-2.0
"""The language-modelling loss against a loop over tokens, and its evaluation numbers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.models import stack_layers
from jaxdec.training.tasks.language_model import next_token_targets
from tests.training import tiny


def setup(**kwargs):
  task = tiny.task(**kwargs)
  params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
  # Larger weights than at initialisation: a nearly uniform output would hide mistakes.
  params = jax.tree.map(lambda x: np.asarray(x) * 5, params)
  return task, params, next(tiny.Batches(rows=4))


def loss_of(task, params, batch):
  return jax.jit(task.loss)(params, {}, batch, jax.random.key(0))


def by_hand(task, params, batch):
  """Mean over labelled tokens, one document at a time, without packing."""
  apply = jax.jit(lambda tokens: task.model.apply({"params": params}, tokens).logits[0])
  total = correct = count = 0.0
  for row in range(batch["tokens"].shape[0]):
    for segment in (1, 2):
      at = np.flatnonzero(np.asarray(batch["segment_ids"][row]) == segment)
      document = batch["tokens"][row][at][None]
      logits = np.asarray(apply(document), np.float64)
      log_probs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
      for t in range(len(at) - 1):
        if batch["loss_mask"][row, at[t + 1]]:
          label = int(document[0, t + 1])
          total -= log_probs[t, label]
          correct += np.argmax(logits[t]) == label
          count += 1
  return total / count, correct / count, count


def test_loss_equals_unpacked_documents():
  task, params, batch = setup()
  batch["loss_mask"][:, 3] = False
  loss, metrics = loss_of(task, params, batch)
  expected, accuracy, count = by_hand(task, params, batch)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
  assert float(metrics["weight"]) == count


def test_targets_stop_at_borders():
  batch = {
    "tokens": jnp.array([[5, 6, 7, 8, 9, 0]]),
    "segment_ids": jnp.array([[1, 1, 2, 2, 2, 0]]),
    "loss_mask": jnp.array([[1, 1, 1, 0, 1, 1]]),
  }
  labels, weights = next_token_targets(batch)
  assert labels[0, :5].tolist() == [6, 7, 8, 9, 0]
  # 6 -> 7 crosses a border, 8 is masked as a label, 9 -> padding.
  assert weights[0].tolist() == [1, 0, 0, 1, 0, 0]
  assert next_token_targets({"tokens": batch["tokens"]})[1][0].tolist() == [1, 1, 1, 1, 1, 0]


def test_nothing_labelled_gives_zero_not_nan():
  task, params, batch = setup()
  batch["loss_mask"][:] = False
  grad = jax.jit(jax.value_and_grad(lambda p: task.loss(p, {}, batch, None)[0]))
  loss, gradients = grad(params)
  assert float(loss) == 0.0
  assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(gradients))


def test_layouts_agree():
  task, params, batch = setup()
  stacked = stack_layers(params, task.model.config)
  loss, _ = loss_of(task, params, batch)
  other, _ = loss_of(tiny.task("scanned"), stacked, batch)
  np.testing.assert_allclose(loss, other, rtol=1e-6)


def test_z_loss_adds_the_squared_normalizer():
  task, params, batch = setup(z_loss=0.01)
  loss, metrics = loss_of(task, params, batch)
  plain, _ = loss_of(tiny.task(), params, batch)
  np.testing.assert_allclose(metrics["cross_entropy"], plain, rtol=1e-6)
  inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
  logits = jax.jit(lambda *x: task.model.apply({"params": params}, *x).logits)(*inputs)
  _, mask = next_token_targets(batch)
  squares = jnp.square(jax.nn.logsumexp(logits, -1))
  expected = plain + 0.01 * jnp.sum(squares * mask) / jnp.sum(mask)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_bits_per_byte():
  sizes = np.arange(tiny.VOCAB) % 5 + 1
  task, params, batch = setup(token_bytes=sizes)
  metrics = jax.device_get(jax.jit(task.evaluate)(params, {}, batch, jax.random.key(0)))
  labels, mask = next_token_targets(batch)
  total_bytes = float(np.sum(sizes[np.asarray(labels)] * np.asarray(mask)))
  nats = float(metrics["loss"]) * float(metrics["weight"])
  bits = task.summarize(metrics)["bits_per_byte"]
  np.testing.assert_allclose(bits, nats / np.log(2) / total_bytes, rtol=1e-6)
