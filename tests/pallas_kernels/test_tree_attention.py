# SPDX-License-Identifier: Apache-2.0
"""Tree attention: every implementation against the definition, the definition against paths."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels.testing import (
  COMPILE_ONCE,
  TOLERANCE,
  assert_close,
  relative_rms,
  value_and_gradients,
)
from pallas_kernels.tree_attention import (
  TPUConfig,
  XLAConfig,
  combine,
  pack_ancestors,
  tree_attention,
  unpack_ancestors,
)

IMPLEMENTATIONS = ("xla", "mosaic_tpu")


def on(implementation, interpret=True):
  """The context in which this machine can run it."""
  if implementation != "mosaic_tpu":
    return contextlib.nullcontext()
  return pallas_kernels.target("tpu", interpret=interpret)


def random_tree(rng, batch, nodes):
  """Ancestor-or-self matrices of random trees, parents before children."""
  ancestors = np.zeros((batch, nodes, nodes), bool)
  for b in range(batch):
    for i in range(nodes):
      if i:
        ancestors[b, i] = ancestors[b, rng.integers(max(0, i - 6), i)]
      ancestors[b, i, i] = True
  return ancestors


@dataclasses.dataclass(frozen=True)
class Case:
  M: int = 5
  S: int = 64
  lengths: tuple[int, ...] = (40, 64)
  N: int = 4
  K: int = 2
  H: int = 64
  V: int = 64
  P: int = 0
  dtype: str = "float32"
  layout: str = "BKSH"
  options: tuple = ()
  block: int = 128
  rows: int = 512
  transposed: bool | None = None

  def arrays(self, seed=0):
    rng = np.random.default_rng(seed)
    b = len(self.lengths)

    def normal(*shape):
      return jnp.asarray(rng.standard_normal(shape), self.dtype)

    def cache(width):
      heads_first = self.layout == "BKSH"
      return normal(b, *((self.K, self.S) if heads_first else (self.S, self.K)), width)

    arrays = dict(
      q=normal(b, self.M, self.N, self.H),
      k_cache=cache(self.H),
      v_cache=cache(self.V),
      k_nodes=normal(b, self.M, self.K, self.H),
      v_nodes=normal(b, self.M, self.K, self.V),
    )
    if self.P:
      arrays["prefix"] = (normal(self.P, self.K, self.H), normal(self.P, self.K, self.V))
    others = dict(
      length=jnp.asarray(self.lengths, jnp.int32),
      ancestors=jnp.asarray(random_tree(rng, b, self.M)),
    )
    return arrays, others

  def config(self, implementation):
    if implementation == "mosaic_tpu":
      return TPUConfig(self.block, self.rows, self.transposed)
    # 48: blocks that overlap at the end; both branches of dense: rows of 600 and of 320 slots
    return XLAConfig(48, dense=0.9) if self.block == 256 else XLAConfig(block=64, dense=0.5)

  def run(self, implementation, arrays, others, **kwargs):
    config = None if implementation == "reference" else self.config(implementation)
    call = functools.partial(
      tree_attention, **dict(self.options), cache_layout=self.layout, return_lse=True,
      implementation=implementation, config=config,
    )  # fmt: skip
    return jax.jit(lambda kw: call(**kw))({**arrays, **others, **kwargs})


CASES = {
  "decode": Case(M=1, lengths=(0, 63, 64)),
  "tree": Case(M=5, S=127, lengths=(0, 1, 127)),
  "mha-blocks": Case(M=6, S=600, lengths=(600, 129), N=3, K=3, block=256),
  "gqa4-H128": Case(M=17, S=384, lengths=(257,), N=4, K=1, H=128, V=128),
  "gqa8-H256": Case(M=7, S=256, lengths=(256, 3), N=8, K=1, H=256, V=128),
  "nodes64": Case(M=64, S=128, lengths=(100,), N=2, K=1),
  "nodes256-row-tiles": Case(M=256, S=256, lengths=(131,), N=2, K=1, rows=176),
  "window": Case(M=9, S=640, lengths=(600, 77), options=(("window", 150),), block=128),
  "window-tiny": Case(M=9, S=320, lengths=(320, 2), options=(("window", 2),), block=256),
  "BSKH": Case(
    M=3, S=96, lengths=(50, 96), layout="BSKH", options=(("logit_cap", 3.0), ("scale", 0.5))
  ),
  "prefix-window": Case(M=4, S=64, lengths=(9, 33), P=70, options=(("window", 40),)),
  "bf16": Case(M=5, S=256, lengths=(200, 17), dtype="bfloat16", H=128, V=128),
  "rows-along-lanes": Case(M=3, S=256, lengths=(0, 200), N=2, K=2, transposed=True),
}

# The TPU kernel's backward pass is XLA's, from its own outputs: what differs shows in these.
KERNEL_GRADIENTS = ("tree", "window", "BSKH", "prefix-window", "bf16")


@functools.cache
def definition(name):
  """Outputs and gradients of the reference, in float32 on the same (rounded) inputs."""
  case = CASES[name]
  arrays, others = case.arrays()
  arrays = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
  return value_and_gradients(lambda **a: case.run("reference", a, others), arrays)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_and_gradients(implementation, name):
  case = CASES[name]
  arrays, others = case.arrays()
  expected = definition(name)
  with on(implementation):
    if implementation == "mosaic_tpu" and name not in KERNEL_GRADIENTS:
      got, expected = {"out": case.run(implementation, arrays, others)}, {"out": expected["out"]}
    else:
      got = value_and_gradients(lambda **a: case.run(implementation, a, others), arrays)
  assert got["out"][0].dtype == case.dtype and got["out"][1].dtype == jnp.float32
  lse, wanted = got["out"][1], expected["out"][1]
  np.testing.assert_array_equal(jnp.isneginf(lse), jnp.isneginf(wanted))
  clean = lambda t: jax.tree.map(lambda x: jnp.where(jnp.isneginf(x), 0, x), t)  # noqa: E731
  assert_close(clean(got), clean(expected), TOLERANCE[case.dtype])


def dense(q, k, v):
  """Causal-free attention of ``[T,H]`` queries over all keys in float64."""
  logits = q @ k.T / np.sqrt(q.shape[-1])
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p @ v / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
def test_tree_equals_each_path_alone(implementation):
  case = Case(M=12, S=128, lengths=(0, 70), N=4, K=2)
  arrays, others = case.arrays(3)
  with on(implementation):
    out, lse = jax.jit(
      lambda a: case.run(implementation, a, others), compiler_options=COMPILE_ONCE
    )(arrays)
  a = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
  for b, length in enumerate(case.lengths):
    for i in range(case.M):
      path = np.flatnonzero(others["ancestors"][b, i])
      for n in range(case.N):
        h = n // 2
        k = np.concatenate([a["k_cache"][b, h, :length], a["k_nodes"][b, path, h]])
        v = np.concatenate([a["v_cache"][b, h, :length], a["v_nodes"][b, path, h]])
        np.testing.assert_allclose(out[b, i, n], dense(a["q"][b, i, n], k, v), atol=2e-6)
        norm = np.log(np.sum(np.exp(k @ a["q"][b, i, n] / 8)))
        np.testing.assert_allclose(lse[b, n, i], norm, atol=2e-6)


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
def test_rows_that_see_nothing(implementation):
  case = Case(M=5, S=64, lengths=(0, 20))
  arrays, others = case.arrays()
  others["ancestors"] = others["ancestors"].at[:, 3].set(False)
  with on(implementation):
    got = value_and_gradients(lambda **a: case.run(implementation, a, others), arrays)
  out, lse = got["out"]
  assert np.all(out[0, 3] == 0) and np.all(np.isneginf(lse[0, :, 3]))
  assert np.all(np.isfinite(lse[1])) and np.count_nonzero(np.isneginf(lse)) == case.N
  assert np.all(got["grad"]["q"][0, 3] == 0) and np.any(got["grad"]["q"][1, 3] != 0)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got["grad"]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dead_slots_and_other_branches_do_not_matter(implementation):
  case = Case(M=6, S=256, lengths=(100, 13), N=2, K=1)
  arrays, others = case.arrays()
  others["ancestors"] = others["ancestors"].at[:, 5].set(False).at[:, 5, 5].set(True)
  with on(implementation):
    run = jax.jit(lambda a: case.run(implementation, a, others)[0])
    base = run(arrays)
    dead = jnp.arange(case.S)[:, None] >= others["length"][:, None, None, None]
    garbage = {x: jnp.where(dead, 99.0, arrays[x]) for x in ("k_cache", "v_cache")}
    np.testing.assert_array_equal(run({**arrays, **garbage}), base)
    moved = run({**arrays, "k_nodes": arrays["k_nodes"].at[:, 0].add(1.0)})
    assert relative_rms(moved[:, 5], base[:, 5]) == 0 and relative_rms(moved[:, 0], base[:, 0]) > 0
    live = {"k_cache": arrays["k_cache"].at[:, :, 12].add(1.0)}  # the control: these are read
    assert relative_rms(run({**arrays, **live}), base) > 1e-4


@pytest.mark.parametrize("m", (1, 31, 32, 33, 100, 256))
def test_packed_ancestors(m):
  ancestors = jnp.asarray(random_tree(np.random.default_rng(m), 2, m))
  words = pack_ancestors(ancestors)
  assert words.shape == (2, m, -(-m // 32)) and words.dtype == jnp.uint32
  np.testing.assert_array_equal(unpack_ancestors(words), ancestors)
  bit = (int(words[1, m - 1, (m - 1) // 32]) >> ((m - 1) % 32)) & 1
  assert bit == 1  # itself


@pytest.mark.parametrize("window", (None, 20))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_words_and_booleans_agree(implementation, window):
  case = Case(M=33, S=128, lengths=(99,), N=2, K=1, options=(("window", window),))
  arrays, others = case.arrays()
  with on(implementation):
    words = {**others, "ancestors": pack_ancestors(others["ancestors"])}
    np.testing.assert_array_equal(
      case.run(implementation, arrays, words)[0], case.run(implementation, arrays, others)[0]
    )


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
@pytest.mark.parametrize("window", (None, 60))
def test_shared_prefix_equals_a_longer_cache(implementation, window):
  case = Case(M=3, S=64, lengths=(0, 41), P=50, options=(("window", window),))
  arrays, others = case.arrays()
  prefix = arrays.pop("prefix")
  longer = {
    name: jnp.concatenate([jnp.broadcast_to(p.swapaxes(0, 1), (2, 2, 50, 64)), arrays[name]], 2)
    for name, p in zip(("k_cache", "v_cache"), prefix)
  }
  with on(implementation):
    got = case.run(implementation, arrays, others, prefix=prefix)
  expected = case.run(
    "reference", {**arrays, **longer}, {**others, "length": others["length"] + 50}
  )
  assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
@pytest.mark.parametrize("window, layout", ((None, "BKSH"), (60, "BSKH")))
def test_prefixes_that_branch_equal_longer_caches(implementation, window, layout):
  """Levels of 1, 2 and 4 groups, of unequal lengths (one of them 0), over 4 rows."""
  case = Case(M=3, S=64, lengths=(0, 41, 64, 7), layout=layout, options=(("window", window),))
  arrays, others = case.arrays()
  rng = np.random.default_rng(1)
  levels = []
  for size, fill in ((24, (24,)), (40, (31, 0)), (16, (1, 16, 3, 9))):
    shape = (len(fill), *((2, size) if layout == "BKSH" else (size, 2)), 64)
    k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in "kv")
    levels.append((k, v, jnp.asarray(fill, jnp.int32)))
  with on(implementation):
    got = case.run(implementation, arrays, others, prefix=tuple(levels))
  axis = 1 if layout == "BKSH" else 0  # of slots, without the batch
  live = lambda x, n: jax.lax.slice_in_dim(x, 0, int(n), axis=axis)  # noqa: E731
  for b in range(4):
    row = {name: x[b : b + 1] for name, x in (arrays | others).items()}
    groups = [b * len(fill) // 4 for *_, fill in levels]
    for i, name in enumerate(("k_cache", "v_cache")):
      parts = [live(level[i][g], level[2][g]) for level, g in zip(levels, groups)]
      row[name] = jnp.concatenate([*parts, arrays[name][b]], axis)[None]
    before = sum(int(fill[g]) for (*_, fill), g in zip(levels, groups))
    expected = case.run("reference", row, {"length": others["length"][b : b + 1] + before})
    assert_close([x[b : b + 1] for x in got], expected, 1e-5)


def test_depth_moves_the_window():
  case = Case(M=3, S=64, lengths=(40,), options=(("window", 8),))
  arrays, others = case.arrays()
  depth = jnp.sum(others["ancestors"], -1) - 1
  run = lambda d: case.run("xla", arrays, others, depth=d)[0]  # noqa: E731
  np.testing.assert_array_equal(run(depth), run(None))
  assert relative_rms(run(depth + 5), run(None)) > 1e-2


def test_combine():
  rng = np.random.default_rng(0)
  part = lambda: (  # noqa: E731
    jnp.asarray(rng.standard_normal((2, 3, 4, 8)), jnp.float32),
    jnp.asarray(3 * rng.standard_normal((2, 4, 3)), jnp.float32),
  )
  a, b, c = part(), part(), part()
  assert_close(combine(*combine(*a, *b), *c), combine(*a, *combine(*b, *c)), 1e-6)
  assert_close(combine(*a, *b), combine(*b, *a), 1e-6)
  unit = jnp.zeros_like(a[0]), jnp.full_like(a[1], -jnp.inf)
  assert_close(combine(*a, *unit), a, 1e-7)
  nothing = combine(*unit, *unit)
  assert np.all(nothing[0] == 0) and np.all(np.isneginf(nothing[1]))
  loss = lambda x, l: jnp.sum(combine(x, l, *unit)[0])  # noqa: E731
  grads = jax.grad(loss, argnums=(0, 1))(*unit)
  assert all(np.all(np.isfinite(g)) for g in grads)


@pytest.mark.parametrize("transposed", (False, True))
def test_no_races(transposed):
  case = Case(M=2, S=384, lengths=(300, 0, 129), N=2, K=2, transposed=transposed)
  arrays, others = case.arrays()
  with on("mosaic_tpu", pltpu.InterpretParams(detect_races=True)):
    got = case.run("mosaic_tpu", arrays, others)
  assert_close(got, case.run("reference", arrays, others), 1e-5)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found


def test_batching_and_jit_over_trees():
  """A traced tree: one program for all trees of a size."""
  case = Case(M=4, S=64, lengths=(10, 64))
  arrays, others = case.arrays()
  traces = []

  @jax.jit
  def run(ancestors):
    traces.append(1)
    return case.run("xla", arrays, {**others, "ancestors": ancestors})[0]

  chain = jnp.broadcast_to(jnp.tril(jnp.ones((4, 4), bool)), (2, 4, 4))
  star = jnp.broadcast_to(jnp.eye(4, dtype=bool).at[:, 0].set(True), (2, 4, 4))
  assert relative_rms(run(chain), run(star)) > 1e-2 and len(traces) == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(q=jnp.zeros((1, 3, 2))), "q has shape"),
    (dict(k_nodes=jnp.zeros((1, 3, 2, 9))), "k_nodes has shape"),
    (dict(q=jnp.zeros((1, 3, 3, 8))), "no multiple of the caches' K=2"),
    (dict(ancestors=jnp.ones((1, 3, 4), bool)), "ancestors has shape"),
    (dict(ancestors=jnp.ones((1, 3, 3))), "ancestors has dtype float32"),
    (dict(length=jnp.ones(1)), "length has dtype float32"),
    (dict(window=0), "window is at least 1"),
    (dict(logit_cap=-1.0), "logit_cap is positive"),
    (dict(cache_layout="SBKH"), "cache_layout is"),
    (dict(prefix=(jnp.zeros((4, 3, 8)), jnp.zeros((4, 3, 8)))), "k_prefix has shape"),
    (
      dict(prefix=((jnp.zeros((3, 4, 2, 8)), jnp.zeros((3, 4, 2, 8)), jnp.zeros(3, int)),)),
      "prefix.0. has G=3 groups, which doesn't divide",
    ),
    (dict(implementation="mosaic"), "did you mean 'mosaic_"),
  ],
)
def test_errors(change, message):
  arguments = dict(
    q=jnp.zeros((1, 3, 4, 8)), k_cache=jnp.zeros((1, 16, 2, 8)), v_cache=jnp.zeros((1, 16, 2, 8)),
    length=jnp.array([3]), k_nodes=jnp.zeros((1, 3, 2, 8)), v_nodes=jnp.zeros((1, 3, 2, 8)),
    ancestors=jnp.ones((1, 3, 3), bool),
  )  # fmt: skip
  tree_attention(**arguments)
  with pytest.raises(ValueError, match=message):
    tree_attention(**{**arguments, **change})


def test_dispatch():
  arrays, others = Case().arrays()
  with pytest.raises(NotImplementedError, match="traced for 'cpu'"):
    Case().run("mosaic_tpu", arrays, others)
  call = functools.partial(tree_attention, **arrays, **others, cache_layout="BKSH")
  with pytest.raises(NotImplementedError, match="not implemented yet"):
    call(implementation="mosaic_gpu")
  np.testing.assert_array_equal(
    call(implementation=("mosaic_gpu", "mosaic_tpu", "xla")), call(implementation="xla")
  )
  with pytest.raises(ValueError, match="multiple of 128"):
    TPUConfig(block_s=100)
  with pytest.raises(ValueError, match="multiple of 16"):
    TPUConfig(block_rows=8)
  with pytest.raises(ValueError, match="XLAConfig"):
    XLAConfig(-1)
