# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction: one module used again, and one module a depth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ranked import assert_drafts_what_training_ranks
from toy_target import init, logits_by_depth, random_batch, randomized, run, target
from universal import PATHS, Universal, forced_logits

from jaxdec.drafting.mtp import Mtp, MtpModules
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.errors import UserError


class TestMtp(Universal):
  kind = Mtp
  overfit_options = {"rollouts": 3}  # noqa: RUF012


class TestMtpModules(Universal):
  kind = MtpModules


@functools.cache
def make(kind, **options):
  drafter = kind.for_target(target().model.config, **{"num_heads": 3, **options})
  return drafter, randomized(init(drafter, target()), scale=0.5)


@functools.cache
def data():
  batch = random_batch(5, rows=2, length=11)
  return batch, run(target(), batch)


@pytest.mark.parametrize("kind", [Mtp, MtpModules])
def test_trees_draft_what_training_ranks(kind):
  assert_drafts_what_training_ranks(*make(kind, tree=StaticTree.from_paths(PATHS)))


def test_one_module_of_many_is_the_one_module():
  """At depth 1 the two are the same, in training and after reading a text."""
  one, params = make(Mtp, num_heads=1)
  many, _ = make(MtpModules, num_heads=1)
  modules = {"module_1": params}
  assert jax.tree.structure(init(many, target())) == jax.tree.structure(modules)
  batch, output = data()
  a = one.head(params, target(), 1, one.teacher_forced(params, target(), output, batch)[0])
  b = logits_by_depth(many, modules, target(), output, batch)[0]
  np.testing.assert_allclose(a, b, atol=1e-5)
  text = np.asarray(batch["tokens"])
  a, b = (
    forced_logits(d, p, target(), text, [7, 3], 1) for d, p in ((one, params), (many, modules))
  )
  np.testing.assert_allclose(a[0], b[0], atol=1e-5)


def test_later_modules_read_the_earlier_ones_output():
  """Module 2 by hand on h^1; its loss trains module 1 too, and not the other way round."""
  drafter, params = make(MtpModules, num_heads=2)
  batch, output = data()

  @jax.jit
  def states(params):
    return drafter.teacher_forced(params, target(), output, batch)

  embedded = target().model.apply({"params": target().params}, batch["tokens"], method="embed")
  apply = lambda k, *a, m: drafter.network.apply(  # noqa: E731
    {"params": params[f"module_{k}"]}, *a, method=m
  )
  where = batch["positions"], batch["segment_ids"]
  h1 = apply(1, output.hidden, embedded, *where, 1, m="rollout")[0]
  # Cut the text's first token off: slot t then stands next to x_{t+2}.
  cut = lambda x: x[:, :-1]  # noqa: E731
  h2 = apply(2, cut(h1), embedded[:, 1:], *map(cut, where), 1, m="rollout")[0]
  np.testing.assert_allclose(states(params)[1], apply(2, h2[:, :-2], m="readout"), atol=1e-5)

  for depth, still in ((1, "module_2"), (2, None)):
    g = jax.grad(lambda p, d=depth: jnp.sum(states(p)[d - 1] ** 2))(params)
    for name in params:
      assert np.any(g[name]["project"]["kernel"]) == (name != still)


def test_module_keeps_the_blocks_own_norms():
  _, params = make(Mtp)
  assert set(params) == {"state_norm", "embed_norm", "final_norm", "project", "blocks_0"}
  assert "mixer_norm" in params["blocks_0"]
  with pytest.raises(UserError, match="a module has one layer"):
    make(MtpModules, num_layers=2)
