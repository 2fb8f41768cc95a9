# SPDX-License-Identifier: Apache-2.0
"""Shapes of the published Mamba-1 models (d_inner channels, 16 states)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._specs import Cost, Inner, Inputs, Spec
from pallas_kernels._tpu import Chip

SPECS = (
  Spec("mamba-130m", dict(B=1, T=2048, D=1536, S=16)),
  Spec("mamba-1.4b", dict(B=1, T=4096, D=4096, S=16)),
  Spec("mamba-2.8b", dict(B=1, T=8192, D=5120, S=16)),
  Spec("mamba-130m-long", dict(B=1, T=65536, D=1536, S=16)),
  Spec("mamba-2.8b-decode", dict(B=16, T=1, D=5120, S=16)),
  Spec("odd", dict(B=2, T=1009, D=200, S=5), dtype="float32", options={"gate": False}),
)


def inputs(spec: Spec, key: jax.Array) -> Inputs:
  """Mamba's initialisation: A = -(1..S), dt log-uniform in [1e-3, 1e-1], D = 1."""
  B, T, D, S = (spec.sizes[x] for x in "BTDS")
  keys = jax.random.split(key, 6)
  low, high = jnp.log(1e-3), jnp.log(1e-1)
  arrays = dict(
    x=jax.random.normal(keys[0], (B, T, D), spec.dtype),
    dt=jnp.exp(jax.random.uniform(keys[1], (B, T, D), minval=low, maxval=high)),
    A=-jnp.broadcast_to(jnp.arange(1.0, S + 1.0), (D, S)),
    B=jax.random.normal(keys[2], (B, T, S), spec.dtype),
    C=jax.random.normal(keys[3], (B, T, S), spec.dtype),
    D=jnp.ones(D),
    initial_state=jax.random.normal(keys[4], (B, D, S)),
  )
  arrays["dt"] = arrays["dt"].astype(spec.dtype)
  if spec.options.get("gate", True):
    arrays["z"] = jax.random.normal(keys[5], (B, T, D), spec.dtype)
  return Inputs(arrays)


def cost(spec: Spec) -> Cost:
  """Per state and token: exponent, exponential, decay, input (2), sum, output (2): 8."""
  B, T, D, S = (spec.sizes[x] for x in "BTDS")
  size = jnp.dtype(spec.dtype).itemsize
  tokenwise = 4 if spec.options.get("gate", True) else 3
  return Cost(
    flops=8 * B * T * D * S + 6 * B * T * D,
    bytes=size * B * T * (tokenwise * D + 2 * S) + 4 * D * (S + 1) + 8 * B * D * S,
  )


def inner_loops(spec: Spec, chip: Chip) -> tuple[Inner, ...]:
  """The loops over groups of 8 tokens (a single group is no loop); no matrix products in them."""
  from pallas_kernels.selective_scan._common import TPUConfig
  from pallas_kernels.selective_scan._tpu_kernels import GROUP
  from pallas_kernels.selective_scan.mosaic_tpu import tiles

  B, T, D, S = (spec.sizes[x] for x in "BTDS")
  config = TPUConfig()
  block_t = min(config.block_t, -(-T // GROUP) * GROUP)
  if block_t == GROUP:
    return ()
  groups = B * -(-T // block_t) * (block_t // GROUP)
  padded = -(-D // 128) * 128
  forward, backward = tiles(config, D, S, config.block_t)

  def loop(kernel, path, tile, backward):
    unit = "token x 128 channels"
    units = GROUP * tile // 128
    return Inner(kernel, path, unit, units, 0, groups * padded // tile, backward)

  return (
    loop("selective_scan_fwd", (0, -1), forward, False),
    loop("selective_scan_bwd", (0, -2), backward, True),
    loop("selective_scan_bwd", (0, -1), backward, True),
  )
