# SPDX-License-Identifier: Apache-2.0
"""The planner's reader of compiled programs, against programs whose contents are known."""

from __future__ import annotations

import math
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdec.parallel import make_mesh
from jaxdec.parallel.plan import hlo
from jaxdec.parallel.plan.collectives import collectives, origin
from jaxdec.parallel.plan.costs import costs
from jaxdec.parallel.plan.groups import axes_of, replica_groups
from jaxdec.parallel.plan.memory import refused
from jaxdec.parallel.plan.report import grouped

SNIPPETS = pathlib.Path(__file__).parent / "hlo"
AXES = ("data", "fsdp", "tensor", "seq")


def grid(**sizes):
  """A mesh of device numbers, for programs whose devices are not here."""
  shape = tuple(sizes.get(axis, 1) for axis in AXES)
  return SimpleNamespace(
    devices=np.empty(shape, object), axis_names=AXES, shape=dict(zip(AXES, shape))
  )


@pytest.fixture(scope="module")
def scanned():
  """Three layers inside two micro-batches: a loop in a loop, on data=2 x seq=4."""
  mesh = make_mesh(data=2, seq=4)
  spec = P("data", "seq")

  def exchange(x):
    state = jax.lax.all_gather(x.sum(1), "seq").sum(0)
    shifted = jax.lax.ppermute(x, "seq", [(i, i + 1) for i in range(3)])
    traded = jax.lax.all_to_all(shifted, "seq", 2, 1, tiled=True)
    back = jax.lax.all_to_all(traded, "seq", 1, 2, tiled=True)
    return x + state[:, None] + back

  def layer(x, w):
    y = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec)(x @ w)
    return y, None

  def step(ws, xs):
    _, out = jax.lax.scan(lambda _, x: (None, jax.lax.scan(layer, x, ws)[0]), None, xs)
    return out

  ws = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P()))
  xs = jax.ShapeDtypeStruct(
    (2, 4, 32, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "data", "seq"))
  )
  text = jax.jit(step).lower(ws, xs).compile().as_text()
  return mesh, hlo.parse(text)


def test_a_collective_in_nested_scans_counts_once_a_trip(scanned):
  mesh, module = scanned
  assert module.partitions == 8 and not module.unknown_loops
  found = {c.kind: c for c in collectives(module, mesh)}
  gather, permute = found["all-gather"], found["collective-permute"]
  trades = [c for c in collectives(module, mesh) if c.kind == "all-to-all"]
  assert gather.count == permute.count == 6 and [c.count for c in trades] == [6, 6]
  assert {c.axes for c in found.values()} == {("seq",)}
  row = 2 * 16 * 4  # [B/2, D] float32
  assert gather.bytes == 3 * row and gather.group == 4  # W-1 of W rows come in
  assert permute.bytes == 8 * row  # L = 32 / 4 rows of that
  assert trades[0].bytes == 8 * row * 3 // 4
  assert gather.total == 6 * gather.bytes


def test_flops_of_loops(scanned):
  _, module = scanned
  assert costs(module).flops == 2 * (2 * 8 * 16) * 16 * 3 * 2


def test_no_devices_no_collectives():
  mesh = make_mesh(data=1)
  x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  text = jax.jit(lambda x: x @ x).lower(x).compile().as_text()
  module = hlo.parse(text)
  assert not collectives(module, mesh) and costs(module).flops == 128


def test_loops_of_unknown_length_are_named():
  def f(x):
    return jax.lax.while_loop(lambda c: c.sum() < 9.0, lambda c: c @ c, x)

  module = hlo.parse(jax.jit(f).lower(jnp.eye(4)).compile().as_text())
  assert len(module.unknown_loops) == 1 and costs(module).flops == 128


@pytest.mark.parametrize(
  ("text", "rows"),
  [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    (
      "replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(0,2,1)) {'c'}",
      [[0, 2], [1, 3], [4, 6], [5, 7]],
    ),
  ],
)
def test_replica_groups_in_every_notation(text, rows):
  np.testing.assert_array_equal(replica_groups(text, 8), rows)


def test_axes_of_groups():
  mesh = grid(data=2, fsdp=2, seq=2)
  assert axes_of(np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), mesh) == ("seq",)
  assert axes_of(np.array([[0, 4], [1, 5], [2, 6], [3, 7]]), mesh) == ("data",)
  assert axes_of(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), mesh) == ("fsdp", "seq")
  assert axes_of(np.arange(8)[None], mesh) == ("data", "fsdp", "seq")


def test_origin_of_an_operation():
  path = "jit(step_fn)/transpose(jvp(Decoder))/stack/while/body/block_0/mixer/q/dot_general"
  assert origin(path) == ("backward", "stack/block_0/mixer/q", "dot_general")
  path = "jit(f)/transpose(jvp(D))/checkpoint/rematted_computation/layers_3/mlp/up/dot_general"
  assert origin(path) == ("recompute", "layers_3/mlp/up", "dot_general")
  assert origin("jit(f)/jvp(D)/embed/take") == ("forward", "embed", "take")
  assert origin("jit(f)/sub") == ("update", "", "sub")
  assert origin("") == ("", "", "")


# -- what the TPU compiler writes (hlo/make.py says how the files came about) --------------------

MESHES = {"v5e": dict(fsdp=4, seq=4), "v6e": dict(fsdp=4, seq=4), "tpu7x": dict(fsdp=2, seq=4)}


@pytest.fixture(scope="module", params=MESHES)
def compiled(request):
  text = (SNIPPETS / f"{request.param}.txt").read_text()
  return request.param, grid(**MESHES[request.param]), hlo.parse(text)


def test_tpu_loops_are_counted_without_annotations(compiled):
  _, _, module = compiled
  assert not module.unknown_loops and set(module.runs.values()) == {0, 1, 6}


def test_tpu_exchange_is_one_gather_and_one_reduce_scatter_a_layer(compiled):
  """The state: 512 x 512 bfloat16 from each of 4 shards and 2 rows; the length is not in it."""
  _, mesh, module = compiled
  found = [c for c in collectives(module, mesh) if c.axes == ("seq",)]
  by_kind = {}
  for c in found:
    by_kind.setdefault(c.kind, []).append(c)
  (gather,), (scatter,) = by_kind["all-gather"], by_kind["reduce-scatter"]
  payload = 2 * 512 * 512 * 2
  assert gather.bytes == scatter.bytes == 3 * payload
  assert gather.count == scatter.count == 6
  assert (gather.phase, scatter.phase) == ("forward", "backward")
  assert [c.count for c in by_kind["collective-permute"]] == [6, 6]


def test_tpu_asynchronous_collectives_count_once(compiled):
  """Weights are gathered twice a layer each way, however often the text repeats a collective."""
  _, mesh, module = compiled
  gathers = [c for c in collectives(module, mesh) if c.axes == ("fsdp",) and c.kind == "all-gather"]
  assert sorted(c.phase for c in gathers) == ["backward"] * 2 + ["forward"] * 2
  assert {c.count for c in gathers} == {6}


def test_tpu_generations_differ_in_overlap(compiled):
  """v5e: fusions carry a gather along; tpu7x: the SparseCore moves data; v6e gathers and waits."""
  name, mesh, module = compiled
  gathers = [c for c in collectives(module, mesh) if c.kind == "all-gather"]
  hidden = sum(c.overlapped for c in gathers)
  assert {"v5e": 0 < hidden < len(gathers), "v6e": hidden == 0, "tpu7x": hidden >= 4}[name]


def test_tpu_products_written_as_convolutions(compiled):
  """2 x 512 tokens x 2 weights and 2 products with the state, forward and twice that backward."""
  _, _, module = compiled
  product = 2 * (2 * 512) * 512 * 512
  assert costs(module).flops == 6 * 3 * 4 * product


def test_rows_of_a_table_keep_the_totals(compiled):
  _, mesh, module = compiled
  found = collectives(module, mesh)
  rows = grouped(found)
  assert sum(r["total_bytes"] for r in rows) == sum(c.total for c in found)
  assert sum(r["count"] for r in rows) == sum(c.count for c in found)
  assert rows == sorted(rows, key=lambda r: -r["total_bytes"])


def test_a_refusal_says_how_much_is_missing():
  parts = {"batch": jax.ShapeDtypeStruct((2**20,), jnp.float32)}
  error = RuntimeError(
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. "
    "Exceeded hbm capacity by 4.75G."
  )
  m = refused(error, parts, int(15.75 * 2**30))
  assert not m.fits and math.isclose(m.spare, -4.75 * 2**30, rel_tol=1e-6)
  assert "does not fit" in m.verdict and "4.75 GiB too much" in m.verdict
  error = RuntimeError(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(2.00T) exceeds available HBM (95.74G)."
  )
  assert refused(error, parts, 2**30).peak == 2 * 2**40 + 2**22
  assert refused(RuntimeError("INTERNAL: something else"), parts, 1) is None
