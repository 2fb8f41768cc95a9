# SPDX-License-Identifier: Apache-2.0
"""Remat policies: the same gradients, less memory, no collective of states twice."""

from __future__ import annotations

import collections
from typing import get_args

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.errors import UserError
from jaxdec.mixers import AttentionConfig, LinearAttentionConfig
from jaxdec.models import Decoder, DecoderConfig, LayerConfig, MLPConfig, remat, stack_layers
from jaxdec.parallel import make_mesh
from jaxdec.parallel.rules import DEFAULT
from jaxdec.parallel.sequence import SequenceConfig
from pallas_kernels.testing import COMPILE_ONCE

POLICIES = get_args(remat.Remat)


def hybrid(repeats: int = 2) -> DecoderConfig:
  mixers = (
    LinearAttentionConfig(num_heads=2, head_dim=8),
    AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
  )
  layers = tuple(LayerConfig(mixer, MLPConfig(32)) for mixer in mixers)
  return DecoderConfig(vocab_size=17, dim=16, layers=layers * repeats)


def gradient(model: Decoder):
  def loss(params, tokens):
    logits = model.apply({"params": params}, tokens).logits
    return jnp.mean(jnp.square(logits)) + jnp.mean(logits[..., 0])

  return jax.jit(jax.grad(loss), compiler_options=COMPILE_ONCE)


@pytest.mark.parametrize(
  ("layout", "policies"),
  [
    ("unrolled", ("full",)),
    pytest.param("unrolled", POLICIES[1:], marks=pytest.mark.slow),
    pytest.param("scanned", POLICIES[1:], marks=pytest.mark.slow),
  ],
)
def test_gradients_are_the_same_under_every_policy(layout, policies):
  config = hybrid(2 if layout == "scanned" else 1)
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 17)
  params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), tokens)["params"])
  if layout == "scanned":
    params = stack_layers(params, config)
  expected, *found = (
    gradient(Decoder(config, layout=layout, remat=policy))(params, tokens)
    for policy in ("none", *policies)
  )
  for got in found:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), got, expected)


@pytest.mark.slow
def test_each_policy_keeps_less():
  """Temporary memory of a deep stack, as compiled."""
  config = hybrid(4)
  tokens = jnp.zeros((4, 256), jnp.int32)
  params = jax.eval_shape(Decoder(config, layout="scanned").init, jax.random.key(0), tokens)
  params = nn.unbox(params)["params"]

  def temporary(policy):
    lowered = gradient(Decoder(config, layout="scanned", remat=policy)).lower(params, tokens)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  none, dots, full = map(temporary, ("none", "dots", "full"))
  assert full < dots < none, (full, dots, none)
  assert full < 0.6 * none


def gathers(layout, policy):
  """All-gathers in forward and backward pass of one linear and one attention layer, traced only."""
  config = hybrid(1)
  tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
  params = nn.unbox(jax.eval_shape(Decoder(config, layout=layout).init, jax.random.key(0), tokens))
  model = Decoder(config, layout=layout, remat=policy, sequence=SequenceConfig())
  counts = collections.Counter()

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      counts[equation.primitive.name] += 1
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        walk(inner)

  with jax.set_mesh(make_mesh(seq=4)), nn.logical_axis_rules(DEFAULT.flax()):
    loss = lambda p, t: jnp.sum(model.apply(p, t).logits)  # noqa: E731
    walk(jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr)
  return sum(count for name, count in counts.items() if name.startswith("all_gather"))


@pytest.mark.parametrize("layout", ["scanned", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_states_are_gathered_once(layout, monkeypatch):
  """Where keys and values are not kept they are gathered again, and nothing else is."""
  once = gathers(layout, "none")
  again = {"dots": 1, "collectives": 0, "full": 1, "offload": 1}
  assert {policy: gathers(layout, policy) - once for policy in again} == again
  monkeypatch.setitem(remat._TABLE, "full", jax.checkpoint_policies.nothing_saveable)
  assert gathers(layout, "full") - once == 2  # control: states too


def test_an_unknown_policy_is_named():
  model = Decoder(hybrid(), remat="ful")
  with pytest.raises(UserError, match=r"remat='ful' \(did you mean 'full'\?\) is no policy"):
    model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
