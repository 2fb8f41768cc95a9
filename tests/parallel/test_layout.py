# SPDX-License-Identifier: Apache-2.0
"""The zigzag order: permutations, where each token lies, batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdec.errors import UserError
from jaxdec.parallel.sequence import layout
from jaxdec.training.tasks.language_model import next_token_targets


def test_order_of_blocks():
  x = np.arange(16)[None]
  assert layout.to_zigzag(x, 4)[0].tolist() == [
    0,
    1,
    14,
    15,
    2,
    3,
    12,
    13,
    4,
    5,
    10,
    11,
    6,
    7,
    8,
    9,
  ]
  assert layout.zigzag_order(2).tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_inverse_on_any_axis_of_numpy_and_jax_arrays(ranks):
  x = np.random.default_rng(0).normal(size=(2, 48, 3))
  for array, axis in ((x, 1), (jnp.asarray(x), 1), (x.swapaxes(1, 2), -1)):
    moved = layout.to_zigzag(array, ranks, axis=axis)
    assert type(moved) is type(array)
    np.testing.assert_array_equal(layout.from_zigzag(moved, ranks, axis=axis), array)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_token_index_follows_the_permutation(ranks, kind):
  mesh = Mesh(np.array(jax.devices()[:ranks]), ("seq",))
  f = jax.shard_map(
    lambda: layout.token_index("seq", 24 // ranks, kind), mesh=mesh, in_specs=(), out_specs=P("seq")
  )
  whole = np.arange(24)[None]
  np.testing.assert_array_equal(
    f(), (layout.to_zigzag(whole, ranks) if kind == "zigzag" else whole)[0]
  )


def test_zigzag_makes_causal_work_equal():
  for ranks in (2, 4, 8):
    work = [sum(b + 0.5 for b in held) for held in layout.blocks_of(ranks, "zigzag")]
    assert len(set(work)) == 1
    assert len({b for held in layout.blocks_of(ranks, "zigzag") for b in held}) == 2 * ranks


def test_labels_of_a_batch_are_shifted_before_permuting():
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(0, 50, (2, 32)).astype(np.int32),
    "segment_ids": np.sort(rng.integers(1, 5, (2, 32))).astype(np.int32),
    "loss_mask": rng.integers(0, 2, (2, 32)).astype(np.int32),
    "row": np.arange(2),
  }
  got = layout.zigzag_batch(batch, 4)
  labels, mask = next_token_targets(batch)
  np.testing.assert_array_equal(layout.from_zigzag(got["labels"], 4), labels)
  np.testing.assert_array_equal(layout.from_zigzag(got["label_mask"], 4), mask)
  np.testing.assert_array_equal(layout.from_zigzag(got["positions"], 4)[1], np.arange(32))
  np.testing.assert_array_equal(layout.from_zigzag(got["tokens"], 4), batch["tokens"])
  assert got["row"].tolist() == [0, 1]
  plain = layout.zigzag_batch({"tokens": batch["tokens"]}, 4)
  np.testing.assert_array_equal(
    layout.from_zigzag(plain["label_mask"], 4), next_token_targets({"tokens": batch["tokens"]})[1]
  )


def test_mistakes_are_one_sentence():
  with pytest.raises(UserError, match="20 tokens cannot be cut into 8 zigzag blocks"):
    layout.to_zigzag(np.zeros((1, 20)), 4)
  with pytest.raises(UserError, match="did you mean 'zigzag'"):
    layout.blocks_of(2, "zig-zag")
