# SPDX-License-Identifier: Apache-2.0
"""LoRA trees: nothing at the start, the same in both layouts, only where asked for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import randomized, target

from jaxdec.drafting.lora import LoRA
from jaxdec.errors import UserError
from jaxdec.models import Decoder
from jaxdec.models.decoder import stack_layers

TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
  return model.apply({"params": params}, TOKENS).logits


def test_a_fresh_tree_merges_to_the_model_itself():
  t, lora = target(), LoRA(rank=4)
  tree = lora.init(jax.random.key(0), t.params)
  assert all(np.any(node["a"]) for node in tree["layers_0"]["mixer"].values())
  merged = lora.merge(t.params, tree)
  assert jax.tree.structure(merged) == jax.tree.structure(t.params)
  jax.tree.map(np.testing.assert_array_equal, merged, t.params)


def test_merging_adds_the_product_in_both_layouts():
  t, lora = target(), LoRA(rank=4, alpha=8.0)
  config = t.model.config
  tree = randomized(lora.init(jax.random.key(0), t.params))
  merged = lora.merge(t.params, tree)
  pair = tree["layers_1"]["mlp"]["up"]
  np.testing.assert_allclose(
    merged["layers_1"]["mlp"]["up"]["kernel"] - t.params["layers_1"]["mlp"]["up"]["kernel"],
    8 / 4 * pair["a"] @ pair["b"],
    atol=1e-5,
  )
  # A tree stacks as parameters do, and merging commutes with stacking.
  stacked, stacked_tree = stack_layers(t.params, config), stack_layers(tree, config)
  fresh = lora.init(jax.random.key(0), stacked)
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, stacked_tree)
  scanned = Decoder(config, layout="scanned")
  ours, theirs = logits(t.model, merged), logits(scanned, lora.merge(stacked, stacked_tree))
  np.testing.assert_allclose(ours, theirs, atol=2e-5)
  assert float(jnp.abs(ours - logits(t.model, t.params)).max()) > 1e-2


def test_only_the_named_layers_change_and_only_inside_blocks():
  t, lora = target(), LoRA(rank=2, layers=("q", "v"))
  tree = randomized(lora.init(jax.random.key(0), t.params))
  merged = lora.merge(t.params, tree)
  changed = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for (path, new), old in zip(
      jax.tree_util.tree_leaves_with_path(merged), jax.tree.leaves(t.params)
    )
    if np.any(new != old)
  }
  assert changed == {f"layers_{i}/mixer/{n}/kernel" for i in range(3) for n in "qv"}
  assert sum(x.size for x in jax.tree.leaves(tree)) == 3 * 2 * ((32 + 32) + (32 + 16))


def test_axis_names_follow_the_kernel():
  import flax.linen as nn

  model = Decoder(target().model.config, layout="scanned")
  boxed = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
  tree = jax.eval_shape(LoRA(rank=4).init, jax.random.key(0), boxed)
  down = tree["stack"]["block_0"]["mlp"]["down"]
  assert isinstance(down["a"], nn.LogicallyPartitioned)
  assert down["a"].names == ("layers", "mlp", None) and down["b"].names == ("layers", None, "embed")


def test_half_precision_kernels_keep_their_type():
  t, lora = target(), LoRA(rank=4)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), t.params)
  merged = lora.merge(half, randomized(lora.init(jax.random.key(0), half)))
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(merged))


@pytest.mark.parametrize(
  ("options", "message"), [({"rank": 0}, "rank of at least 1"), ({"layers": ()}, "name of a layer")]
)
def test_wrong_settings_are_one_sentence(options, message):
  with pytest.raises(UserError, match=message):
    LoRA(**options)


def test_unknown_layers_are_named():
  with pytest.raises(UserError, match=r"no dense layer 'gat'.*'gate'"):
    LoRA(layers=("gat",)).init(jax.random.key(0), target().params)
