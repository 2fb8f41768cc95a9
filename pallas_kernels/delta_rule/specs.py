# SPDX-License-Identifier: Apache-2.0
"""Shapes of the delta rule in real models. Sizes: B, T, K (heads of q, k), N (of v), H, W = Hv."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import target
from pallas_kernels._specs import Cost, Inner, Inputs, Spec
from pallas_kernels._tpu import Chip

SPECS = (
  # Qwen3-Next 80B-A3B: gated, two value heads a key head.
  Spec("qwen3-next", dict(B=1, T=8192, K=16, N=32, H=128, W=128), options={"decay": "scalar"}),
  # DeltaNet 1.3B: no decay.
  Spec("deltanet-1.3b", dict(B=1, T=4096, K=16, N=16, H=128, W=128), options={"decay": "none"}),
  # Kimi Linear 48B-A3B (KDA): a decay a channel.
  Spec("kimi-linear", dict(B=1, T=4096, K=32, N=32, H=128, W=128), options={"decay": "channel"}),
  # One long sequence, the shape of the memory measurements.
  Spec("long", dict(B=1, T=65536, K=16, N=16, H=128, W=128), options={"decay": "scalar"}),
  # Nothing fits: odd widths, three value heads a key head, packed documents, float32.
  Spec(
    "odd",
    dict(B=2, T=1021, K=2, N=6, H=72, W=40),
    dtype="float32",
    options={"decay": "scalar", "documents": True},
  ),
)


def inputs(spec: Spec, key: jax.Array) -> Inputs:
  """Normal q and v, keys of norm 1; log-decays of half-lives from a few tokens to thousands."""
  keys = jax.random.split(key, 6)
  b, t, n, h = spec.B, spec.T, spec.N, spec.H
  shapes = ((b, t, spec.K, h), (b, t, spec.K, h), (b, t, n, spec.W))
  q, k, v = (jax.random.normal(x, shape) for x, shape in zip(keys, shapes))
  k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
  beta = jax.nn.sigmoid(jax.random.normal(keys[3], (b, t, n)))
  differentiable = {
    name: x.astype(spec.dtype) for name, x in dict(q=q, k=k, v=v, beta=beta).items()
  }
  others = {}
  decay = spec.options["decay"]
  if decay != "none":
    shape = (b, t, n) + ((h,) if decay == "channel" else ())
    differentiable["log_decay"] = -jnp.exp(jax.random.uniform(keys[4], shape, minval=-8, maxval=0))
  if spec.options.get("documents"):
    others["segment_ids"] = jnp.cumsum(jax.random.bernoulli(keys[5], 0.01, (b, t)), 1, jnp.int32)
  return Inputs(differentiable, others)


def cost(spec: Spec) -> Cost:
  """Of the recurrence, which needs no chunks: 3 H Hv multiply-adds a token and head."""
  tokens, itemsize = spec.B * spec.T, jnp.dtype(spec.dtype).itemsize
  decays = {"none": 0, "scalar": 1, "channel": spec.H}[spec.options["decay"]]
  elements = tokens * (2 * spec.K * spec.H + spec.N * (2 * spec.W + 1))
  states = spec.B * spec.N * spec.H * spec.W
  return Cost(
    flops=6 * tokens * spec.N * spec.H * spec.W,
    bytes=elements * itemsize + 4 * (tokens * spec.N * decays + 2 * states),
  )


def inner_loops(spec: Spec, chip: Chip) -> tuple[Inner, ...]:
  """The grid step of each kernel, which unrolls its chunks. Padding of lanes isn't counted."""
  from pallas_kernels.delta_rule import mosaic_tpu  # the kernels are not needed for shapes
  from pallas_kernels.delta_rule._tpu_backward import backward_products
  from pallas_kernels.delta_rule._tpu_forward import forward_products

  channel = spec.options["decay"] == "channel"
  with target("tpu", generation=chip.name):
    layout = mosaic_tpu.layout(
      (spec.B, spec.T, spec.N, spec.H, spec.W), (spec.K, spec.K, spec.N), channel, spec.dtype
    )
  units = layout.each * layout.group
  return tuple(
    Inner(
      kernel=f"delta_rule_{name}",
      loop=(0,),
      unit="chunk",
      units_per_trip=units,
      macs_per_trip=units * products(layout),
      trips=spec.B * (spec.N // layout.each) * layout.steps,
      backward=name == "backward",
    )
    for name, products in (("forward", forward_products), ("backward", backward_products))
  )
