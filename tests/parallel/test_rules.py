# SPDX-License-Identifier: Apache-2.0
"""Meshes and rules refuse what cannot work, before anything compiles."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxdec.errors import UserError
from jaxdec.parallel import Rules, check_batch, like_parameters, make_mesh, shardings

P = PartitionSpec


def boxed(shape, names):
  return {
    "layer": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, "float32"), names)}
  }


def test_mesh_has_all_axes_and_is_auto():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "seq": 1}
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert make_mesh().size == 1  # one device of eight
  assert dict(make_mesh(data=-1, tensor=2).shape)["data"] == jax.device_count() // 2


@pytest.mark.parametrize("sizes", [{"data": 3, "tensor": 5}, {"data": 16}])
def test_mesh_too_large_names_sizes_and_devices(sizes):
  with pytest.raises(UserError, match=f"data={sizes['data']}.*there are {jax.device_count()}"):
    make_mesh(**sizes)


def test_mesh_bad_sizes():
  with pytest.raises(UserError, match=r"at least 1.*tensor=0"):
    make_mesh(tensor=0)
  with pytest.raises(UserError, match="at least 1"):
    make_mesh(data=-1, fsdp=-1)
  with pytest.raises(UserError, match="multiple of 3"):
    make_mesh(data=-1, tensor=3)
  with pytest.raises(UserError, match="needs 2 devices, and there are 4"):
    make_mesh(data=2, devices=jax.devices()[:4])


def test_default_rules():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  rules = Rules()
  assert rules.spec(("embed", "heads"), mesh) == P("fsdp", "tensor")
  assert rules.spec(("layers", "mlp", "embed"), mesh) == P(None, "tensor", "fsdp")
  assert rules.spec(("batch", "length"), mesh) == P(("data", "fsdp"))
  assert rules.spec(("vocab", None), make_mesh(data=8)) == P()
  assert rules.replace(vocab=None).spec(("vocab", "embed"), mesh) == P(None, "fsdp")


def test_collision_names_parameter_dimensions_and_axis():
  mesh = make_mesh(fsdp=2, tensor=2)
  rules = Rules().replace(embed="tensor")
  with pytest.raises(UserError, match=r"layer/kernel.*'embed' and 'mlp'.*mesh axis 'tensor'"):
    shardings(boxed((8, 8), ("embed", "mlp")), rules, mesh)
  shardings(boxed((8, 8), ("embed", "mlp")), rules, make_mesh(fsdp=2))  # an axis of size 1 is free


def test_indivisible_size_names_parameter_dimension_size_and_axis():
  mesh = make_mesh(fsdp=2, tensor=4)
  with pytest.raises(
    UserError, match=r"layer/kernel: dimension 1 \('mlp'\) has size 6.*tensor of size 4"
  ):
    shardings(boxed((8, 6), ("embed", "mlp")), Rules(), mesh)


def test_unknown_names_have_a_nearest_match():
  mesh = make_mesh(tensor=2)
  with pytest.raises(UserError, match=r"'head'.*did you mean 'heads'"):
    shardings(boxed((8, 8), ("embed", "head")), Rules(), mesh)
  with pytest.raises(UserError, match=r"'tensr'.*did you mean 'tensor'"):
    Rules().replace(mlp="tensr").spec(("mlp",), mesh)


def test_optimizer_state_lies_like_its_parameters():
  mesh = make_mesh(fsdp=2, tensor=2)
  params = {"a": {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")}, "kernel": jnp.zeros((8, 8))}
  layout = {
    "a": {"kernel": jax.NamedSharding(mesh, P("fsdp", "tensor"))},
    "kernel": jax.NamedSharding(mesh, P("tensor")),
  }
  state = jax.eval_shape(optax.adamw(1e-3).init, params)
  found = like_parameters(state, params, layout, mesh)[0]
  assert found.mu["a"]["kernel"].spec == P("fsdp", "tensor")  # not the shorter path "kernel"
  assert found.nu["kernel"].spec == P("tensor")
  assert found.count.spec == P()


def test_batch_that_does_not_divide():
  mesh = make_mesh(data=2, fsdp=2)
  batch = {"tokens": np.zeros((6, 4), np.int32)}
  with pytest.raises(UserError, match=r"'tokens' has 6 rows.*data\*fsdp of size 4.*multiple of 4"):
    check_batch(batch, mesh)
  with pytest.raises(UserError, match="multiple of 12"):
    check_batch({"tokens": np.zeros((8, 4))}, mesh, split=3)
  check_batch({"tokens": np.zeros((8, 4))}, mesh)
