# SPDX-License-Identifier: Apache-2.0
"""Shapes of block-sparse attention in real models. ``block`` is both sizes of a tile; T = S."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._specs import Cost, Inner, Inputs, Spec
from pallas_kernels._tpu import Chip
from pallas_kernels.block_sparse_attention.pattern import BlockPattern


def _sizes(B: int, T: int, N: int, K: int, H: int, block: int) -> dict[str, int]:
  return dict(B=B, T=T, N=N, K=K, H=H, block=block)


SPECS = (
  # Dense causal attention, the measure against kernels of static masks.
  Spec("dense", _sizes(1, 4096, 8, 8, 128, 512)),
  Spec("dense-128", _sizes(1, 4096, 8, 8, 128, 128)),
  # Prefill of Llama-3 8B with a gate's choice for each key/value head (SeerAttention).
  Spec("llama3-8b-quarter", _sizes(1, 8192, 32, 8, 128, 128), options={"density": 0.25}),
  Spec("llama3-8b-tenth", _sizes(1, 8192, 32, 8, 128, 128), options={"density": 0.1}),
  Spec("llama3-8b-quarter-512", _sizes(1, 8192, 32, 8, 128, 512), options={"density": 0.25}),
  Spec("llama3-8b-long", _sizes(1, 65536, 32, 8, 128, 128), options={"density": 0.1}),
  # Nothing fits: a prime length, three queries a key, packed documents, float32.
  Spec(
    "odd",
    _sizes(2, 1021, 6, 2, 80, 128),
    dtype="float32",
    options={"density": 0.5, "documents": True},
  ),
)


def inputs(spec: Spec, key: jax.Array) -> Inputs:
  """Unit normal q, k, v; of the causal tiles the diagonal and a random share, or all of them."""
  keys = jax.random.split(key, 5)
  B, T, S, K = spec.B, spec.T, spec.T, spec.K
  shapes = ((B, T, spec.N, spec.H), (B, S, K, spec.H), (B, S, K, spec.H))
  q, k, v = (jax.random.normal(x, shape, spec.dtype) for x, shape in zip(keys, shapes))
  density = spec.options.get("density")
  if density is None:
    blocks = BlockPattern.from_rule(T, S, block_q=spec.block, block_kv=spec.block)
  else:
    nq, nk = -(-T // spec.block), -(-S // spec.block)
    blocks = BlockPattern.from_threshold(
      jax.random.uniform(keys[3], (B, K, nq, nk)),
      1 - density,
      block_q=spec.block,
      block_kv=spec.block,
      T=T,
      S=S,
      max_blocks=min(nk, round(2 * density * nk) + 8),
    )
  others = {"blocks": blocks}
  if spec.options.get("documents"):
    others["segment_ids"] = jnp.cumsum(
      jax.random.bernoulli(keys[4], 0.01, (B, T)), axis=1, dtype=jnp.int32
    )
  return Inputs({"q": q, "k": k, "v": v}, others)


def cost(spec: Spec) -> Cost:
  """Of the visible pairs of tokens (documents not counted): two products of H multiply-adds."""
  pairs = spec.B * spec.N * spec.T * (spec.T + 1) // 2
  itemsize = jnp.dtype(spec.dtype).itemsize
  elements = 2 * spec.B * spec.H * (spec.T * (spec.N + spec.K))
  return Cost(
    flops=int(4 * spec.H * pairs * spec.options.get("density", 1.0)),
    bytes=elements * itemsize + 4 * spec.B * spec.N * spec.T,
  )


def inner_loops(spec: Spec, chip: Chip) -> tuple[Inner, ...]:
  """The loops over tiles of both kernels, for the dense causal pattern."""
  from pallas_kernels.block_sparse_attention import _tpu_cost  # not needed for shapes

  return _tpu_cost.inner_loops(spec, chip)
