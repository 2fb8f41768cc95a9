# SPDX-License-Identifier: Apache-2.0
"""What only the TPU kernels of block_sparse_attention have: job lists, ranges, filled-up trips."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels import Unsupported, _aot
from pallas_kernels._specs import Spec
from pallas_kernels.block_sparse_attention import BlockPattern, block_sparse_attention, tile_lists
from pallas_kernels.block_sparse_attention import _tpu_cost as cost
from pallas_kernels.block_sparse_attention._tpu_forward import MAX_ROWS, ROW_BITS
from pallas_kernels.block_sparse_attention.mosaic_tpu import TPUConfig, _jobs
from pallas_kernels.testing import assert_close, relative_rms, value_and_gradients


def arrays(T, S, N=2, K=1, H=128, B=1, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(T), 3)
  shapes = dict(q=(B, T, N, H), k=(B, S, K, H), v=(B, S, K, H))
  return {
    name: jax.random.normal(key, shape).astype(dtype)
    for key, (name, shape) in zip(keys, shapes.items())
  }


def random_mask(shape, density, seed=0):
  return np.random.default_rng(seed).random(shape) < density


def both(inputs, blocks, *, config=None, interpret=True, **options):
  """Results and gradients of the kernels, and of the definition."""
  results = []
  for implementation in ("mosaic_tpu", "reference"):

    def f(q, k, v, implementation=implementation):
      return block_sparse_attention(
        q, k, v, blocks, return_lse=True, implementation=implementation,
        config=config if implementation == "mosaic_tpu" else None, **options,
      )  # fmt: skip

    with pallas_kernels.target("tpu", interpret=interpret):
      made = value_and_gradients(f, inputs)
    out, lse = made["out"]
    empty = lse == -jnp.inf
    results.append({**made, "out": (out, jnp.where(empty, 0, lse), empty)})
  return results


@pytest.mark.parametrize("ranges", [1, 3])
@pytest.mark.parametrize("per_trip", [1, 4])
def test_jobs_hold_every_tile_once(ranges, per_trip):
  rows, blocks, c = 7, 10, 3
  size, steps = -(-blocks // ranges), -(-rows // c)
  pattern = BlockPattern.from_dense(
    random_mask((1, 2, rows, blocks), 0.5), block_q=128, block_kv=128
  )
  lists, _ = tile_lists(
    pattern, T=rows * 128, S=blocks * 128, causal=True, window=None, segment_ids=None
  )
  jobs = np.asarray(_jobs(lists, ranges, size, c, steps, per_trip, filler=c))
  jobs = jobs.reshape(ranges, 2, steps, -1)
  for h in range(2):
    wanted = {}
    for row in range(rows):
      full, num = int(lists.num_full[0, h, row]), int(lists.num[0, h, row])
      for slot in range(num):
        wanted[row, int(lists.idx[0, h, row, slot])] = slot < full
    seen = set()
    for r in range(ranges):
      for step in range(steps):
        plain, trips, first, *packed = jobs[r, h, step]
        assert first == r * size
        assert trips * per_trip <= len(packed)
        for trip in range(trips):
          mine = packed[trip * per_trip : (trip + 1) * per_trip]
          mine = [(int(job) % MAX_ROWS, int(job) >> ROW_BITS) for job in mine]
          if trip < plain:  # full tiles of one row
            assert len({row for row, _ in mine}) == 1
            assert all(wanted[step * c + row, r * size + block] for row, block in mine)
          for row, block in mine:
            if row == c:
              assert trip == trips - 1
              continue
            tile = step * c + row, r * size + block
            assert tile not in seen
            seen.add(tile)
    assert seen == set(wanted)


def test_ranges_of_keys_and_queries_add_up():
  inputs = arrays(T=700, S=700)
  blocks = BlockPattern.from_dense(random_mask((1, 1, 6, 6), 0.7), block_q=128, block_kv=128)
  two_blocks = 2 * 2 * 128 * (2 * 128 * 4)  # so three ranges forward, six backward
  config = TPUConfig(resident_bytes=two_blocks, rows_per_step=2, tiles_per_trip=2)
  assert_close(*both(inputs, blocks, config=config), 1e-5)


def test_rows_and_columns_without_tiles():
  inputs = arrays(T=640, S=640)
  mask = np.zeros((1, 1, 5, 5), bool)
  mask[0, 0, 3, 1] = mask[0, 0, 4, 4] = True
  got, wanted = both(
    inputs, BlockPattern.from_dense(mask, block_q=128, block_kv=128),
    config=TPUConfig(rows_per_step=2, tiles_per_trip=2),
  )  # fmt: skip
  assert_close(got, wanted, 1e-5)
  assert bool(got["out"][2][..., :384].all())
  assert not np.asarray(got["grad"]["k"])[:, 256:512].any()


@pytest.fixture(scope="module")
def two_tiles():
  inputs = arrays(T=256, S=256, N=1)
  blocks = BlockPattern.from_dense(np.tril(np.ones((1, 1, 2, 2), bool)), block_q=128, block_kv=128)
  interpret = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise")
  config = TPUConfig(tiles_per_trip=2)
  return inputs, both(inputs, blocks, config=config, interpret=interpret)


def test_a_wrong_tile_is_noticed(two_tiles):
  inputs, (got, _) = two_tiles
  other = BlockPattern.from_dense(np.ones((1, 1, 2, 2), bool), block_q=128, block_kv=128)
  wrong = block_sparse_attention(**inputs, blocks=other, causal=False, implementation="reference")
  assert relative_rms(got["out"][0], wrong) > 0.1


def test_no_pattern_is_every_tile_of_the_rule():
  inputs = arrays(T=200, S=330)
  assert_close(*both(inputs, None, window=150), 1e-5)


def test_accesses_stay_inside_and_do_not_race(two_tiles):
  # The kernels are compiled without bounds checks: the TPU interpreter checks every access.
  assert_close(*two_tiles[1], 1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(block=64), "multiple of 128 tokens up to 1024, got block_q=64"),
    (dict(dtype=jnp.float16), "computes in bfloat16 or float32, got float16"),
    (dict(config=TPUConfig(resident_bytes=1), return_block_max=True), "and 256 keys don't; raise"),
  ],
)
def test_refusals(changes, message):
  changes = dict(changes)
  inputs = arrays(T=256, S=256, dtype=changes.pop("dtype", jnp.float32))
  block = changes.pop("block", 128)
  blocks = BlockPattern.from_rule(256, block_q=block, block_kv=block)
  with pallas_kernels.target("tpu", interpret=True), pytest.raises(Unsupported, match=message):
    block_sparse_attention(**inputs, blocks=blocks, implementation="mosaic_tpu", **changes)


def test_config_checks():
  with pytest.raises(ValueError, match="rows_per_step is 0, expected a whole number"):
    TPUConfig(rows_per_step=0)


def test_trips_are_counted_as_the_kernel_makes_them():
  spec = Spec("x", dict(B=1, T=16 * 128, N=1, K=1, H=128, block=128))
  rows, _ = cost.causal_counts(spec, 0.5)
  trips = cost.count_trips(*rows, per_trip=4, rows_per_step=8)
  below = np.tril(np.ones((16, 16), bool), -1)
  mask = np.eye(16, dtype=bool)
  places = np.flatnonzero(below)
  chosen = np.random.default_rng(0).choice(places, round(0.5 * 136) - 16, replace=False)
  mask.flat[chosen] = True
  blocks = BlockPattern.from_dense(mask[None, None], block_q=128, block_kv=128)
  lists, _ = tile_lists(blocks, T=spec.T, S=spec.T, causal=True, window=None, segment_ids=None)
  jobs = np.asarray(_jobs(lists, 1, 16, 8, 2, 4, filler=8))[0, :, 0]
  assert trips.full == jobs[:, 0].sum()
  assert trips.full + trips.rest == jobs[:, 1].sum()
  assert trips.tiles == mask.sum()


@pytest.mark.aot
@pytest.mark.skipif(not _aot.available(), reason="libtpu is not installed (the `aot` extra)")
@pytest.mark.parametrize(
  ("spec", "forward", "backward"), [("dense", 1.0, 1.0), ("dense-128", 0.6, 0.7)]
)
def test_cycles_against_splash(spec, forward, backward):
  command = [sys.executable, "-m", "pallas_kernels.static_cost", "block_sparse_attention"]
  command += ["--topology", "v5e", "--spec", spec, "--against", "splash", "--json"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  (report,) = json.loads(done.stdout)

  def bundles(kernels, way):  # per tile of the loop that runs most
    loops = [x for k in report[kernels] if k["backward"] == way for x in k["loops"]]
    return max(loops, key=lambda x: x["bundles"] * x["trips"])["bundles_per_unit"]

  assert bundles("kernels", False) <= forward * bundles("against", False)
  assert bundles("kernels", True) <= backward * bundles("against", True)
