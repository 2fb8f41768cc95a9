# SPDX-License-Identifier: Apache-2.0
"""Halos and short convolutions: every rank's rows and gradients against the whole sequence."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdec.errors import UserError
from jaxdec.parallel import sequence as module
from jaxdec.parallel.sequence.layout import from_zigzag, to_zigzag
from pallas_kernels.testing import COMPILE_ONCE

B, D = 2, 3


def sharded(f, ranks, layout, check_vma=True, replicated=()):
  """``f`` on every rank's shard of ``arrays``; the result as one sequence again."""
  mesh = Mesh(np.array(jax.devices()[:ranks]), ("seq",))
  order = (lambda x: to_zigzag(x, ranks)) if layout == "zigzag" else (lambda x: x)
  back = (lambda x: from_zigzag(x, ranks)) if layout == "zigzag" else (lambda x: x)
  spec = P(None, "seq")

  def whole(*args):
    mapped = jax.shard_map(
      f,
      mesh=mesh,
      in_specs=tuple(P() if i in replicated else spec for i in range(len(args))),
      out_specs=spec,
      check_vma=check_vma,
    )
    args = [x if i in replicated else order(x) for i, x in enumerate(args)]
    return jax.tree.map(back, mapped(*args))

  return whole


def compiled(f):
  return jax.jit(f, compiler_options=COMPILE_ONCE)


def by_definition(x, weight, ids, initial=None, causal=True):
  """The sum over taps, token by token, in numpy float64."""
  x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
  w, length = weight.shape[0], x.shape[1]
  left = w - 1 if causal else (w - 1) // 2
  y = np.zeros_like(x)
  for b in range(x.shape[0]):
    for t in range(length):
      for i in range(w):
        j = t - left + i
        if j < 0 and initial is not None and ids[b, 0] == ids[b, t]:
          y[b, t] += weight[i] * np.asarray(initial[b, j], np.float64)
        elif 0 <= j < length and ids[b, j] == ids[b, t]:
          y[b, t] += weight[i] * x[b, j]
  return y


def documents(length, seed):
  """Ids with documents of 1 to 7 tokens: shorter than a shard, straddling, ending on edges."""
  rng = np.random.default_rng(seed)
  ends = np.cumsum(rng.integers(1, 8, (B, length)), axis=1)
  return np.array([np.searchsorted(e, np.arange(length), side="right") for e in ends], np.int32)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_halo_is_the_rows_beside_each_run(side, ranks, layout):
  length, runs = 32, 2 if layout == "zigzag" else 1
  each = length // ranks // runs
  x = np.arange(1, B * length + 1, dtype=np.int32).reshape(B, length)
  widths = (1, 2, each, 2 * each + 1)

  def local(x):
    return [module.halo(x, w, axis_name="seq", layout=layout, side=side, fill=-7) for w in widths]

  mesh = Mesh(np.array(jax.devices()[:ranks]), ("seq",))
  f = jax.shard_map(
    local, mesh=mesh, in_specs=P(None, "seq"), out_specs=[P(None, "seq")] * len(widths)
  )
  got = compiled(f)(to_zigzag(x, ranks) if layout == "zigzag" else x)
  for width, value in zip(widths, got):
    wide = np.pad(x, ((0, 0), (width, width)), constant_values=-7)
    for rank in range(ranks):
      for run, block in enumerate((rank, 2 * ranks - 1 - rank)[:runs]):
        start = block * each + (0 if side == "left" else each + width)
        np.testing.assert_array_equal(value[:, rank * runs + run], wide[:, start : start + width])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_short_convolution_and_its_gradients(ranks, layout):
  # 16 tokens on 8 ranks: runs of one or two tokens, shorter than the four taps.
  length, w = 16, 4
  rng = np.random.default_rng(ranks)
  with jax.enable_x64(True):
    x, weight = rng.normal(size=(B, length, D)), rng.normal(size=(w, D))
    initial, dout = rng.normal(size=(B, w - 1, D)), rng.normal(size=(B, length, D))
    ids = documents(length, 1)

    def outputs(x, weight, initial, ids, axis_name, layout):
      conv = functools.partial(
        module.short_convolution, weight=weight, axis_name=axis_name, layout=layout
      )
      return (
        conv(x, segment_ids=ids, initial=initial),
        conv(x),
        conv(x, segment_ids=ids, causal=False),
        module.token_shift(x, segment_ids=ids, axis_name=axis_name, layout=layout),
        module.next_token(x, axis_name=axis_name, layout=layout, fill=5.0),
      )

    def one(x, weight, initial, ids):
      return outputs(x, weight, initial, ids, None, "contiguous")

    many = sharded(
      lambda *args: outputs(*args, "seq", layout),
      ranks,
      layout,
      check_vma=ranks != 2,
      replicated=(1, 2),
    )

    def with_gradients(f):
      def total(x, weight, initial):
        out = f(x, weight, initial, ids)
        return sum(jnp.sum(jnp.sin(y) * dout) for y in out), out

      return compiled(jax.grad(total, (0, 1, 2), has_aux=True))(x, weight, initial)

    gradients, results = with_gradients(many)
    wanted_gradients, _ = with_gradients(one)
    none = np.zeros_like(ids)
    shift = np.stack([np.ones(D), np.zeros(D)])
    expected = (
      by_definition(x, weight, ids, initial),
      by_definition(x, weight, none),
      by_definition(x, weight, ids, causal=False),
      by_definition(x, shift, ids),
      np.concatenate([x[:, 1:], np.full((B, 1, D), 5.0)], axis=1),
    )
    for got, wanted in zip(results, expected):
      np.testing.assert_allclose(got, wanted, atol=1e-12)

    for got, wanted in zip(gradients, wanted_gradients):
      np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_two_permutes_under_zigzag_one_else_none_alone():
  def count(ranks, layout, width=3):
    f = sharded(
      lambda x: module.short_convolution(
        x, jnp.ones((width + 1, D)), axis_name="seq", layout=layout
      ),
      ranks,
      "contiguous",
      check_vma=False,
    )
    return jax.jit(f).lower(jnp.ones((B, 64, D))).as_text().count("stablehlo.collective_permute")

  assert count(1, "contiguous") == count(1, "zigzag") == 0
  assert count(4, "contiguous") == 1 and count(4, "zigzag") == 2
  assert count(4, "contiguous", width=17) == 2  # shards of 16 tokens


def test_without_the_neighbours_rows_the_border_is_wrong():
  x, weight = np.random.default_rng(0).normal(size=(B, 16, D)), np.ones((4, D))
  x = x.astype(np.float32)
  alone = sharded(lambda x: module.short_convolution(x, weight), 4, "contiguous")(x)
  wrong = np.abs(alone - by_definition(x, weight, np.zeros((B, 16)))).max(axis=(0, 2)) > 1e-3
  assert wrong.nonzero()[0].tolist() == [4, 5, 6, 8, 9, 10, 12, 13, 14]


def test_mistakes_are_one_sentence():
  x = jnp.ones((1, 6, D))
  with pytest.raises(UserError, match=r"side is 'left' or 'right', got 'up'"):
    module.halo(x, 1, axis_name=None, side="up")
  with pytest.raises(UserError, match="initial holds the 2 rows before"):
    module.halo(x, 2, axis_name=None, initial=x)
  with pytest.raises(UserError, match="expected \\[w, 3\\]"):
    module.short_convolution(x, jnp.ones((4, 5)))
  with pytest.raises(UserError, match="two runs of equal length"):
    module.halo(x[:, :5], 1, axis_name=None, layout="zigzag")
  with pytest.raises(UserError, match="initial is for causal=True"):
    module.short_convolution(x, jnp.ones((4, D)), initial=x[:, :3], causal=False)
