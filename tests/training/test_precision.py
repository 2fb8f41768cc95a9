# SPDX-License-Identifier: Apache-2.0
"""Three types: of parameters, of computation, of gradients and moments. Each is worth its bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.models import Decoder, tiny_llama
from jaxdec.training import LanguageModel, OptimizerConfig, Trainer, TrainerConfig
from jaxdec.training.gradients import loss_and_gradients
from tests.training import tiny

HALF = jnp.bfloat16
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)


def train(grad_dtype="float32", **types):
  """Losses of 24 steps, and the last state."""
  config = tiny_llama(
    vocab_size=tiny.VOCAB, dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    hidden_dim=64,
  )  # fmt: skip
  task = LanguageModel(Decoder(config, **types))
  settings = TrainerConfig(steps=24, grad_dtype=grad_dtype, optimizer=OPTIMIZER, progress=False)
  run, data, losses = Trainer(task, settings, data=tiny.Batches()), tiny.Batches(), []
  step, state = run.compile(next(tiny.Batches())), run.init_state()
  for _ in range(settings.steps):
    state, metrics = step(state, {}, run.place_batch(next(data)))
    losses.append(float(metrics["loss"]))
  return np.array(losses), state


def types_of(tree):
  return {x.dtype.name for x in jax.tree.leaves(tree) if x.ndim}


@pytest.mark.slow
def test_half_computation_follows_float32_and_half_parameters_do_not():
  whole, _ = train()
  assert whole[-1] < 0.95 * whole[0]
  mixed, state = train(dtype=HALF)
  assert types_of(state.params) == types_of(state.optimizer) == {"float32"}
  half, state = train(dtype=HALF, param_dtype=HALF)
  assert types_of(state.params) == {"bfloat16"}
  assert types_of(state.optimizer) == {"float32"}  # wider than the parameters
  off, far = (np.max(np.abs(x - whole) / whole) for x in (mixed, half))
  assert off < 1e-3
  assert far > 10 * off


def test_half_gradients_halve_the_moments():
  run = Trainer(tiny.task(), tiny.config(None, grad_dtype="bfloat16"), data=tiny.Batches())
  assert types_of(run.abstract.optimizer) == {"bfloat16"}
  assert types_of(run.abstract.params) == {"float32"}


def test_sums_over_slices_need_float32():
  """16 slices of a linear loss: exact in float32, up to 1 in 256 off in bfloat16."""
  x = np.random.default_rng(0).standard_normal((32, 64), np.float32) + 1.0

  def loss(params, frozen, batch, key):
    return jnp.mean(batch["x"] @ params["w"]), {}

  def gradient(slices, grad_dtype):
    args = ({"w": jnp.ones(64)}, {}, {"x": x}, jax.random.key(0))
    found = loss_and_gradients(loss, *args, slices=slices, grad_dtype=grad_dtype)[2]["w"]
    assert found.dtype == grad_dtype
    return np.asarray(found, np.float64)

  expected = x.mean(0, np.float64)
  errors = {
    kind: np.linalg.norm(gradient(16, kind) - expected) / np.linalg.norm(expected)
    for kind in ("float32", "bfloat16")
  }
  assert errors["float32"] < 1e-6
  assert errors["bfloat16"] > 1e-3


def test_wide_parameters_keep_wide_gradients():
  with jax.enable_x64():
    params = {"w": jnp.ones(3, jnp.float64)}
    found = loss_and_gradients(
      lambda p, *_: (jnp.sum(p["w"]), {}), params, {}, {"x": np.ones((2, 1))}, None
    )
    assert found[2]["w"].dtype == jnp.float64


def test_unknown_type_is_refused():
  with pytest.raises(UserError, match="grad_dtype must be one of float32, bfloat16, got 'half'"):
    TrainerConfig(grad_dtype="half")
