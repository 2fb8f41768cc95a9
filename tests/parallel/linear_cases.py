# SPDX-License-Identifier: Apache-2.0
"""Inputs of recurrent layers, their op on one device, and both ways' outputs and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxdec.parallel import sequence
from jaxdec.parallel.mesh import make_mesh
from pallas_kernels import delta_rule, linear_attention, selective_scan
from pallas_kernels.testing import COMPILE_ONCE

KINDS = ("none", "scalar", "channel", "delta", "gated delta", "channel delta", "mamba")
EXCHANGES = ("gather", "scan", "chain")
B, T, N, K, H, WIDTH = 2, 32, 4, 2, 4, 6  # K heads of keys and values
# Edges on and off shard borders, documents of one token, and longer than several shards.
EDGES = ((3, 8, 16, 17), (9, 24, 27))
REPLICATED = ("initial_state", "A", "D")


def inputs(kind: str, dtype=jnp.float64, *, decay: float | None = None, seed: int = 0) -> dict:
  """Differentiable arrays by keyword. ``decay``: all log-decays, by default random ones."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
  if kind == "mamba":
    arrays = dict(
      x=normal(B, T, 8),
      dt=np.exp(rng.uniform(-4, 0, size=(B, T, 8))),
      A=-np.exp(rng.uniform(-2, 1, size=(8, H))),
      B=normal(B, T, H),
      C=normal(B, T, H),
      D=normal(8),
      z=normal(B, T, 8),
      initial_state=normal(B, 8, H),
    )
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
  arrays = dict(
    q=normal(B, T, N, H),
    k=normal(B, T, K, H),
    v=normal(B, T, K, WIDTH),
    initial_state=normal(B, N, H, WIDTH),
  )
  if "delta" in kind:
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    arrays["beta"] = rng.uniform(0, 1.5, size=(B, T, N))
  shape = {"scalar": (N,), "gated delta": (N,), "channel": (N, H), "channel delta": (N, H)}
  if kind in shape:
    logs = -np.exp(rng.uniform(-5, 1, size=(B, T, *shape[kind])))
    arrays["log_decay"] = logs if decay is None else np.full_like(logs, decay)
  return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def documents() -> jax.Array:
  """Segment ids ``[B,T]``, some beyond 16 bits and below zero."""
  ids = np.zeros((B, T), np.int32)
  for row, edges in zip(ids, EDGES):
    for i, edge in enumerate(edges):
      row[edge:] = (i + 1) * 70_000 * (-1) ** i
  return jnp.asarray(ids)


def one_device(arrays: Mapping[str, Any], segment_ids=None):
  """The op on the whole sequence."""
  if "x" in arrays:
    return selective_scan(**arrays, segment_ids=segment_ids)
  op = delta_rule if "beta" in arrays else linear_attention
  return op(**arrays, segment_ids=segment_ids)


def both_directions(arrays: Mapping[str, Any], segment_ids=None):
  """Forward and backward recurrence of the op on one device, minus what both of them count."""
  out, final = one_device(arrays, segment_ids)
  flip = lambda x: jnp.flip(x, 1)  # noqa: E731
  tokens = {n: flip(x) for n, x in arrays.items() if n not in REPLICATED}
  behind, _ = one_device(tokens, None if segment_ids is None else flip(segment_ids))
  q, k, v = (jnp.repeat(arrays[n], N // arrays[n].shape[2], 2) for n in "qkv")
  twice = H**-0.5 * jnp.sum(q * k, axis=-1, keepdims=True) * v
  return out + flip(behind) - twice, final


def many_devices(
  ranks: int, *, check_vma: bool, devices: Sequence | None = None, **options: Any
) -> Callable:
  """The sequence-parallel layer on whole arrays; a zigzag layout is undone on the outside."""
  mesh = make_mesh(seq=ranks, devices=devices)
  zigzag = options.get("layout") == "zigzag"
  tokens = P(None, "seq")

  def layer(arrays, segment_ids=None):
    split = {n: x for n, x in arrays.items() if n not in REPLICATED and x.shape[1] > 1}
    if segment_ids is not None:
      split["segment_ids"] = segment_ids
    if zigzag:
      split = {n: sequence.to_zigzag(x, ranks) for n, x in split.items()}
    whole = {n: x for n, x in arrays.items() if n not in split}
    f = sequence.selective_scan if "x" in arrays else sequence.linear_attention
    out, final = jax.shard_map(
      lambda split, whole: f(**split, **whole, axis_name="seq", **options),
      mesh=mesh,
      in_specs=(tokens, P()),
      out_specs=(tokens, P()),
      check_vma=check_vma,
    )(split, whole)
    return (sequence.from_zigzag(out, ranks) if zigzag else out), final

  return layer


def with_gradients(layer: Callable, arrays: Mapping[str, Any], segment_ids=None) -> dict[str, Any]:
  """Outputs, final state and gradients by all arrays, of a random weighting of both results."""

  def weighted(arrays):
    results = layer(arrays, segment_ids)
    # Constants: the compiler may round a random number of its own differently in two places.
    weights = [np.random.default_rng(i).normal(size=x.shape) for i, x in enumerate(results)]
    return sum(jnp.sum(x * jnp.asarray(w, x.dtype)) for x, w in zip(results, weights)), results

  (_, (out, final)), gradients = jax.value_and_grad(weighted, has_aux=True)(dict(arrays))
  return {"out": out, "final_state": final} | {f"d {n}": x for n, x in gradients.items()}


def run(layers: Mapping[str, Callable], arrays, segment_ids=None) -> dict[str, dict[str, Any]]:
  """``with_gradients`` of several layers in one program."""

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def program(arrays, segment_ids):
    return {name: with_gradients(f, arrays, segment_ids) for name, f in layers.items()}

  return program(arrays, segment_ids)


def errors(got: Mapping[str, Any], expected: Mapping[str, Any], ranks: int) -> dict[str, float]:
  """Largest error of each array, relative to its largest element, on each rank by itself."""
  found = {}
  assert got.keys() == expected.keys()
  for name, y in expected.items():
    x, y = np.asarray(got[name], np.float64), np.asarray(y, np.float64)
    assert x.shape == y.shape, name
    size = max(np.abs(y).max(), 1e-30)
    if y.ndim > 1 and y.shape[1] == T:
      for rank, (a, b) in enumerate(zip(np.split(x, ranks, 1), np.split(y, ranks, 1))):
        found[f"{name} on rank {rank}"] = np.abs(a - b).max() / size
    else:
      found[name] = np.abs(x - y).max() / size
  return found


def assert_equal(got, expected, ranks: int, tolerance: float) -> None:
  """Every array, rank by rank; the message names the wrong ones."""
  wrong = {n: e for n, e in errors(got, expected, ranks).items() if not e <= tolerance}
  assert not wrong, f"relative error above {tolerance}: {wrong}"
