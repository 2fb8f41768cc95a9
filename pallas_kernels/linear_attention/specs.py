# SPDX-License-Identifier: Apache-2.0
"""Shapes of linear attention in real models. Sizes: B, T, Q, K, V (heads of q, k, v), H, W = Hv."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels._specs import Cost, Inner, Inputs, Spec
from pallas_kernels._tpu import Chip

SPECS = (
  # RetNet 6.7B: value heads twice as wide, a fixed decay a head.
  Spec(
    "retnet-6.7b",
    dict(B=1, T=8192, Q=16, K=16, V=16, H=256, W=512),
    options={"decay": "fixed"},
  ),
  # MiniMax-01: Lightning Attention, 64 heads of 128.
  Spec("minimax-01", dict(B=1, T=8192, Q=64, K=64, V=64, H=128, W=128), options={"decay": "fixed"}),
  # Mamba-2 2.7B: q = C and k = B have one group, 80 heads of 64 values.
  Spec(
    "mamba2-2.7b",
    dict(B=1, T=8192, Q=1, K=1, V=80, H=128, W=64),
    options={"decay": "scalar", "scale": 1.0},
  ),
  # GLA 1.3B: 4 heads, keys half as wide as values.
  Spec("gla-1.3b", dict(B=1, T=4096, Q=4, K=4, V=4, H=256, W=512), options={"decay": "channel"}),
  # One long sequence, the shape of the memory measurements.
  Spec("long", dict(B=1, T=65536, Q=16, K=16, V=16, H=128, W=128), options={"decay": "scalar"}),
  # Nothing fits: odd widths, three queries a key, packed documents, float32.
  Spec(
    "odd",
    dict(B=2, T=1021, Q=6, K=2, V=2, H=72, W=40),
    dtype="float32",
    options={"decay": "scalar", "documents": True},
  ),
)


def inputs(spec: Spec, key: jax.Array) -> Inputs:
  """Unit normal q, k, v; log-decays of half-lives from a few tokens to a few thousand."""
  keys = jax.random.split(key, 5)
  b, t, heads = spec.B, spec.T, _heads(spec)
  shapes = ((b, t, spec.Q, spec.H), (b, t, spec.K, spec.H), (b, t, spec.V, spec.W))
  q, k, v = (jax.random.normal(x, shape, spec.dtype) for x, shape in zip(keys, shapes))
  differentiable = {"q": q, "k": k, "v": v}
  others = {}
  decay = spec.options["decay"]
  if decay == "fixed":
    others["log_decay"] = jnp.log1p(-(2.0 ** -jnp.linspace(5, 12, heads)))[None, None]
  else:
    shape = (b, t, heads) + ((spec.H,) if decay == "channel" else ())
    differentiable["log_decay"] = -jnp.exp(jax.random.uniform(keys[3], shape, minval=-8, maxval=0))
  if spec.options.get("documents"):
    others["segment_ids"] = jnp.cumsum(jax.random.bernoulli(keys[4], 0.01, (b, t)), 1, jnp.int32)
  static = {"scale": spec.options["scale"]} if "scale" in spec.options else {}
  return Inputs(differentiable, others, static)


def cost(spec: Spec) -> Cost:
  """Of the recurrence, which needs no chunks: 2 H Hv multiply-adds a token and head."""
  tokens, itemsize = spec.B * spec.T, jnp.dtype(spec.dtype).itemsize
  heads = _heads(spec)
  elements = tokens * (spec.Q * spec.H + spec.K * spec.H + (spec.V + heads) * spec.W)
  decays = {"fixed": heads, "scalar": tokens * heads, "channel": tokens * heads * spec.H}
  states = spec.B * heads * spec.H * spec.W
  return Cost(
    flops=4 * tokens * heads * spec.H * spec.W,
    bytes=elements * itemsize + 4 * (decays[spec.options["decay"]] + 2 * states),
  )


def inner_loops(spec: Spec, chip: Chip) -> tuple[Inner, ...]:
  """Grid steps, which unroll their chunks; with channel decay the loops over chunks inside them.

  Multiply-adds are those of the chunked form, not of the padding of H and Hv to lanes.
  """
  from pallas_kernels._dispatch import target
  from pallas_kernels.linear_attention import mosaic_tpu

  decay = "scalar" if spec.options["decay"] == "fixed" else spec.options["decay"]
  h, width = spec.H, spec.W
  with target("tpu", generation=chip.name):
    chunk, per_step, steps = mosaic_tpu.chunks_of(spec.T, h, width, decay, spec.dtype)
  square, state = chunk * chunk, chunk * h * width
  steps *= spec.B * _heads(spec)

  def inner(kernel, loop, units, macs):
    name = f"linear_attention_{kernel}"
    trips = steps * (per_step // units)
    return Inner(name, loop, "chunk", units, units * macs, trips, kernel == "backward")

  forward, backward = square * (h + width) + 2 * state, square * (3 * h + 2 * width) + 4 * state
  if decay == "scalar":
    return (
      inner("forward", (0,), per_step, forward),
      inner("backward", (0,), per_step, backward + state),
    )
  more = (int(math.log2(chunk)) - 1) * square * h  # products of binary splitting
  return (
    inner("forward", (0, 0), 1, forward + more),
    inner("backward", (0, 0), 1, state),  # the states before each chunk
    inner("backward", (0, 1), 1, backward + 3 * more),
  )


def _heads(spec: Spec) -> int:
  return max(spec.Q, spec.K, spec.V)
