# SPDX-License-Identifier: Apache-2.0
"""Mixtures: exact shares, exact resumption, the same rows on any number of processes."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from jaxdec.data import Corpus, Share, make_dataset
from jaxdec.data.mixture import Mixture, load_data, make_batches
from jaxdec.data.sources import parse_mixture
from jaxdec.errors import UserError


def corpus(source, count):
  """Documents of 16 tokens, whose first one names the corpus; the even ones are labels."""
  rng = np.random.default_rng(source)
  ids = [[source, *rng.integers(10, 99, 15)] for _ in range(count)]
  return Corpus.from_token_lists(ids, labels=[np.arange(16) % 2 == 0] * count)


@pytest.fixture(scope="module")
def mixture():
  return Mixture((corpus(1, 5), corpus(2, 9), corpus(3, 2)), (5, 3, 2))


SETTINGS = {"batch_size": 4, "seq_len": 16, "seed": 7}


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def test_every_stretch_has_the_given_shares(mixture):
  rows = np.concatenate([b["tokens"][:, 0] for b in take(make_batches(mixture, **SETTINGS), 25)])
  for end in range(1, len(rows) + 1):
    counts = [np.sum(rows[:end] == source) for source in (1, 2, 3)]
    assert np.abs(counts - end * mixture.shares).max() <= 1
  assert counts == [50, 30, 20]


def test_each_corpus_goes_through_its_epochs_as_it_would_alone(mixture):
  batches = take(make_batches(mixture, **SETTINGS), 25)
  for source, part in enumerate(mixture.corpora, 1):
    alone = make_dataset(part, **{**SETTINGS, "batch_size": 1})
    mixed = [b["tokens"][i] for b in batches for i in range(4) if b["tokens"][i, 0] == source]
    for row, expected in zip(mixed, alone):
      np.testing.assert_array_equal(row, expected["tokens"][0])


def test_labels_come_along(mixture):
  batch = next(make_batches(mixture, **SETTINGS))
  expected = (np.arange(16) % 2 == 0) & (np.arange(16) > 0)
  np.testing.assert_array_equal(batch["loss_mask"], np.tile(expected, (4, 1)))


@pytest.mark.parametrize("stop_after", [0, 1, 3, 10])
def test_resume_is_exact(mixture, stop_after):
  iterator = make_batches(mixture, **SETTINGS)
  take(iterator, stop_after)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 8)
  fresh = make_batches(mixture, **SETTINGS)
  fresh.set_state(state)
  for a, b in zip(expected, take(fresh, 8), strict=True):
    same(a, b)
  other = make_batches(Mixture(mixture.corpora, (5, 3, 3)), **SETTINGS)
  with pytest.raises(UserError, match="a source, its weight"):
    other.set_state(state)


def test_processes_together_see_the_rows_of_one(mixture):
  whole = take(make_batches(mixture, **SETTINGS), 6)
  parts = [take(make_batches(mixture, share=Share((i,), 2), **SETTINGS), 6) for i in range(2)]
  for batch, *pieces in zip(whole, *parts, strict=True):
    same(batch, {name: np.concatenate([p[name] for p in pieces]) for name in batch})


def test_one_pass_ends_with_the_first_corpus_that_does(mixture):
  batches = list(make_batches(mixture, num_epochs=1, shuffle=False, **SETTINGS))
  rows = np.concatenate([b["tokens"][:, 0] for b in batches])
  used = rows[rows > 0]
  assert np.sum(used == 1) == 5  # then the sixth row of the first corpus would be due
  assert len(rows) - len(used) < 4 and np.all(rows[: len(used)] > 0)


def test_mixtures_are_written_with_weights(tmp_path):
  assert parse_mixture("python_stdlib") == [(1.0, "python_stdlib")]
  assert parse_mixture("0.7*a b + 3*tfds:x") == [(0.7, "a b"), (3.0, "tfds:x")]
  assert parse_mixture("c + d") == [(1.0, "c + d")]  # a name, as before
  for bad in ("x*a + 1*b", "0*a", "1*", "-1*a", "nan*a"):
    with pytest.raises(UserError, match="a mixture is written"):
      parse_mixture(bad)
  with pytest.raises(UserError, match="weights of a mixture must be positive"):
    Mixture((corpus(1, 1),), (0.0,))
  with pytest.raises(UserError, match="one weight a source"):
    Mixture((corpus(1, 1),), ())


class Letters:
  """A tokenizer of single characters."""

  eos_ids = (0,)

  def encode(self, text):
    return [ord(c) for c in text]


def test_sources_are_loaded_by_what_they_are(tmp_path):
  for name in "ab":
    (tmp_path / name).mkdir()
    for i in range(60):
      (tmp_path / name / f"{i}.txt").write_text(name * (i + 1))
  single = load_data(str(tmp_path / "a"), "train", Letters())
  assert isinstance(single, Corpus)
  both = load_data(f"2*{tmp_path / 'a'} + 1*{tmp_path / 'b'}", "train", Letters())
  assert both.weights == (2.0, 1.0)
  assert [set(c.tokens.tolist()) for c in both.corpora] == [{0, ord("a")}, {0, ord("b")}]
