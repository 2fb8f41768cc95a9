# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: every implementation against the definition, the definition by hand.

A case is one compilation for each implementation: several properties are checked on one result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.block_sparse_attention import (
  BlockPattern,
  XLAConfig,
  block_sparse_attention,
  tile_lists,
)
from pallas_kernels.testing import TOLERANCE, assert_close, relative_rms, value_and_gradients

IMPLEMENTATIONS = ("xla", "mosaic_tpu")


def on(implementation, interpret=True):
  """The context in which this machine can run it."""
  if implementation != "mosaic_tpu":
    return contextlib.nullcontext()
  return pallas_kernels.target("tpu", interpret=interpret)


@dataclasses.dataclass(frozen=True)
class Case:
  """Blocks of 128 are what every implementation takes; ``density`` None is ``blocks=None``."""

  B: int = 1
  T: int = 256
  S: int = 256
  N: int = 2
  K: int = 1
  H: int = 64
  V: int = 64
  bq: int = 128
  bk: int = 128
  pattern_batch: int = 1
  pattern_heads: int = 1
  density: float | None = 0.5
  causal: bool = True
  window: int | None = None
  logit_cap: float | None = None
  documents: bool = False
  dtype: str = "float32"
  config: XLAConfig | None = None


CASES = {
  "one query head a key head, T=1": Case(T=1, S=130, N=2, K=2, density=1.0),
  "prime lengths, T < S, 4 queries a key": Case(
    B=2, T=127, S=257, N=4, H=128, V=64, pattern_batch=2, pattern_heads=4
  ),
  "8 queries a key, 63 tokens, soft cap": Case(T=63, S=63, N=8, logit_cap=2.0, density=1.0),
  "T > S: rows without keys": Case(T=383, S=256, N=2, K=2, pattern_heads=2),
  "documents and a window": Case(B=2, T=384, S=384, documents=True, window=150, density=0.8),
  "documents, no causality, heads differ": Case(
    B=1, T=300, S=300, N=4, K=2, documents=True, causal=False, pattern_heads=2
  ),
  "wide heads, unequal blocks": Case(T=256, S=512, H=256, V=128, bq=128, bk=256),
  "no pattern": Case(B=2, T=257, S=257, density=None, documents=True, window=150, logit_cap=2.0),
  "bfloat16": Case(T=256, S=256, N=4, K=2, H=128, V=128, dtype="bfloat16", pattern_heads=2),
}
XLA_CASES = {  # block sizes and steps that the TPU kernels don't take
  "small blocks, chunks, heads in turn": Case(
    B=2, T=61, S=61, N=4, K=2, H=16, V=24, bq=8, bk=16, pattern_heads=4, pattern_batch=2,
    documents=True, config=XLAConfig(keys=32, rows=2),
  ),
  "small blocks, every row at once, window without causality": Case(
    B=2, T=53, S=37, N=4, K=2, H=16, V=8, bq=16, bk=8, causal=False, window=20, logit_cap=3.0,
    config=XLAConfig(keys=24, rows=4),
  ),
}  # fmt: skip
ALL = CASES | XLA_CASES
RUNS = [(i, name) for name in CASES for i in IMPLEMENTATIONS] + [("xla", n) for n in XLA_CASES]


def arrays(case: Case, seed: int = 0):
  """q, k, v; a block mask with an empty row; documents that start and end with padding."""
  rng = np.random.default_rng(seed)
  shapes = (case.B, case.T, case.N, case.H), (case.B, case.S, case.K, case.H)
  shapes = (*shapes, (case.B, case.S, case.K, case.V))
  q, k, v = (jnp.asarray(rng.normal(size=s), case.dtype) for s in shapes)
  mask = None
  if case.density is not None:
    blocks = -(-case.T // case.bq), -(-case.S // case.bk)
    mask = rng.random((case.pattern_batch, case.pattern_heads, *blocks)) < case.density
    mask[0, 0, -1, 0] = True
    if blocks[0] > 1:
      mask[0, 0, 0] = False
  ids = None
  if case.documents:
    ids = np.sort(rng.integers(0, 4, (case.B, case.T)), axis=1).astype(np.int32)
    ids[:, :3], ids[:, -5:] = -1, -2
  return {"q": q, "k": k, "v": v}, mask, ids


def attend(case: Case, implementation, mask, ids, **options):
  """The op as a function of q, k, v."""

  def f(q, k, v):
    blocks = None
    if mask is not None:
      blocks = BlockPattern.from_dense(jnp.asarray(mask), block_q=case.bq, block_kv=case.bk)
    return block_sparse_attention(
      q, k, v, blocks, segment_ids=ids, causal=case.causal, window=case.window,
      logit_cap=case.logit_cap, return_lse=True, return_block_max=blocks is not None,
      implementation=implementation, config=case.config if implementation == "xla" else None,
      **options,
    )  # fmt: skip

  return f


@functools.cache
def result(name: str, implementation: str):
  case = ALL[name]
  inputs, mask, ids = arrays(case)
  if implementation == "reference":  # float32 on the same rounded inputs
    inputs = {n: x.astype(jnp.float32) for n, x in inputs.items()}
  with on(implementation):
    return value_and_gradients(attend(case, implementation, mask, ids), inputs)


def finite(tree):
  return jax.tree.map(lambda x: jnp.where(jnp.isneginf(x), 0, x), tree)


@pytest.mark.parametrize("implementation, name", RUNS)
def test_against_reference(implementation, name):
  """Outputs, log-sum-exp, block maxima and gradients (of a weighting of out *and* lse)."""
  got, expected = result(name, implementation), result(name, "reference")
  empty = jnp.isneginf(expected["out"][1])  # [B,N,T]
  assert (jnp.isneginf(got["out"][1]) == empty).all()
  assert_close(finite(got), finite(expected), TOLERANCE[ALL[name].dtype])
  assert got["out"][0].dtype == ALL[name].dtype and got["out"][1].dtype == jnp.float32
  rows = empty.swapaxes(1, 2)[..., None]
  assert not jnp.any(jnp.where(rows, got["out"][0], 0))
  assert not jnp.any(jnp.where(rows, got["grad"]["q"], 0))


def test_cases_have_rows_that_see_nothing():
  seen = {n: bool(jnp.isneginf(result(n, "reference")["out"][1]).any()) for n in ALL}
  assert sum(seen.values()) >= 5 and not all(seen.values())


def definition(case: Case, inputs, mask, ids, dlse=None):
  """In float64, one query at a time, from the rule as it is written."""
  q, k, v = (np.asarray(inputs[n], np.float64) for n in "qkv")
  out = np.zeros((case.B, case.T, case.N, case.V))
  lse = np.full((case.B, case.N, case.T), -np.inf)
  nq, nk = -(-case.T // case.bq), -(-case.S // case.bk)
  peak = np.zeros((case.B, case.N, nq, nk))
  for b, n, i in np.ndindex(case.B, case.N, case.T):
    tiles = mask[b % mask.shape[0], n * mask.shape[1] // case.N, i // case.bq]
    seen = []
    for j in range(case.S):
      behind = i + case.S - case.T - j
      if not tiles[j // case.bk] or (case.causal and behind < 0):
        continue
      if case.window is not None and behind >= case.window:
        continue
      if ids is not None and (ids[b, i] != ids[b, j] or ids[b, i] < 0):
        continue
      seen.append(j)
    if not seen:
      continue
    head = n * case.K // case.N
    s = k[b, seen, head] @ q[b, i, n] * case.H**-0.5
    if case.logit_cap is not None:
      s = case.logit_cap * np.tanh(s / case.logit_cap)
    lse[b, n, i] = s.max() + np.log(np.exp(s - s.max()).sum())
    p = np.exp(s - lse[b, n, i])
    out[b, i, n] = p @ v[b, seen, head]
    np.maximum.at(peak[b, n, i // case.bq], np.array(seen) // case.bk, p)
  return out, lse, peak


@pytest.mark.parametrize("name", XLA_CASES)
def test_reference_against_the_rule_as_written(name):
  case = ALL[name]
  inputs, mask, ids = arrays(case)
  out, lse, peak = result(name, "reference")["out"]
  expected = definition(case, inputs, mask, ids)
  assert (np.isneginf(lse) == np.isneginf(expected[1])).all()
  assert_close(finite((out, lse, peak)), finite(expected), 1e-6)


def test_gradient_by_differences():
  """Of the xla form in float64, with cotangents on out and lse, at rows with and without keys."""
  with jax.enable_x64(True):
    case = dataclasses.replace(ALL["small blocks, chunks, heads in turn"], dtype="float64")
    inputs, mask, ids = arrays(case)
    f = attend(case, "xla", mask, ids)
    weights = [np.random.default_rng(5).normal(size=s) for s in ((2, 61, 4, 24), (2, 4, 61))]

    @jax.jit
    def total(x):
      out, lse, _ = f(**x)
      return jnp.sum(out * weights[0]) + jnp.sum(finite(lse) * weights[1])

    gradient = jax.jit(jax.grad(total))(inputs)
    rng = np.random.default_rng(6)
    for name in inputs:
      direction = {n: rng.normal(size=x.shape) * (n == name) for n, x in inputs.items()}
      ahead = {n: x + 1e-5 * direction[n] for n, x in inputs.items()}
      back = {n: x - 1e-5 * direction[n] for n, x in inputs.items()}
      slope = sum(jnp.sum(gradient[n] * direction[n]) for n in inputs)
      np.testing.assert_allclose((total(ahead) - total(back)) / 2e-5, slope, rtol=1e-7)


# Patterns and lists.

PICTURES = {
  "causal": (dict(causal=True, window=None), None, [[1, 0, 0], [2, 1, 0], [2, 2, 1]]),
  "window": (dict(causal=True, window=3), None, [[1, 0, 0], [1, 1, 0], [0, 1, 1]]),
  "documents": (
    dict(causal=True, window=None), [[0, 0, 0, 1, 1, 1]], [[1, 0, 0], [1, 1, 0], [0, 1, 1]],
  ),
}  # fmt: skip


def drawn(lists, columns):
  """Lists as classes ``[Bm,Hm,Nx,columns]``: 0 not listed, 1 partial, 2 full; checks their form."""
  num_full, num, idx = map(np.asarray, lists)
  picture = np.zeros((*num.shape, columns), int)
  for where in np.ndindex(num.shape):
    full, count, row = num_full[where], num[where], idx[where]
    for part in (row[:full], row[full:count]):
      assert (np.diff(part) > 0).all()
    assert (row[count:] == (row[count - 1] if count else 0)).all()
    picture[where][row[full:count]] = 1
    picture[where][row[:full]] = 2
  return picture


def listed(num, idx, columns):
  return drawn((np.zeros_like(num), num, idx), columns) > 0


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_six_tokens(name):
  rule, ids, expected = PICTURES[name]
  ids = None if ids is None else (jnp.asarray(ids, jnp.int32),) * 2
  everything = BlockPattern.from_dense(np.ones((1, 1, 3, 3)), block_q=2, block_kv=2)
  by_rule = BlockPattern.from_rule(6, block_q=2, block_kv=2, segment_ids=ids, **rule)
  lists = jax.jit(lambda pattern: tile_lists(pattern, T=6, S=6, segment_ids=ids, **rule))
  for pattern in (everything, by_rule):
    forward, transposed = lists(pattern)
    assert (drawn(forward, 3)[0, 0] == expected).all()
    assert (drawn(transposed, 3)[0, 0] == np.transpose(expected)).all()
  assert (by_rule.dense()[0, 0] == np.greater(expected, 0)).all()
  marked = np.zeros((3, 3), bool)
  for i in range(3):
    marked[i, np.asarray(by_rule.idx)[0, 0, i][np.asarray(by_rule.full)[0, 0, i]]] = True
  assert (marked == np.equal(expected, 2)).all()


def tokens(T, S, causal, window, ids=None):
  """The token rule, bool ``[B|1,T,S]``."""
  behind = np.arange(T)[:, None] + S - T - np.arange(S)
  seen = np.ones((1, T, S), bool)
  if causal:
    seen = seen & (behind >= 0)
  if window is not None:
    seen = seen & (behind < window)
  if ids is not None:
    seen = seen & (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, :, None]
  return seen


def classes(seen, bq, bk):
  """Of every tile, by looking at all its tokens; a ragged last key block is never full."""
  batch, T, S = seen.shape
  found = np.zeros((batch, -(-T // bq), -(-S // bk)), int)
  for b, i, j in np.ndindex(found.shape):
    tile = seen[b, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
    found[b, i, j] = 2 if tile.all() and (j + 1) * bk <= S else int(tile.any())
  return found


RULES = [
  # T, S, bq, bk, causal, window
  (13, 13, 4, 3, True, None),
  (13, 17, 3, 5, True, 6),
  (17, 13, 5, 2, True, 4),
  (11, 14, 3, 4, False, 5),
]


@pytest.mark.parametrize("T, S, bq, bk, causal, window", RULES)
def test_classes_against_every_token(T, S, bq, bk, causal, window):
  rule = dict(causal=causal, window=window)
  shape = -(-T // bq), -(-S // bk)
  expected = classes(tokens(T, S, **rule), bq, bk)[0]

  @jax.jit
  def lists(mask):
    pattern = BlockPattern.from_dense(mask, block_q=bq, block_kv=bk)
    return tile_lists(pattern, T=T, S=S, segment_ids=None, **rule)

  rng = np.random.default_rng(T + S)
  for density in (0.0, 0.4, 1.0):
    mask = rng.random((1, 2, *shape)) < density
    forward, transposed = lists(mask)
    assert (drawn(forward, shape[1]) == expected * mask).all()
    assert (drawn(transposed, shape[0]).swapaxes(2, 3) == expected * mask).all()


@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 5)])
def test_classes_of_documents_against_every_token(causal, window):
  """Exact for non-decreasing ids without a window; else they may keep more, never hide a token."""
  T, bq, bk = 19, 4, 3
  everything = BlockPattern.from_dense(np.ones((1, 1, 5, 7)), block_q=bq, block_kv=bk)
  rule = dict(T=T, S=T, causal=causal, window=window)
  lists = jax.jit(lambda ids: tile_lists(everything, segment_ids=(ids, ids), **rule))
  rng = np.random.default_rng(0)
  for kind in ("sorted", "shuffled") * 8:
    ids = rng.integers(-1, 4, (3, T)).astype(np.int32)
    ids = np.sort(ids, axis=1) if kind == "sorted" else ids
    expected = classes(tokens(T, T, causal, window, ids), bq, bk)
    forward, transposed = lists(ids)
    got = drawn(forward, 7)[:, 0]
    assert (drawn(transposed, 5)[:, 0].swapaxes(1, 2) == got).all()
    assert (got[expected == 2] == 2).all() and (expected[got == 2] == 2).all()
    assert (got[expected > 0] > 0).all()
    if kind == "sorted" and window is None:
      assert (got == expected).all()


@pytest.mark.parametrize("T, S, bq, bk, causal, window", RULES)
@pytest.mark.parametrize("sinks, prefix", [(0, 0), (5, 2), (3, 7)])
def test_from_rule(T, S, bq, bk, causal, window, sinks, prefix):
  rule = dict(causal=causal, window=window, sinks=sinks, prefix=prefix)
  pattern = jax.jit(lambda: BlockPattern.from_rule(T, S, block_q=bq, block_kv=bk, **rule))()
  column = np.arange(S)
  seen = tokens(T, S, causal, window) | (tokens(T, S, causal, None) & (column < sinks))
  expected = classes(seen | (column < prefix), bq, bk)[0]
  nq, nk = expected.shape
  assert (listed(pattern.num, pattern.idx, nk)[0, 0] == (expected > 0)).all()
  assert (listed(pattern.t_num, pattern.t_idx, nq)[0, 0] == (expected.T > 0)).all()
  assert pattern.idx.shape[-1] == max(1, (expected > 0).sum(axis=1).max())
  i, slot = np.nonzero(np.asarray(pattern.full)[0, 0])  # a promise, kept
  assert (expected[i, np.asarray(pattern.idx)[0, 0, i, slot]] == 2).all()


def test_from_dense_and_overflow():
  mask = np.random.default_rng(3).random((2, 3, 5, 9)) < 0.5
  mask[0, 0, 0] = False
  make = jax.jit(
    functools.partial(BlockPattern.from_dense, block_q=4, block_kv=8),
    static_argnames=("max_blocks", "max_queries"),
  )
  pattern = make(mask)
  assert (listed(pattern.num, pattern.idx, 9) == mask).all()
  assert (listed(pattern.t_num, pattern.t_idx, 5).swapaxes(2, 3) == mask).all()
  assert (np.asarray(pattern.dense()) == mask).all() and not pattern.overflow
  assert pattern.t_idx.shape == (2, 3, 9, 5)

  most = mask.sum(axis=-1).max()
  assert not make(mask, max_blocks=int(most)).overflow
  cut = make(mask, max_blocks=3)
  assert cut.overflow and cut.idx.shape[-1] == 3
  kept = mask & (mask[..., ::-1].cumsum(axis=-1)[..., ::-1] <= 3)  # the last three of each row
  assert (np.asarray(cut.dense()) == kept).all()
  assert (listed(cut.t_num, cut.t_idx, 5).swapaxes(2, 3) == kept).all()
  assert make(mask, max_queries=int(mask.sum(axis=-2).max()) - 1).overflow

  union = pattern.union_heads(1)
  assert (np.asarray(union.dense()) == mask.any(axis=1, keepdims=True)).all()


def test_from_scores_and_threshold():
  """By sorting every row; the diagonal and the sinks are always among those chosen."""
  T = S = 44
  bq, bk = 8, 4
  scores = np.random.default_rng(4).normal(size=(2, 2, 6, 11)).astype(np.float32)
  scores[0, 0, 5, :4] = np.nan, -np.inf, 7.0, 7.0
  sizes = dict(block_q=bq, block_kv=bk, T=T, S=S)
  allowed = classes(tokens(T, S, True, None), bq, bk)[0] > 0
  own = np.arange(6)[:, None] * bq // bk + np.arange(2)  # a query block spans two key blocks
  forced = (np.arange(11) == 0) | (np.arange(11) == own[:, :1]) | (np.arange(11) == own[:, 1:])
  forced = forced & allowed

  def chosen(most, above=-np.inf):
    mask = np.zeros(scores.shape, bool)
    for b, h, i in np.ndindex(2, 2, 6):
      value = np.where(np.isnan(scores[b, h, i]), -np.inf, scores[b, h, i])
      value = np.where(value > above, value, -np.inf)
      value = np.where(forced[i], np.inf, np.where(allowed[i], value, -np.inf))
      best = np.argsort(-value, kind="stable")[:most]
      mask[b, h, i, best[value[best] > -np.inf]] = True
    return mask

  top = jax.jit(lambda x: BlockPattern.from_scores(x, 5, sinks=1, **sizes))(scores)
  assert (np.asarray(top.dense()) == chosen(5)).all() and not top.overflow
  assert top.idx.shape[-1] == 5
  assert (listed(top.t_num, top.t_idx, 6).swapaxes(2, 3) == chosen(5)).all()

  def threshold(x, level, **cap):
    return BlockPattern.from_threshold(x, level, sinks=1, **sizes, **cap)

  some = jax.jit(threshold)(scores, 0.3)
  assert (np.asarray(some.dense()) == chosen(11, above=0.3)).all() and not some.overflow
  few = jax.jit(functools.partial(threshold, max_blocks=4))(scores, 0.3)
  assert (np.asarray(few.dense()) == chosen(4, above=0.3)).all() and few.overflow
  count = jax.jit(jax.grad(lambda x: (x * threshold(x, 0.3).num[..., None]).sum()))
  gradient = count(scores) - some.num[..., None]  # of the product alone
  assert not gradient[~np.isnan(scores)].any()


# Properties of the op.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_traced_pattern_and_permuted_key_blocks(implementation):
  """One program, patterns as arguments: keys moved together with the lists change nothing."""
  case = Case(T=256, S=512, N=2, K=2, causal=False, pattern_heads=2)
  inputs, mask, _ = arrays(case)
  with on(implementation):

    @jax.jit
    def f(inputs, mask):
      return attend(case, implementation, mask, None)(**inputs)

    out, lse, peak = f(inputs, mask)
    order = np.array([2, 0, 3, 1])
    moved = dict(inputs)
    for name in "kv":
      blocks = inputs[name].reshape(1, 4, 128, case.K, -1)
      moved[name] = blocks[:, order].reshape(inputs[name].shape)
    permuted = f(moved, mask[..., order])
    assert_close(finite((out, lse, peak[..., order])), finite(permuted), TOLERANCE["float32"])
    other = f(inputs, mask[..., order])  # the lists alone: another result
    assert relative_rms(finite(other[0]), finite(out)) > 0.1


def test_no_pattern_is_all_tiles():
  """And on a CPU a named config takes such a call off the form for short sequences."""
  case = ALL["no pattern"]
  inputs, _, ids = arrays(case)
  expected = finite(result("no pattern", "reference")["out"])
  f = jax.jit(lambda mask: finite(attend(case, "xla", mask, ids)(**inputs)))
  everything = np.ones((1, 1, 3, 3), bool)
  assert_close(f(everything)[:2], expected[:2], TOLERANCE["float32"])
  everything[0, 0, 1, 0] = False
  assert relative_rms(f(everything)[0], expected[0]) > 1e-2  # the comparison notices one tile
  chunks = attend(dataclasses.replace(case, config=XLAConfig()), "xla", None, ids)
  assert_close(finite(jax.jit(chunks)(**inputs)), expected, TOLERANCE["float32"])


def test_unlisted_tiles_are_not_computed():
  """NaN in keys that nothing lists reaches neither outputs nor gradients; block_max has none."""
  case = Case(T=64, S=64, N=2, K=1, H=16, V=16, bq=16, bk=16)
  inputs, mask, _ = arrays(case)
  mask[..., 1] = False
  mask[..., 0] = True
  bad = {n: x.at[:, 16:32].set(jnp.nan) if n != "q" else x for n, x in inputs.items()}

  @jax.jit
  def run(inputs, weight):
    def total(inputs):
      out, _, peak = attend(case, "xla", mask, None)(**inputs)
      return weight * out.sum() + (1 - weight) * peak.sum()

    return jax.value_and_grad(total)(inputs)

  clean, got = run(inputs, 1.0), run(bad, 1.0)
  assert_close(got, clean, 0.0)
  assert clean[0] and clean[1]["k"].any() and not got[1]["k"][:, 16:32].any()
  peak, gradients = run(inputs, 0.0)
  assert peak > 0 and not any(g.any() for g in gradients.values())


def test_order_of_results_and_empty_lengths():
  q = jnp.ones((1, 4, 2, 8))
  blocks = BlockPattern.from_rule(4, block_q=4, block_kv=2)
  f = functools.partial(block_sparse_attention, q, q, q, blocks, implementation="reference")
  assert f().shape == q.shape
  out, lse, peak = f(return_lse=True, return_block_max=True)
  assert out.shape == q.shape and lse.shape == (1, 2, 4) and peak.shape == (1, 2, 1, 2)
  assert f(return_lse=True)[1].shape == lse.shape
  peak = f(return_block_max=True)[1]
  np.testing.assert_allclose(peak[0, 0, 0], [1.0, 1 / 3], rtol=1e-6)
  out, lse = block_sparse_attention(q, q[:, :0], q[:, :0], return_lse=True)
  assert not out.any() and jnp.isneginf(lse).all()
  assert block_sparse_attention(q[:, :0], q, q).shape == (1, 0, 2, 8)


# Errors and dispatch.


def call(**changes):
  q = jnp.ones((2, 8, 4, 8))
  k = jnp.ones((2, 8, 2, 8))
  blocks = BlockPattern.from_rule(8, block_q=4, block_kv=4)
  return block_sparse_attention(**({"q": q, "k": k, "v": k, "blocks": blocks} | changes))


@pytest.mark.parametrize(
  "changes, sentence",
  [
    (dict(k=jnp.ones((2, 8, 3, 8)), v=jnp.ones((2, 8, 3, 8))), "k has 3 heads"),
    (dict(k=jnp.ones((2, 8, 2, 4))), "k has shape"),
    (dict(blocks=np.ones((1, 1, 2, 2), bool)), "BlockPattern.from_dense"),
    (dict(blocks=BlockPattern.from_rule(16, block_q=4, block_kv=4)), "expected 2 x 2"),
    (dict(blocks=BlockPattern.from_dense(np.ones((1, 3, 2, 2)), block_q=4, block_kv=4)), "3 heads"),
    (dict(blocks=None, return_block_max=True), "return_block_max=True needs blocks"),
    (dict(window=0), "window is at least 1"),
    (dict(logit_cap=0.0), "logit_cap is positive"),
    (dict(segment_ids=jnp.zeros((2, 7), jnp.int32)), "expected [2 or 1, 8]"),
    (dict(segment_ids=jnp.zeros((2, 8))), "integers"),
    (dict(q=jnp.ones((2, 5, 4, 8)), segment_ids=jnp.zeros((2, 8), jnp.int32), blocks=None), "pair"),
    (dict(implementation="xIa"), "did you mean 'xla'"),
  ],
)
def test_errors(changes, sentence):
  with pytest.raises(ValueError) as error:
    call(**changes)
  assert sentence in str(error.value)


@pytest.mark.parametrize(
  "make, sentence",
  [
    (lambda: BlockPattern.from_rule(8, block_q=0, block_kv=4), "block_q is a number of tokens"),
    (lambda: BlockPattern.from_rule(8, block_q=4, block_kv=4, window=0), "window is at least 1"),
    (lambda: BlockPattern.from_dense(np.ones((2, 2)), block_q=4, block_kv=4), "has shape (2, 2)"),
    (
      lambda: BlockPattern.from_scores(np.ones((1, 1, 2, 4)), 1, block_q=8, block_kv=4),
      "raise top_k",
    ),
    (
      lambda: BlockPattern.from_scores(np.ones((1, 1, 2, 2)), 1, block_q=8, block_kv=4, T=17),
      "make 3 x 2 blocks",
    ),
    (lambda: XLAConfig(keys=0), "at least 1"),
  ],
)
def test_errors_of_patterns_and_configs(make, sentence):
  with pytest.raises(ValueError) as error:
    make()
  assert sentence in str(error.value)


def test_dispatch():
  with pytest.raises(pallas_kernels.Unsupported, match="traced for 'cpu'"):
    call(implementation="mosaic_tpu")
  with pytest.raises(pallas_kernels.Unsupported, match="not implemented yet"):
    call(implementation="mosaic_gpu")
  assert call(implementation=("mosaic_gpu", "xla")).shape == (2, 8, 4, 8)
  with (
    pallas_kernels.target("tpu", interpret=True),
    pytest.raises(pallas_kernels.Unsupported, match="multiple of 128"),
  ):
    call(implementation="mosaic_tpu")
