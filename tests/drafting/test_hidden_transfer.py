# SPDX-License-Identifier: Apache-2.0
"""Hidden Transfer: pseudo states in the upper layers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lookahead import accuracy, counting, counting_target
from probing import Probing, started
from toy_target import VOCAB, init, random_batch, randomized, run, target, train

from jaxdec.drafting.hidden_transfer import HiddenTransfer
from jaxdec.errors import UserError
from jaxdec.mixers.base import gather_nodes
from jaxdec.models.config import tiny_llama
from pallas_kernels.testing import COMPILE_ONCE


class TestHiddenTransfer(Probing):
  kind = HiddenTransfer
  options = {"anchors": None, "layers": (1, 1, 2)}  # noqa: RUF012
  overfit_options = {"objective": "hard", "layers": (1, 1, 1)}  # noqa: RUF012
  steps, learning_rate = 150, 3e-2
  reached = 0.8  # a linear map is all there is


def transfer(t, **options):
  return HiddenTransfer.for_target(
    t.model.config, **{"anchors": None, "layers": (1, 1, 2), **options}
  )


def test_layers_follow_the_depth_of_the_target():
  def layers(depth, **options):
    return HiddenTransfer.for_target(tiny_llama(num_layers=depth), **options).layers

  assert layers(32) == (24, 25, 26)
  assert layers(6) == (4, 5, 5)
  assert layers(64, num_heads=2) == (48, 50)
  params = init(transfer(target()), target())
  assert {k: x.shape for k, x in params.items()} == {f"map_{i}": (32, 32) for i in (1, 2, 3)}


def test_true_states_in_place_of_pseudo_ones_give_the_targets_own_law():
  """Layers, positions and what is seen: a probe that starts as ``h_{t+i}`` ends as it."""
  t = target()

  class Oracle(HiddenTransfer):
    def rows(self, params, layer, x, probes, before):
      new = []
      for i, at in enumerate(self.layers, 1):
        if at == layer:
          here = slice(sum(probes.counts[: i - 1]), sum(probes.counts[:i]))
          true = jnp.minimum(probes.anchor[:, here] + i, 11)
          new.append(gather_nodes(x, true))
      return jnp.concatenate(new, axis=1) if new else None

  plain = transfer(t)
  drafter = Oracle(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})
  batch = random_batch(0, rows=2, length=12)
  output = run(t, batch)

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def metrics(params, output):
    return drafter.loss(params, t, output, batch)[1]

  found = metrics(init(plain, t), output)
  np.testing.assert_array_equal(found["top1"], np.ones(3))
  np.testing.assert_allclose(found["depth_loss"], np.zeros(3), atol=1e-5)
  np.testing.assert_allclose(found["overlap"], np.ones(3), atol=1e-4)


def test_each_map_learns_from_its_own_depth_alone():
  """All at once gives each map the gradient of its own stage, maps before it fixed."""
  t = target()
  batch = random_batch(1, rows=2, length=12)
  output = run(t, batch)
  params = randomized(init(transfer(t), t), scale=0.2)

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def gradients(params, output):
    return [
      jax.grad(lambda p, s=stage: transfer(t, stage=s).loss(p, t, output, batch)[0])(params)
      for stage in (None, 1, 2, 3)
    ]

  together, *stages = gradients(params, output)
  for i, alone in enumerate(stages, 1):
    for j in (1, 2, 3):
      if i == j:
        assert np.max(np.abs(alone[f"map_{j}"])) > 1e-3
        np.testing.assert_allclose(alone[f"map_{j}"], together[f"map_{j}"], atol=1e-5, rtol=1e-4)
      else:
        assert not np.any(alone[f"map_{j}"])


@pytest.mark.parametrize("linked", [True, False])
def test_pseudo_states_see_the_ones_before_them(linked):
  """The ablation: each on its own, where the first is what it is with the link."""
  t = target()
  drafter = transfer(t, linked=linked)
  batch = random_batch(2, rows=1, length=10)
  params = randomized(init(drafter, t), scale=0.2)

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def forced(params):
    return drafter.forced(params, t, batch, jnp.arange(6)[None])

  before = forced(params)
  for i in (1, 2, 3):
    after = forced({**params, f"map_{i}": -params[f"map_{i}"]})
    for (offset, member), hidden in before.items():
      changed = np.max(np.abs(hidden - after[offset, member]), axis=(0, 2))
      sees = offset >= i if linked else offset == i
      assert np.all(changed > 1e-4) if sees else not np.any(changed)
  if not linked:
    other = jax.jit(lambda p: transfer(t).forced(p, t, batch, jnp.arange(6)[None]))(params)
    np.testing.assert_allclose(before[1, 0], other[1, 0], atol=1e-5)


@pytest.mark.slow
def test_without_the_link_decoding_is_training_too():
  check = TestHiddenTransfer()
  drafter = transfer(target(), linked=False)
  params = check.params(drafter)
  check.check_parity(drafter, target(), params)
  check.check_state(drafter, target(), params)


@pytest.mark.slow
def test_maps_learn_to_look_ahead():
  """From a start that is never right, on texts that count."""
  t = counting_target(hidden=0.3)
  drafter = transfer(t, layers=(1, 1, 1))
  assert np.max(accuracy(drafter, init(drafter, t), t)) <= 0.1
  learned, _ = train(drafter, t, counting, 150, 1e-2)
  assert np.all(accuracy(drafter, learned, t) >= 0.9)


def test_lower_layers_never_compute_pseudo_states():
  t = target()
  drafter = transfer(t)
  params = randomized(init(drafter, t))
  text = np.random.default_rng(0).integers(0, VOCAB, (1, 8))
  state, context = started(drafter, params, t, text, [6])

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def pending(params, state, context):
    tree, _ = drafter.propose(params, state, context, jax.random.key(0))
    return drafter.verify(params, tree, context).pending

  rows = [layer.k.shape[2] for layer in pending(params, state, context)]
  assert rows == [4, 4 + 2 * 4, 4 + 3 * 4]  # nodes, then two offsets behind each, then three


def test_errors_say_what_to_change():
  t = target()
  with pytest.raises(UserError, match="layers 0 to 2, but hidden_transfer reads"):
    transfer(t, layers=(1, 2, 3))
  with pytest.raises(UserError, match="3 numbers that don't fall"):
    transfer(t, layers=(2, 1, 1))
  with pytest.raises(UserError, match="stage must be a draft, 1 to 3"):
    transfer(t, stage=4)
