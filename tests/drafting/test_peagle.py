# SPDX-License-Identifier: Apache-2.0
"""P-EAGLE: chains in one pass; what a node sees; COD sampling."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import random_batch, run, target
from universal import Universal

from jaxdec.drafting.base import Target
from jaxdec.drafting.peagle import PEagle
from jaxdec.errors import UserError
from pallas_kernels.testing import COMPILE_ONCE


class TestPEagle(Universal):
  kind = PEagle
  options = {"num_layers": 2}  # noqa: RUF012


def chosen(drafter, rng, batch):
  """What is learned at each depth."""
  t = target()
  output = run(t, batch, drafter.capture)
  return _chosen(drafter, TestPEagle.params(drafter), t.params, output, batch, rng)


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILE_ONCE)
def _chosen(drafter, params, target_params, output, batch, rng):
  t = Target(target().model, target_params, None)
  return list(drafter.examples(params, t, output, batch, rng))


def test_sampled_chains_are_those_of_the_whole_grid():
  """A kept node's state is what it is when nothing is dropped, in packed rows too."""
  drafter = TestPEagle.make(num_heads=4)
  batch = random_batch(0, rows=2, length=24)
  batch["segment_ids"] = batch["segment_ids"].at[1, 10:].set(2)
  everything = chosen(drafter, None, batch)
  some = chosen(drafter, jax.random.key(0), batch)
  for whole, part in zip(everything, some):
    for row in range(2):
      table = {x.tobytes(): i for i, x in enumerate(np.asarray(whole.hidden[row]))}
      for i in np.flatnonzero(part.weights[row]):
        slot = table[np.asarray(part.hidden[row, i]).tobytes()]
        np.testing.assert_allclose(part.states[row, i], whole.states[row, slot], atol=3e-5)
        assert part.labels[row, i] == whole.labels[row, slot] and whole.weights[row, slot] == 1


def test_cod_keeps_nested_chains_of_slots_that_count():
  """``int((m - j) max(r^j, 0.2))`` chains of depth j, each kept at depth j - 1."""
  drafter = TestPEagle.make(num_heads=4, num_layers=1, keep=0.5)
  batch = random_batch(1, rows=2, length=40)
  batch["loss_mask"] = batch["loss_mask"].at[0, :20].set(0)
  examples = chosen(drafter, jax.random.key(1), batch)
  assert [e.labels.shape[1] for e in examples] == [38, int(37 * 0.5), int(36 * 0.25), int(35 * 0.2)]
  for row, m in ((0, 20), (1, 38)):
    assert float(jnp.sum(examples[0].weights[row])) == m
    for j, e in enumerate(examples[1:], 1):
      kept = float(jnp.sum(e.weights[row]))
      most = int((m - j) * max(0.5**j, 0.2))
      # Chains that end before depth j have no label there.
      assert most - j <= kept <= most
  deeper, before = examples[2], examples[1]
  labels = {tuple(x) for x in np.asarray(before.hidden[1])}
  assert len(labels) == before.hidden.shape[1]  # no slot twice
  draws = [np.asarray(chosen(drafter, jax.random.key(i), batch)[1].labels) for i in (1, 2)]
  assert np.any(draws[0] != draws[1])
  assert deeper.labels.shape[1] < before.labels.shape[1]


def test_a_masked_node_knows_its_slot_and_nothing_later():
  """Its state depends on the text up to the root, and on its depth."""
  drafter = TestPEagle.make(num_heads=3)
  batch = random_batch(2, rows=1, length=12)
  other = dict(batch, tokens=batch["tokens"].at[0, 7:].set(1))
  a, b = (chosen(drafter, None, x) for x in (batch, other))
  for depth in range(3):
    np.testing.assert_allclose(a[depth].states[0, :6], b[depth].states[0, :6], atol=1e-6)
    assert np.max(np.abs(a[depth].states[0, 6] - b[depth].states[0, 6])) > 1e-3
  assert np.max(np.abs(a[1].states[0, :6] - a[2].states[0, :6])) > 1e-3


def test_wrong_settings():
  with pytest.raises(UserError, match="keep must lie"):
    TestPEagle.make(keep=0.0)
  with pytest.raises(UserError, match="use keep instead"):
    TestPEagle.make(loss_fraction=0.5)
