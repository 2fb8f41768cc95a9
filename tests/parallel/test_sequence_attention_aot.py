# SPDX-License-Identifier: Apache-2.0
"""What TPU compilers make of softmax layers' collectives. Needs libtpu: ``make test-aot``."""

from __future__ import annotations

import collections
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdec.parallel import sequence
from jaxdec.parallel.plan import hlo
from jaxdec.parallel.plan.collectives import collectives
from pallas_kernels import _aot, target

pytestmark = [
  pytest.mark.aot,
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

RANKS, TOKENS, HEADS, KV_HEADS, WIDTH = 4, 2048, 8, 2, 128
FORWARD = {
  "allgather": {"all-gather": 1},
  "ring": {"collective-permute": RANKS - 1},
  "ulysses": {"all-to-all": 2},
}
BACKWARD = {
  "allgather": {"reduce-scatter": 1},
  "ring": {"collective-permute": 2 * (RANKS - 1)},
  "ulysses": {"all-to-all": 2},
}


@pytest.mark.parametrize(
  ("method", "layout", "check_vma"),
  [("allgather", "zigzag", False), ("ring", "zigzag", True), ("ulysses", "contiguous", False)],
)
def test_collectives_and_bytes_on_a_tpu(method, layout, check_vma):
  """The kernels of the op inside ``shard_map``; counts and bytes of the compiled program."""
  _aot.prepare(dump=False)
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
  mesh = Mesh(np.array(devices), ("seq",))
  attend = functools.partial(sequence.attention, axis_name="seq", method=method, layout=layout)

  def step(q, k, v, dout):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(dout)

  spec = P(None, "seq")
  f = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
  q, k = (
    jax.ShapeDtypeStruct(
      (1, RANKS * TOKENS, heads, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )
    for heads in (HEADS, KV_HEADS)
  )
  with target("tpu", generation="v5e"):
    lowered = jax.jit(f).trace(q, k, k, q).lower(lowering_platforms=("tpu",))
  found = collectives(hlo.parse(lowered.compile().as_text()), mesh)

  formula = sequence.communicated_bytes(
    method, ranks=RANKS, batch=1, length=RANKS * TOKENS, heads=HEADS, kv_heads=KV_HEADS,
    head_dim=WIDTH, itemsize=2, layout=layout,
  )  # fmt: skip
  counts, sizes = collections.defaultdict(collections.Counter), collections.Counter()
  for x in found:
    sizes[x.phase] += x.total
    # The compiler pads what it scatters, and a permute moves the rows that padding displaced.
    if x.total > 0.02 * min(formula):
      counts[x.phase][x.kind] += x.count
  assert counts == {"forward": FORWARD[method], "backward": BACKWARD[method]}
  assert sizes["forward"] == formula.forward
  assert formula.backward <= sizes["backward"] <= 1.02 * formula.backward
  if method == "ring":  # keys travel while a step computes
    assert all(x.overlapped for x in found if x.phase == "forward")
