# SPDX-License-Identifier: Apache-2.0
"""Softmax attention on split sequences: every rank's output and gradients against one device."""

from __future__ import annotations

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdec.errors import UserError
from jaxdec.parallel import sequence
from jaxdec.parallel.plan import hlo
from jaxdec.parallel.plan.collectives import collectives
from jaxdec.parallel.sequence import ring
from jaxdec.parallel.sequence.block_attention import Rule
from jaxdec.parallel.sequence.ulysses import repeated_heads
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


def split(f, ranks, *, check_vma=True, mesh=None, axis="seq"):
  """``f(q, k, v, dout, ids)`` on every rank's shard, forward and backward."""
  spec = P(None, axis)
  return jax.shard_map(
    functools.partial(with_gradients, f),
    mesh=mesh or mesh_of(ranks),
    in_specs=spec,
    out_specs=spec,
    check_vma=check_vma,
  )


def lies(tree, ranks, layout):
  """Whole arrays in the order of the layout."""
  if layout == "contiguous":
    return tree
  return jax.tree.map(lambda x: sequence.to_zigzag(np.asarray(x), ranks), tree)


def assert_each_rank_close(got, expected, ranks, tolerance, label=""):
  """Per rank, since an error of one rank drowns in the norm of all."""
  for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected):
    x, y = (np.asarray(a, np.float64).reshape(B, ranks, -1) for a in (x, y))
    error = np.abs(x - y).max(axis=(0, 2)) / max(np.abs(y).max(), 1.0)
    assert np.all(error <= tolerance), f"{label} {name}: error by rank {error}"


CASES = [
  {"causal": causal, "packed": packed, "kv_heads": kv_heads}
  for causal, packed, kv_heads in itertools.product((True, False), (False, True), (1, 4))
]
WINDOWS = [
  {"causal": causal, "packed": packed, "kv_heads": 2, "window": window, "logit_cap": 2.0}
  for causal, packed, window in (
    (True, False, 3), (True, True, 7), (True, False, 13), (False, False, 6), (False, True, 21),
  )
]  # fmt: skip
QUICK = [{"causal": True, "packed": True, "kv_heads": 2}]


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


def sharded(method, layout, ranks, case, check_vma=True):
  options = {x: y for x, y in case.items() if x not in ("packed", "kv_heads")}
  degree = min(2, ranks) if method == "usp" else None
  f = functools.partial(
    sequence.attention,
    axis_name="seq",
    method=method,
    layout=layout,
    ulysses_degree=degree,
    **options,
  )
  return split(f, ranks, check_vma=check_vma)


def arguments(cases, dtype):
  return {n: data(n, dtype) for n in {case["kv_heads"] for case in cases}}, documents()


def compiled(method, layout, ranks, cases, dtype, check_vma=True):
  """One program with all cases, forward and backward."""

  def all_cases(arrays, ids):
    results = []
    for case in cases:
      args = *arrays[case["kv_heads"]], ids if case["packed"] else None
      results.append(sharded(method, layout, ranks, case, check_vma)(*args))
    return results

  args = lies(arguments(cases, dtype), ranks, layout)
  return jax.jit(all_cases, compiler_options=COMPILE_ONCE).lower(*args).compile(), args


def check(method, layout, ranks, cases, wanted, dtype, tolerance, check_vma=True):
  program, args = compiled(method, layout, ranks, cases, dtype, check_vma)
  for case, x, y in zip(cases, program(*args), lies(wanted, ranks, layout)):
    assert_each_rank_close(x, y, ranks, tolerance, f"{method} {layout} W={ranks} {case}")
  return program


def communicated(program, ranks):
  """Of a compiled program: ``{(kind, phase): number}`` and bytes in each phase."""
  counts, sizes = collections.Counter(), collections.Counter()
  for x in collectives(hlo.parse(program.as_text()), mesh_of(ranks)):
    counts[x.kind, x.phase] += x.count
    sizes[x.phase] += x.total
  return dict(counts), (sizes["forward"], sizes["backward"])


@pytest.fixture(scope="module")
def quick():
  return expected(QUICK, jnp.float32)


def formula(method, layout, ranks, documents=True, **options):
  return sequence.communicated_bytes(
    method, ranks=ranks, batch=B, length=T, heads=N, kv_heads=2, head_dim=H, itemsize=4,
    layout=layout, ulysses_degree=2 if method == "usp" else None, documents=documents, **options,
  )  # fmt: skip


# Forward and backward, besides the all-gather of document ids: of 4 ranks, usp of 8 as a ring of 4
# pairs. (A ring of 2 goes both ways at once, and XLA:CPU merges the permutes of both passes.)
COUNTS = {
  "allgather": ({"all-gather": 1}, {"reduce-scatter": 1}),
  "ring": ({"collective-permute": 3}, {"collective-permute": 3 + 3}),
  "ulysses": ({"all-to-all": 2}, {"all-to-all": 2}),
  "usp": (
    {"all-to-all": 2, "collective-permute": 3},
    {"all-to-all": 2, "collective-permute": 3 + 3},
  ),
  "ring_self_attention": ({"collective-permute": 3 + 3}, {"collective-permute": 3 + 3}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_results_collectives_and_bytes_of_each_method(method, layout, quick):
  """float32, packed causal grouped heads: results per rank; what the compiled program sends."""
  vma, ranks = layout == "zigzag", 8 if method == "usp" else 4
  program = check(method, layout, ranks, QUICK, quick, jnp.float32, 1e-5, check_vma=vma)
  counts, sizes = communicated(program, ranks)
  forward, backward = COUNTS[method]
  forward = {**forward, "all-gather": forward.get("all-gather", 0) + 1}
  wanted = {(kind, "forward"): n for kind, n in forward.items()}
  assert counts == wanted | {(kind, "backward"): n for kind, n in backward.items()}
  assert sizes == formula(method, layout, ranks)


def test_a_ring_without_one_of_its_steps_is_seen(monkeypatch, quick):
  whole = ring.schedule
  monkeypatch.setattr(ring, "schedule", lambda *args: (whole(*args)[0], *whole(*args)[2:]))
  with pytest.raises(AssertionError, match=r"ring contiguous W=4 .* out: error by rank"):
    check("ring", "contiguous", 4, QUICK, quick, jnp.float32, 1e-5)


def test_a_long_ring_is_a_loop(monkeypatch, quick):
  monkeypatch.setattr(ring, "UNROLLED", 2)
  program = check("ring", "zigzag", 4, QUICK, quick, jnp.float32, 1e-5)
  assert communicated(program, 4)[1] == formula("ring", "zigzag", 4)


def test_one_rank_communicates_nothing():
  for method in METHODS:
    f = sharded(method, "zigzag", 1, QUICK[0])
    text = jax.jit(f).lower(*data(2, jnp.float32), documents()).as_text()
    assert not re.findall(r"stablehlo\.(all_\w+|collective_\w+|reduce_scatter)", text)
    if method != "usp":
      assert formula(method, "zigzag", 1) == (0, 0)


def work(ranks, layout, **options):
  """Of each step after the first, pairs of runs that each rank computes."""
  rule = Rule(options.pop("causal", True), options.pop("window", None), None, 1.0)
  steps = ring.schedule(ranks, 8 * ranks, layout, rule)
  return [
    [sum(pair.kinds[r] != "hidden" for pair in step.pairs) for r in range(ranks)]
    for step in steps[1:]
  ]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zigzag_gives_every_rank_half_of_a_block_pair_in_every_step(ranks):
  assert work(ranks, "zigzag") == [[2] * ranks] * (ranks - 1)  # of 2 x 2 pairs of runs
  contiguous = work(ranks, "contiguous")
  assert contiguous == [[int(r >= s) for r in range(ranks)] for s in range(1, ranks)]
  assert work(ranks, "contiguous", causal=False) == [[1] * ranks] * (ranks - 1)


def test_a_window_ends_the_ring():
  # Shards of 8 tokens, the farthest key window - 1 tokens back.
  for window, shards in ((1, 0), (2, 1), (9, 1), (10, 2), (17, 2), (18, 3), (100, 3)):
    rule = Rule(True, window, None, 1.0)
    steps = ring.schedule(4, 8, "contiguous", rule)
    assert [step.shift for step in steps] == list(range(shards + 1))
  assert [s.shift for s in ring.schedule(8, 8, "zigzag", Rule(True, 4, None, 1.0))] == [0, 1, 7]
  assert (
    formula("ring", "contiguous", 4, window=2).forward < formula("ring", "contiguous", 4).forward
  )


def test_kv_heads_are_sent_as_few_times_as_may_be():
  assert [repeated_heads(k, w) for k, w in ((8, 4), (2, 4), (1, 8), (6, 4))] == [8, 4, 8, 12]


def test_a_rematerialised_ring_goes_round_once():
  """With the output kept by its name the backward pass runs no second forward ring."""

  def permutes(policy):
    def local(q, k, v):
      f = lambda q, k, v: sequence.attention(q, k, v, axis_name="seq", method="ring")  # noqa: E731
      f = jax.checkpoint(f, policy=policy)
      return jax.grad(lambda *xs: jnp.sum(jnp.sin(f(*xs))), (0, 1, 2))(q, k, v)

    spec = P(None, "seq")
    mapped = jax.shard_map(local, mesh=mesh_of(2), in_specs=spec, out_specs=spec)
    text = jax.jit(mapped).lower(*data(2, jnp.float32)[:3]).as_text()
    return text.count("stablehlo.collective_permute")

  names = jax.checkpoint_policies.save_only_these_names
  assert permutes(names("sequence_state")) == 3
  assert permutes(names("other")) == 4


def test_two_mesh_axes(quick):
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("ring", "heads"))
  f = functools.partial(
    sequence.attention, axis_name=("ring", "heads"), method="usp", layout="zigzag"
  )
  f = split(f, 4, mesh=mesh, axis=("ring", "heads"))
  args = lies((*data(2, jnp.float32), documents()), 4, "zigzag")
  got = jax.jit(f, compiler_options=COMPILE_ONCE)(*args)
  assert_each_rank_close(got, lies(quick[0], 4, "zigzag"), 4, 1e-5)


def test_mistakes_are_one_sentence():
  q, k, v, _ = data(2, jnp.float32)

  def call(ranks=4, layout="contiguous", q=q, k=k, v=v, ids=None, **options):
    f = lambda q, k, v, ids: sequence.attention(  # noqa: E731
      q, k, v, segment_ids=ids, axis_name="seq", layout=layout, **options
    )
    spec = P(None, "seq")
    jax.shard_map(f, mesh=mesh_of(ranks), in_specs=spec, out_specs=spec)(q, k, v, ids)

  with pytest.raises(UserError, match=r"did you mean 'ring'"):
    call(method="rings")
  with pytest.raises(UserError, match=r"8 ranks .* 8 does not divide 4 heads; use method='usp'"):
    call(ranks=8, method="ulysses", q=q[:, :, :4])
  with pytest.raises(UserError, match=r"needs ulysses_degree"):
    call(method="usp")
  with pytest.raises(UserError, match=r"ulysses_degree=3 must divide the 4 ranks"):
    call(method="usp", ulysses_degree=3)
  with pytest.raises(UserError, match=r"K a divisor of N"):
    call(q=q[:, :, :3])
  with pytest.raises(UserError, match=r"segment_ids have shape \(1, 8\), expected \(2, 8\)"):
    call(ids=documents()[:1])
  with pytest.raises(UserError, match=r"5 tokens cannot hold the two runs of the zigzag layout"):
    call(q=q[:, :20], k=k[:, :20], v=v[:, :20], layout="zigzag")


@pytest.fixture(scope="module")
def exact():
  with jax.enable_x64(True):
    return {len(cases): expected(cases, jnp.float64) for cases in (CASES, WINDOWS)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_one_device_op(method, ranks, layout, exact):
  """float64: causal or not, packed or not, one and four key/value heads."""
  with jax.enable_x64(True):
    wanted = exact[len(CASES)]
    check(method, layout, ranks, CASES, wanted, jnp.float64, 1e-12, check_vma=ranks != 4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_windows_and_soft_caps(method, layout, exact):
  with jax.enable_x64(True):
    check(method, layout, 4, WINDOWS, exact[len(WINDOWS)], jnp.float64, 1e-12)
