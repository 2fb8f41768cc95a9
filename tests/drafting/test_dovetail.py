# SPDX-License-Identifier: Apache-2.0
"""Dovetail: the gate's limits; deeper drafters; the tree's size from measured times."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusion import interaction
from ranked import assert_drafts_what_training_ranks
from toy_target import init, logits_by_depth, random_batch, randomized, run, target
from universal import PATHS, Universal

from jaxdec.drafting.budget import choose_budget
from jaxdec.drafting.dovetail import Dovetail
from jaxdec.drafting.eagle import Eagle
from jaxdec.drafting.objectives import Term
from jaxdec.drafting.static_tree import StaticTree, expected_tokens, greedy_tree
from jaxdec.errors import UserError

ACCURACY = np.array([[0.7, 0.12, 0.05], [0.6, 0.12, 0.06], [0.5, 0.1, 0.05], [0.4, 0.1, 0.05]])


class TestDovetail(Universal):
  kind = Dovetail
  overfit_options = {  # noqa: RUF012
    "objective": (Term("smooth_l1"), Term("hard", 0.1)),
    "rollouts": 3,
    "noise": 0.0,
  }


def test_trees_draft_what_training_ranks():
  """With two layers, each with keys of its own."""
  drafter = Dovetail.for_target(
    target().model.config, num_heads=3, tree=StaticTree.from_paths(PATHS)
  )
  params = randomized(init(drafter, target()), scale=0.5)
  assert_drafts_what_training_ranks(drafter, params)


@functools.cache
def fused(strength):
  """``fuse`` of one slot, its gate's logits all set to ``strength``; and u, v by hand."""
  drafter = Dovetail.for_target(target().model.config)
  params = init(drafter, target())
  f, e = jax.random.normal(jax.random.key(1), (2, 1, 1, 32))
  u = f @ params["state_in"]["kernel"]
  normed = e * jax.lax.rsqrt(jnp.mean(e * e) + drafter.eps)
  v = jax.nn.silu(normed @ params["embed_in"]["kernel"])
  read = jnp.concatenate([u, v], axis=-1)[0, 0]
  kernel = strength * jnp.outer(read / jnp.sum(read**2), jnp.ones(32))
  params = {**params, "gate": {"kernel": kernel}}
  return drafter.network.apply({"params": params}, f, e, method="fuse"), u, v


def test_gate_open_passes_the_feature_and_shut_the_token():
  for strength, expected in ((60.0, 1), (-60.0, 2), (0.0, None)):
    g, u, v = parts = fused(strength)
    np.testing.assert_allclose(g, (u + v) / 2 if expected is None else parts[expected], atol=1e-6)
  assert float(jnp.max(jnp.abs(u - v))) > 0.1


def test_without_the_fusion_it_is_eagle():
  """With as many layers; and the fusion alone lets the feature decide what the token adds."""
  t, batch, options = target(), random_batch(4), {"num_heads": 3, "num_layers": 2}
  plain, eagle = (
    Dovetail.for_target(t.model.config, gated=False, **options),
    Eagle.for_target(t.model.config, **options),
  )
  params, output = randomized(init(eagle, t), scale=0.5), run(t, batch)
  assert jax.tree.structure(init(plain, t)) == jax.tree.structure(params)
  for ours, theirs in zip(
    *(logits_by_depth(d, params, t, output, batch) for d in (plain, eagle)), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
  gated = Dovetail.for_target(t.model.config, **options)
  assert interaction(plain, params) < 1e-5
  assert interaction(gated, randomized(init(gated, t), scale=0.5)) > 0.1


def test_shape_of_the_drafter():
  """No biases, no input norm in the first layer, one in the others; the gate starts Xavier."""
  drafter = Dovetail.for_target(target().model.config, num_layers=3)
  params = init(drafter, target())
  assert set(params) == {
    "embed_norm", "state_in", "embed_in", "gate", "blocks_0", "blocks_1", "blocks_2"
  }  # fmt: skip
  assert ["mixer_norm" in params[f"blocks_{i}"] for i in range(3)] == [False, True, True]
  assert params["gate"]["kernel"].shape == (64, 32) and set(params["gate"]) == {"kernel"}
  np.testing.assert_allclose(jnp.std(params["gate"]["kernel"]), (2 / 96) ** 0.5, rtol=0.1)
  assert len(drafter.init_state(2, 16).caches) == 3


def test_budget_shrinks_as_passes_get_slower_with_their_nodes():
  """One machine where nodes are free, others where each costs more: fewer nodes, never more."""
  sizes = []
  for slope in (0.0, 0.005, 0.02, 0.05, 0.2, 1.0):
    tree, rate = choose_budget(ACCURACY, {1: 1.0, 32: 1.0 + 31 * slope})
    sizes.append(tree.num_nodes)
    assert rate >= 1.0  # plain decoding's
  assert sizes == sorted(sizes, reverse=True) and sizes[0] == 32 and sizes[-1] == 1
  assert len(set(sizes)) >= 4


def test_budget_is_the_best_of_all():
  """Against trying every size and depth; a price on levels makes the tree shallower."""
  verify = {1: 1.0, 8: 1.1, 16: 1.5}
  for draft in (0.0, 0.05, 0.4):
    _, rate = choose_budget(ACCURACY, verify, draft)
    for n in range(1, 17):
      for d in range(1, 5):
        other = greedy_tree(ACCURACY, n, d)
        time = np.interp(other.num_nodes, list(verify), list(verify.values()))
        assert rate >= expected_tokens(other, ACCURACY) / (time + other.max_depth * draft) - 1e-12
  deep, shallow = (choose_budget(ACCURACY, verify, d)[0].max_depth for d in (0.0, 0.4))
  assert deep > shallow
  # Nodes that are never right are not taken even where they are free.
  tree, _ = choose_budget([[1.0, 0.0]], {1: 1.0, 8: 1.0})
  assert tree.paths == ((0,),)


@pytest.mark.parametrize("verify", [{}, {1: 0.0}, {0: 1.0}])
def test_budget_needs_times(verify):
  with pytest.raises(UserError, match="positive seconds by number of nodes"):
    choose_budget(ACCURACY, verify)
