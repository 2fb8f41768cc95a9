# SPDX-License-Identifier: Apache-2.0
"""Shapes of real models: verifying draft trees, and plain decoding (M = 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._specs import Cost, Inner, Inputs, Spec
from pallas_kernels._tpu import Chip


def _llama3_8b(M: int, S: int, B: int = 1) -> Spec:
  sizes = dict(B=B, M=M, N=32, K=8, H=128, S=S)
  return Spec(f"llama3-8b-M{M}-S{S}" + (f"-B{B}" if B > 1 else ""), sizes)


SPECS = (
  _llama3_8b(M=16, S=8192),
  _llama3_8b(M=64, S=8192),
  _llama3_8b(M=256, S=8192),
  _llama3_8b(M=64, S=32768),
  _llama3_8b(M=1, S=8192, B=8),
  Spec(
    "gemma2-9b-window",
    dict(B=1, M=16, N=16, K=8, H=256, S=8192),
    options={"window": 4096, "logit_cap": 50.0},
  ),
  Spec("odd-mha", dict(B=2, M=5, N=3, K=3, H=64, S=1000), dtype="float32"),
)


def inputs(spec: Spec, key: jax.Array) -> Inputs:
  """Full caches, and binary trees: the children of node i are 2i + 1 and 2i + 2."""
  B, M, N, K, H, S = (spec.sizes[x] for x in "BMNKHS")
  shapes = dict(
    q=(B, M, N, H), k_cache=(B, K, S, H), v_cache=(B, K, S, H), k_nodes=(B, M, K, H),
    v_nodes=(B, M, K, H),
  )  # fmt: skip
  keys = jax.random.split(key, len(shapes))
  arrays = {
    name: jax.random.normal(k, shape, spec.dtype) for k, (name, shape) in zip(keys, shapes.items())
  }
  node = jnp.arange(M)
  ancestors, at = jnp.eye(M, dtype=bool), node
  for _ in range(M.bit_length()):
    at = jnp.maximum((at - 1) // 2, 0)
    ancestors = ancestors | (at[:, None] == node)
  others = dict(length=jnp.full(B, S, jnp.int32), ancestors=jnp.broadcast_to(ancestors, (B, M, M)))
  return Inputs(arrays, others, {"cache_layout": "BKSH", **spec.options})


def cost(spec: Spec) -> Cost:
  """The cache (or its window) is read once and meets every query row."""
  B, M, N, K, H, S = (spec.sizes[x] for x in "BMNKHS")
  seen = min(S, spec.options.get("window", S))
  size = jnp.dtype(spec.dtype).itemsize
  return Cost(
    flops=4 * B * N * M * (seen + M) * H,
    bytes=size * B * (2 * K * (seen + M) * H + 2 * M * N * H),
  )


def inner_loops(spec: Spec, chip: Chip) -> tuple[Inner, ...]:
  """The loop over tiles without mask code."""
  from pallas_kernels.tree_attention._common import TPUConfig
  from pallas_kernels.tree_attention.mosaic_tpu import tiles_of

  B, M, N, K, H, S = (spec.sizes[x] for x in "BMNKHS")
  rows = M * N // K
  _, tile_rows, tile = tiles_of(TPUConfig(), rows, S)
  seen = min(S, spec.options.get("window", S))
  loop = Inner(
    kernel="tree_attention_fwd",
    loop=(0, -2),  # before the loop over the last, masked tile
    unit="query tile x cache tile",
    units_per_trip=1,
    macs_per_trip=2 * tile_rows * tile * H,
    trips=B * K * -(-rows // tile_rows) * (seen // tile),
  )
  return (loop,)
