# SPDX-License-Identifier: Apache-2.0
"""Softmax attention on split sequences: every rank's output and gradients against one device."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdec.parallel import sequence
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.testing import COMPILE_ONCE

B, T, N, H = 2, 32, 8, 4
METHODS = ("allgather", "ring", "ulysses", "usp", "ring_self_attention")
LAYOUTS = ("contiguous", "zigzag")


def mesh_of(ranks):
  return Mesh(np.array(jax.devices()[:ranks]), ("seq",))


def documents():
  """One row of documents shorter than a shard, straddling, ending on its edges, with padding."""
  short = np.repeat(np.arange(13), [1, 3, 4, 2, 1, 1, 5, 3, 4, 2, 1, 3, 2])
  long = np.repeat([5, 6, -1], [19, 10, 3])
  return np.stack([short, long]).astype(np.int32)


def data(kv_heads, dtype, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (N, kv_heads, kv_heads, N)
  return [jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in shapes]


def with_gradients(f, q, k, v, dout, ids):
  out, pull = jax.vjp(lambda q, k, v: f(q, k, v, segment_ids=ids), q, k, v)
  return (out, *pull(dout))


def split(f, ranks, layout, *, check_vma=True, mesh=None, axis="seq"):
  """``f(q, k, v, dout, ids)`` on every rank's shard, forward and backward; whole arrays again."""
  spec = P(None, axis)
  zigzag = layout == "zigzag"

  def whole(*args):
    args = [sequence.to_zigzag(x, ranks) if zigzag and x is not None else x for x in args]
    results = jax.shard_map(
      functools.partial(with_gradients, f),
      mesh=mesh or mesh_of(ranks),
      in_specs=spec,
      out_specs=spec,
      check_vma=check_vma,
    )(*args)
    return [sequence.from_zigzag(x, ranks) if zigzag else x for x in results]

  return whole


def assert_each_rank_close(got, expected, ranks, tolerance, label=""):
  """Per rank, since an error of one rank drowns in the norm of all."""
  for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected):
    x, y = (np.asarray(a, np.float64).reshape(B, ranks, -1) for a in (x, y))
    error = np.abs(x - y).max(axis=(0, 2)) / max(np.abs(y).max(), 1.0)
    assert np.all(error <= tolerance), f"{label} {name}: error by rank {error}"


CASES = [
  {"causal": causal, "packed": packed, "kv_heads": kv_heads, **options}
  for causal, packed, kv_heads in itertools.product((True, False), (False, True), (1, 4))
  for options in ({},)
]
WINDOWS = [
  {"causal": causal, "packed": packed, "kv_heads": 2, "window": window, "logit_cap": 2.0}
  for causal in (True, False)
  for packed, window in ((False, 3), (True, 7), (False, 13))
]


def expected(cases, dtype):
  def all_cases(arrays, ids):
    results = []
    for case in cases:
      options = {x: y for x, y in case.items() if x not in ("packed", "kv_heads")}
      f = functools.partial(block_sparse_attention, **options)
      results.append(with_gradients(f, *arrays[case["kv_heads"]], ids if case["packed"] else None))
    return results

  arrays = {n: data(n, dtype) for n in {case["kv_heads"] for case in cases}}
  return jax.jit(all_cases, compiler_options=COMPILE_ONCE)(arrays, documents())


def check(method, layout, ranks, cases, wanted, dtype, tolerance, check_vma):
  def all_cases(arrays, ids):
    results = []
    for case in cases:
      options = {x: y for x, y in case.items() if x not in ("packed", "kv_heads")}
      f = functools.partial(
        sequence.attention, axis_name="seq", method=method, layout=layout, **options,
        ulysses_degree=min(2, ranks) if method == "usp" else None,
      )  # fmt: skip
      args = *arrays[case["kv_heads"]], ids if case["packed"] else None
      results.append(split(f, ranks, layout, check_vma=check_vma)(*args))
    return results

  arrays = {n: data(n, dtype) for n in {case["kv_heads"] for case in cases}}
  got = jax.jit(all_cases, compiler_options=COMPILE_ONCE)(arrays, documents())
  for case, x, y in zip(cases, got, wanted):
    assert_each_rank_close(x, y, ranks, tolerance, f"{method} {layout} W={ranks} {case}")


@pytest.fixture(scope="module")
def exact():
  with jax.enable_x64(True):
    cases = CASES + WINDOWS
    return cases, expected(cases, jnp.float64)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_one_device_op(method, ranks, layout, exact):
  with jax.enable_x64(True):
    check(method, layout, ranks, *exact, jnp.float64, 1e-12, check_vma=ranks != 4)
