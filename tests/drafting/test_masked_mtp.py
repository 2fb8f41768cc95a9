# SPDX-License-Identifier: Apache-2.0
"""Masked multi-token prediction: the gate, the sampler head, latent consistency, decoding modes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probing import Probing, hybrid
from toy_target import (
  VOCAB,
  batch_of,
  greedy_text,
  init,
  overfit_batch,
  random_batch,
  randomized,
  replace,
  run,
  target,
  train,
)
from universal import SAMPLERS, plain

from jaxdec.decoding import generate
from jaxdec.drafting.masked_mtp import MaskedMTP, dense_layers, gated_lora
from jaxdec.drafting.objectives import Term
from jaxdec.drafting.ppd import PPD
from jaxdec.drafting.probes import text_topology
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.errors import UserError
from jaxdec.training.tasks.distill import best_tree
from pallas_kernels.testing import COMPILE_ONCE


class TestMaskedMTP(Probing):
  kind = MaskedMTP
  options = {"anchors": None, "rank": 4}  # noqa: RUF012
  overfit_options = {"objective": "hard", "rank": 16}  # noqa: RUF012
  steps = 150


def masked(t, **options):
  return MaskedMTP.for_target(
    t.model.config, **{"anchors": None, "rank": 4, "num_heads": 3, **options}
  )


def test_every_dense_layer_of_the_blocks_is_adapted():
  assert len(dense_layers(target())) == 3 * 7
  names = {path[-1] for path in dense_layers(hybrid())}
  assert {"q", "k", "v", "o", "gate", "up", "down"} <= names
  params = init(masked(target()), target())
  assert params["masks"].shape == (3, 32)
  assert params["lora"]["layers_1"]["mlp"]["down"]["a"].shape == (48, 4)
  assert "head" not in params["lora"]


def test_rows_that_are_no_masks_are_bitwise_what_they_were():
  t = target()
  batch = random_batch(0, rows=2, length=9)
  lora = randomized(init(masked(t), t), scale=2.0)["lora"]

  def hidden(nodes):
    def read(lora):
      state = t.model.init_state(2, 1)
      args = batch["tokens"], state, text_topology(batch)
      if nodes is None:
        return t.model.apply({"params": t.params}, *args, method="verify").hidden
      with gated_lora(lora, nodes, 1.0):
        return t.model.apply({"params": t.params}, *args, method="verify").hidden

    return jax.jit(read)(lora)

  plain_states, gated = hidden(None), hidden(9)
  np.testing.assert_array_equal(gated, plain_states)
  last = hidden(8)
  np.testing.assert_array_equal(last[:, :8], plain_states[:, :8])
  assert np.max(np.abs(last[:, 8] - plain_states[:, 8])) > 1e-2


def test_masks_start_as_prompt_tokens():
  """B = 0: without its low-rank part a mask is a prompt token of PPD."""
  t = target()
  drafter = masked(t)
  params = init(drafter, t)
  batch = random_batch(1, rows=1, length=9)
  slots = jnp.arange(6)[None]

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def both(params):
    prompts = PPD.for_target(t.model.config, num_heads=3, anchors=None)
    return (
      drafter.forced(params, t, batch, slots),
      prompts.forced({"prompts": params["masks"][:, None]}, t, batch, slots),
    )

  ours, theirs = both(params)
  for key, x in ours.items():
    np.testing.assert_allclose(x, theirs[key], atol=1e-5)
  ours, theirs = both(randomized(params))
  assert max(float(np.max(np.abs(ours[k] - theirs[k]))) for k in ours) > 1e-2


def test_objective_is_the_sum_of_its_terms():
  """Sampler, base law and consistency; the last pulls masks, never the target's states."""
  t = target()
  batch = random_batch(2, rows=2, length=10)
  output = run(t, batch)
  params = randomized(init(masked(t), t))
  terms = {name: masked(t, objective=name) for name in ("hard", "base", "mse")}

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def values(params, output):
    out = {name: d.loss(params, t, output, batch)[0] for name, d in terms.items()}
    return out, masked(t).loss(params, t, output, batch)[0]

  parts, whole = values(params, output)
  assert float(whole) == pytest.approx(sum(float(x) for x in parts.values()), rel=1e-5)

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def gradients(params, hidden):
    def loss(params, hidden):
      drafter = masked(t, objective=(Term("mse"),))
      return drafter.loss(params, t, output.replace(hidden=hidden), batch)[0]

    return jax.grad(loss, argnums=(0, 1))(params, hidden)

  ours, anchor = gradients(params, output.hidden)
  assert not np.any(anchor)
  assert np.any(ours["masks"]) and np.any(ours["lora"]["layers_0"]["mixer"]["q"]["b"])
  assert not any(np.any(x) for x in jax.tree.leaves(ours["sampler"]))


@pytest.mark.parametrize("sampler", ["greedy", "sampled"])
def test_linear_decoding_is_lossless(sampler):
  t = target()
  drafter = masked(t, decoding="linear")
  params = randomized(init(drafter, t), scale=0.5)
  prompts = ((1, 2, 3, 4, 5), (6, 7), (8, 9, 10))
  out = generate(
    t.model, t.params, [list(p) for p in prompts], max_new_tokens=20, drafter=drafter,
    drafter_params=params, sampler=SAMPLERS[sampler], stop=None, seed=5,
  )  # fmt: skip
  assert out.tokens == plain(sampler, prompts, 20)


@pytest.mark.slow
def test_quadratic_decoding_is_never_worse_on_average():
  """Equal where all drafts are right; ahead where some are not. Same output throughout."""
  t = target(seed=1)
  text = greedy_text(t, range(1, 9), 96)
  batch = overfit_batch(text)
  for steps, learned in ((150, True), (30, False)):
    drafter = masked(t, objective="hard", rank=16, anchors=32)
    params, _ = train(drafter, t, batch, steps)
    prompts = [
      [int(x) for x in text[at : at + 8]] for at in ((0,) if learned else range(0, 80, 10))
    ]
    found = {}
    for decoding in ("quadratic", "linear"):
      used = replace(drafter, decoding=decoding)
      found[decoding] = generate(
        t.model, t.params, prompts, max_new_tokens=88, drafter=used, drafter_params=params,
        stop=None,
      )  # fmt: skip
    assert found["quadratic"].tokens == found["linear"].tokens
    quadratic, linear = (found[name].stats.tokens_per_step for name in ("quadratic", "linear"))
    if learned:
      assert quadratic == linear > 3.8
    else:
      assert 1.05 < linear < quadratic < 3.8


def test_errors_say_what_to_change():
  t = target()
  with pytest.raises(UserError, match="linear decoding drafts a chain"):
    masked(t, decoding="linear", tree=StaticTree.from_paths([(0,), (1,)]))
  with pytest.raises(UserError, match="'quadratic' or 'linear', got 'cubic'"):
    masked(t, decoding="cubic")
  batch = batch_of(np.zeros((1, 4), int) + VOCAB - 1)
  with pytest.raises(UserError, match="too short to train 3"):
    masked(t).loss(init(masked(t), t), t, run(t, batch), batch)


def test_linear_decoding_keeps_its_chain_after_training():
  table = np.full((3, 10), 0.09)
  assert best_tree(masked(target(), decoding="linear"), table, 8) is None
  assert best_tree(masked(target()), table, 8).num_nodes == 8
