# SPDX-License-Identifier: Apache-2.0
"""What TPU compilers make of the exchanges of recurrent layers. Needs libtpu: ``make test-aot``."""

from __future__ import annotations

import collections
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdec.parallel import sequence
from jaxdec.parallel.mesh import make_mesh
from jaxdec.parallel.plan.collectives import collectives
from jaxdec.parallel.plan.hlo import parse
from pallas_kernels import target

pytestmark = [
  pytest.mark.aot,
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

HEADS, WIDTH = 2, 128
STATE = HEADS * WIDTH * WIDTH * 4  # bytes of float32
PAYLOAD = {"scalar": STATE + HEADS * 4, "gated delta": 2 * STATE}


def communicated(topology: str, kind: str, exchange: str, tokens: int = 256, check_vma=True):
  """The collectives along the sequence of a layer's forward and backward pass."""
  from jax.experimental import topologies

  from pallas_kernels import _aot

  _aot.prepare(dump=False)
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = make_mesh(seq=len(devices), devices=devices)
  split = P(None, "seq")

  def array(*shape, dtype=jnp.bfloat16):
    shape = (1, tokens * len(devices), *shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, split))

  arrays = {n: array(HEADS, WIDTH) for n in "qkv"}
  arrays["log_decay"] = array(HEADS, dtype=jnp.float32)
  if "delta" in kind:
    arrays["beta"] = array(HEADS, dtype=jnp.float32)

  def squares(arrays):
    layer = jax.shard_map(
      lambda x: sequence.linear_attention(**x, axis_name="seq", exchange=exchange)[0],
      mesh=mesh,
      in_specs=split,
      out_specs=split,
      check_vma=check_vma,
    )
    return jnp.square(layer(arrays).astype(jnp.float32))

  # The loss stays a sum a device: nothing but the layer communicates.
  def gradients(arrays):
    out, back = jax.vjp(squares, arrays)
    return back(jnp.ones_like(out))

  with target("tpu", generation=topology.split(":")[0]):
    program = jax.jit(gradients).trace(arrays).lower(lowering_platforms=("tpu",)).compile()
  return collectives(parse(program.as_text()), mesh)


def sent(found) -> dict[str, list[int]]:
  """Bytes that a device sends, by kind of collective."""
  by_kind = collections.defaultdict(list)
  for c in found:
    by_kind[c.kind] += [c.bytes] * c.count
  return {kind: sorted(sizes) for kind, sizes in by_kind.items()}


@pytest.mark.parametrize("kind", ["scalar", "gated delta"])
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:4x4", "v6e:2x4", "v5p:2x2x2"])
def test_gather_is_an_all_gather_each_way(topology, kind):
  """Of W - 1 payloads, padded to whole tiles of the chip, whatever the length."""
  for tokens in (256, 1024):
    found = communicated(topology, kind, "gather", tokens, check_vma=tokens == 256)
    others = found[0].group - 1
    (name, sizes), *rest = sent(found).items()
    assert (name, len(sizes), rest) == ("all-gather", 2, [])
    for size in sizes:
      assert others * PAYLOAD[kind] <= size <= others * (PAYLOAD[kind] + 4096)


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "v5p:2x2x2"])
def test_permutes_stay_permutes(topology):
  scanned = sent(communicated(topology, "scalar", "scan"))
  chained = sent(communicated(topology, "scalar", "chain"))
  assert {kind: len(sizes) for kind, sizes in scanned.items()} == {"collective-permute": 2 * 3}
  assert {kind: len(sizes) for kind, sizes in chained.items()} == {"collective-permute": 2 * 7}
  assert set(chained["collective-permute"]) == {STATE}


def test_v5e_overlaps_the_gather_with_work_inside_chunks():
  """On this chip the compiler makes all-gathers asynchronous; on v6e and v5p it does not."""
  found = communicated("v5e:2x4", "gated delta", "gather", 1024)
  assert any(c.asynchronous and c.overlapped for c in found)
