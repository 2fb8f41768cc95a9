# SPDX-License-Identifier: Apache-2.0
"""Real steps compiled for real slices. Needs libtpu and minutes: ``make test-aot``."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdec.errors import UserError
from jaxdec.mixers.attention import AttentionConfig
from jaxdec.mixers.linear_attention import LinearAttentionConfig
from jaxdec.models.config import DecoderConfig, LayerConfig, MLPConfig
from jaxdec.parallel import make_mesh
from jaxdec.parallel.plan import examine, parse, plan
from jaxdec.parallel.plan.report import to_json
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.report import plain
from jaxdec.training import MeshConfig, Recipe, TrainerConfig

pytestmark = [
  pytest.mark.aot,
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

LINEAR = LayerConfig(LinearAttentionConfig(num_heads=2, head_dim=128), MLPConfig(256))
SOFTMAX = LayerConfig(AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=128), MLPConfig(256))
LAYERS = 3


def recipe(mesh, layer=LINEAR, tokens=512, batch=None, **changes):
  """Three equal layers; ``tokens`` on each shard."""
  model = DecoderConfig(
    vocab_size=1024, dim=256, layers=(layer,) * LAYERS, tie_embeddings=True, max_length=2**22
  )
  fields = dict(
    model=model,
    trainer=TrainerConfig(mesh=MeshConfig(**mesh)),
    batch_size=batch or mesh.get("data", 1) * mesh.get("fsdp", 1),
    seq_len=tokens * mesh.get("seq", 1),
    sequence=SequenceConfig(),
  )
  return Recipe(**{**fields, **changes})


def over(found, axis, layer="mixer"):
  return [c for c in found if c.axes == (axis,) and layer in c.layer]


@pytest.fixture(scope="module")
def lasp2():
  """LASP-2 on 2 x 4 chips, a length and four times that, with remat."""
  mesh = dict(fsdp=2, seq=4)
  return [plan(recipe(mesh, tokens=n, remat="full"), "v5e:2x4") for n in (512, 2048)]


def test_a_linear_layer_communicates_one_state_each_way_whatever_the_length(lasp2):
  """LASP-2: [B, N, H, H] float32 and a decay a head gathered, and its gradient likewise.

  Nothing again for the recomputation of the layer.
  """
  state = 2 * 128 * 128 * 4
  for found in lasp2:
    states = [c for c in over(found.collectives, "seq") if c.layer.endswith("mixer")]
    kinds = sorted((c.kind, c.phase) for c in states)
    assert kinds == [("all-gather", "backward"), ("all-gather", "forward")]
    assert {c.count for c in states} == {LAYERS}
    for c in states:
      assert 3 * state <= c.bytes <= 3 * (state + 4 * 1024)
  short, long = ([c.bytes for c in over(p.collectives, "seq")] for p in lasp2)
  assert short == long


def test_memory_is_accounted_for(lasp2):
  short, long = (p.memory for p in lasp2)
  assert short.fits and long.fits and long.temporaries > short.temporaries
  count = lasp2[0].parameters
  # Parameters float32 over fsdp=2 (norms whole), Adam's two moments as much each.
  assert short.parts["parameters"] == pytest.approx(count * 4 / 2, rel=0.05)
  assert short.parts["optimizer"] == pytest.approx(2 * short.parts["parameters"], rel=0.01)
  assert short.parts["batch"] == 512 * (4 + 4 + 4 + 1)
  assert sum(short.parts.values()) <= short.arguments <= 1.2 * sum(short.parts.values())
  assert short.aliased > 0.9 * (short.parts["parameters"] + short.parts["optimizer"])


def test_flops_are_those_of_the_model_and_its_recomputation(lasp2):
  """Compiled work of a rematerialised step: 4/3 of the model's, and the layers' inner products."""
  for found in lasp2:
    of_model = found.roofline.model_flops / found.roofline.devices
    assert of_model < found.costs.flops < 2.5 * of_model
  short, long = lasp2
  assert long.costs.flops == pytest.approx(4 * short.costs.flops, rel=0.1)
  assert 0 < short.roofline.mfu < 1


def test_a_plan_is_plain_data(lasp2):
  text = json.dumps(plain(to_json(lasp2[0])), allow_nan=False)
  assert json.loads(text)["chips"] == 8


def test_one_chip_has_no_collectives():
  found = plan(recipe({}), "v5e:1x1", price=1.2)
  assert not found.collectives and found.memory.fits and found.cost > 0


def test_whole_sequences_on_several_chips():
  """Kernels run in shard_map also where no sequence is split."""
  found = plan(recipe(dict(fsdp=4), SOFTMAX), "v6e:2x2")
  assert found.costs.kernels["block_sparse_forward"] == LAYERS
  assert not over(found.collectives, "seq", "")


def test_largest_slice():
  found = plan(recipe(dict(data=24, fsdp=16, seq=16)), "v5p:16x16x24")
  assert found.topology.chips == 6144 and found.memory.fits
  assert {c.count for c in over(found.collectives, "seq") if c.bytes > 2**16} == {LAYERS}


def test_too_much_memory_says_how_much():
  huge = recipe(dict(fsdp=4), tokens=2**20, batch=4)
  found = plan(huge, "v5e:2x2")
  assert not found.memory.fits and found.memory.spare < 0
  assert "too much" in found.memory.verdict and found.roofline is None


def test_decoding_step():
  found = plan(
    recipe(dict(data=4), SOFTMAX), "v5e:2x2", step="decode", batch_size=8,
    cache_length=1024,
  )  # fmt: skip
  cache = LAYERS * 2 * (8 // 4) * 1 * 1024 * 128 * 2
  assert found.memory.parts["state"] == pytest.approx(cache, rel=0.01)
  assert found.tokens == 8 and found.roofline.bound == "memory"


def test_a_mesh_of_another_size_is_refused_before_compiling():
  with pytest.raises(UserError, match="needs 8 devices, and there are 4"):
    plan(recipe(dict(seq=8)), "v5e:2x2")


def test_slices_are_joined_by_the_data_centre_network():
  r = recipe(dict(data=2, seq=4))
  r = dataclasses.replace(r, trainer=TrainerConfig(mesh=MeshConfig(data=2, seq=4, dcn_data=2)))
  found = plan(r, "v5e:2x2*2")
  assert found.topology.chips == 8
  between = [name for name in found.roofline.links if "data" in name.split("*")]
  assert between and all(found.roofline.links[name] > 0 for name in between)
  # The compiler peels the loop over layers here: what counts is the sum.
  states = [c for c in over(found.collectives, "seq") if c.layer.endswith("mixer")]
  for phase in ("forward", "backward"):
    of_phase = [c for c in states if c.phase == phase]
    assert sum(c.count for c in of_phase) == LAYERS
    assert {c.kind for c in of_phase} == {"all-gather"}


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_generation_compiles_and_states_its_memory(name):
  """The compiler refuses a program just over the limit that the table states."""
  topology = parse(name)
  mesh = make_mesh(data=topology.num_devices, devices=topology.devices())
  spec = NamedSharding(mesh, P())

  def program(gib):
    x = jax.ShapeDtypeStruct((int(gib * 2**18), 1024), jnp.float32, sharding=spec)
    lowered = jax.jit(lambda x: x.sum()).trace(x).lower(lowering_platforms=("tpu",))
    return examine(lowered, {"batch": x}, mesh, topology).memory

  limit = topology.generation.hbm / 2**30
  assert program(np.floor(limit) - 0.25).fits
  assert not program(limit + 0.25).fits
