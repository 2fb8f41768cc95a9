# SPDX-License-Identifier: Apache-2.0
"""Heads of real models: their vocabularies and widths, for training and for distilling."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._specs import Cost, Inner, Inputs, Spec
from pallas_kernels._tpu import Chip

# T tokens, V words, D width of states and head. Options besides the op's: ``teacher``, whether the
# loss is a KL to a teacher of the same width.
SPECS = (
  Spec("llama3-8b", dict(T=8192, V=128256, D=4096)),
  Spec("llama3-8b-kl", dict(T=4096, V=128256, D=4096), options={"teacher": True}),
  Spec("qwen3-4b", dict(T=8192, V=151936, D=2560)),
  Spec("qwen3-4b-top10", dict(T=4096, V=151936, D=2560), options={"teacher": True, "top_k": 10}),
  Spec("gemma2-2b", dict(T=4096, V=256000, D=2304), options={"logit_cap": 30.0}),
  Spec("tinyllama-long", dict(T=65536, V=32000, D=2048)),
  Spec("odd-float32", dict(T=1021, V=32003, D=1024), dtype="float32"),
)


def inputs(spec: Spec, key: jax.Array) -> Inputs:
  """Normal states and heads that give logits of deviation 1."""
  T, V, D = (spec.sizes[x] for x in "TVD")
  keys = jax.random.split(key, 4)

  def states(key):
    return jax.random.normal(key, (T, D), spec.dtype)

  def head(key):
    return (jax.random.normal(key, (V, D)) * D**-0.5).astype(spec.dtype)

  options = dict(spec.options)
  if options.pop("teacher", False):
    others = {"teacher_hidden": states(keys[2]), "teacher_head": head(keys[3])}
  else:
    others = {"labels": jax.random.randint(keys[2], (T,), 0, V)}
  return Inputs({"hidden": states(keys[0]), "head": head(keys[1])}, others, options)


def cost(spec: Spec) -> Cost:
  """One product a head; states and heads are read once."""
  T, V, D = (spec.sizes[x] for x in "TVD")
  heads = 2 if spec.options.get("teacher") else 1
  return Cost(
    flops=2 * T * V * D * heads,
    bytes=heads * (T + V) * D * jnp.dtype(spec.dtype).itemsize + 4 * T,
  )


def inner_loops(spec: Spec, chip: Chip) -> tuple[Inner, ...]:
  """Logits of sub-blocks; in the backward kernel also columns of both gradients."""
  from pallas_kernels.linear_cross_entropy._config import TPUConfig
  from pallas_kernels.linear_cross_entropy.mosaic_tpu import plan

  T, V, D = (spec.sizes[x] for x in "TVD")
  abstract = jax.ShapeDtypeStruct((V, D), spec.dtype)
  dense = spec.options.get("teacher") and "top_k" not in spec.options
  forward, backward = plan(
    TPUConfig(), (T, D), abstract, jnp.dtype(spec.dtype), abstract if dense else None, 1.0,
    spec.options.get("logit_cap"), on=chip,
  )  # fmt: skip
  passes = 6 if forward.dtype.itemsize == 4 else 1  # of a float32 product at highest precision

  def logits(rules, name, is_backward):
    steps = -(-T // rules.tokens) * rules.blocks
    return Inner(
      kernel=name,
      loop=(0, 0),
      unit=f"{rules.sub} words x {rules.tokens} tokens",
      units_per_trip=1,
      macs_per_trip=(2 if dense else 1) * passes * rules.sub * rules.tokens * D,
      trips=steps * (rules.rows // rules.sub),
      backward=is_backward,
    )

  prefix = "linear_cross_entropy_"
  gradients = Inner(
    kernel=prefix + "backward",
    loop=(0, 1),
    unit=f"{backward.chunk} columns, {backward.rows} words and {backward.tokens} tokens",
    units_per_trip=1,
    macs_per_trip=2 * passes * backward.rows * backward.tokens * backward.chunk,
    trips=-(-T // backward.tokens) * backward.blocks * (D // backward.chunk),
    backward=True,
  )
  return (
    logits(forward, prefix + "forward", False),
    logits(backward, prefix + "backward", True),
    gradients,
  )
