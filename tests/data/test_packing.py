# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdec.data.corpus import Corpus
from jaxdec.data.packing import best_fit, cut, fill_rows, plan_epoch
from jaxdec.errors import UserError

lengths_lists = st.lists(st.integers(0, 70), min_size=1, max_size=40)


def corpus_of(lengths):
  """Every token is its own place in the corpus, so that loss and doubling show."""
  offsets = np.cumsum([0, *lengths])
  return Corpus(np.arange(offsets[-1], dtype=np.int32), offsets)


@settings(max_examples=150, deadline=None)
@given(
  lengths=lengths_lists,
  seq_len=st.integers(2, 33),
  seed=st.integers(0, 5),
  epoch=st.integers(0, 3),
  shuffle=st.booleans(),
  random_cuts=st.booleans(),
)
def test_no_token_is_lost_or_doubled_and_segments_obey(
  lengths, seq_len, seed, epoch, shuffle, random_cuts
):
  corpus = corpus_of(lengths)
  plan = plan_epoch(
    corpus.offsets, seq_len, seed=seed, epoch=epoch, shuffle=shuffle, random_cuts=random_cuts
  )
  batch = fill_rows(corpus.tokens, plan, range(plan.num_rows))
  real = batch["segment_ids"] > 0
  np.testing.assert_array_equal(np.sort(batch["tokens"][real]), corpus.tokens)

  document = np.searchsorted(corpus.offsets, batch["tokens"], side="right")
  for row in range(plan.num_rows):
    ids = batch["segment_ids"][row]
    used = int((ids > 0).sum())
    assert (ids[:used] > 0).all() and not ids[used:].any()  # padding is a suffix
    assert used > 0 and ids[0] == 1 and set(np.diff(ids[:used])) <= {0, 1}
    for segment in range(1, ids.max() + 1):
      (at,) = np.nonzero(ids == segment)
      tokens = batch["tokens"][row, at]
      assert (np.diff(tokens) == 1).all()  # one stretch of the corpus,
      assert len(set(document[row, at])) == 1  # of one document
      np.testing.assert_array_equal(batch["positions"][row, at], np.arange(len(at)))
      np.testing.assert_array_equal(batch["loss_mask"][row, at], np.arange(len(at)) > 0)
  padding = ~real
  for name in ("tokens", "positions", "loss_mask"):
    assert not batch[name][padding].any()


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_lists, seq_len=st.integers(1, 33), data=st.data())
def test_cut_gives_pieces_in_order_with_the_first_as_asked(lengths, seq_len, data):
  offsets = np.cumsum([0, *lengths])
  first = np.array(data.draw(st.lists(st.integers(0, 99), min_size=len(lengths),
                                      max_size=len(lengths))))  # fmt: skip
  starts, sizes = cut(offsets, seq_len, first_cut=first)
  covered = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, sizes)] or [[]])
  np.testing.assert_array_equal(covered, np.arange(offsets[-1]))
  assert not len(sizes) or (sizes.min() >= 1 and sizes.max() <= seq_len)
  for begin, length, head in zip(offsets, lengths, first % seq_len):
    if length > seq_len and head:
      assert begin + head in starts
    elif length:
      assert sizes[list(starts).index(begin)] == min(length, seq_len)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_is_within_its_bound(lengths):
  rows = best_fit(np.array(lengths, dtype=np.int64), 20)
  assert sorted(p for row in rows for p in row) == list(range(len(lengths)))
  loads = [sum(lengths[p] for p in row) for row in rows]
  assert all(load <= 20 for load in loads)
  # No two rows could be one, and so at most one row is half empty or more.
  assert sum(load <= 10 for load in loads) <= 1


def test_best_fit_takes_the_fullest_row_that_fits():
  assert best_fit(np.array([6, 4, 5, 5, 8, 2]), 10) == [[4, 5], [0, 1], [2, 3]]


def test_rows_come_by_earliest_piece_without_shuffle_and_differ_by_epoch_with():
  corpus = corpus_of([17] * 20)
  fixed = [plan_epoch(corpus.offsets, 8, shuffle=False, random_cuts=False, epoch=e) for e in (0, 1)]
  np.testing.assert_array_equal(fixed[0].piece_starts, fixed[1].piece_starts)
  firsts = [fixed[0].piece_starts[o] for o in fixed[0].row_offsets[:-1]]
  assert firsts == sorted(firsts)
  shuffled = [plan_epoch(corpus.offsets, 8, epoch=e).piece_starts.tolist() for e in (0, 1)]
  assert shuffled[0] != shuffled[1]


def test_the_order_is_the_recorded_one():
  # A running training resumes with this order after an upgrade; numpy keeps the stream it is from.
  plan = plan_epoch(corpus_of([5, 9, 3, 12]).offsets, 6, seed=3, epoch=2)
  assert plan.piece_starts.tolist() == [22, 5, 14, 17, 28, 8, 0]


def test_seq_len_of_one_is_refused():
  with pytest.raises(UserError, match="seq_len must be at least 2, got 1"):
    plan_epoch(corpus_of([3]).offsets, 1)
