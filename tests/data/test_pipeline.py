# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxdec.data import Corpus, Share, make_dataset, tokenize_documents
from jaxdec.data.corpus import cache_folder
from jaxdec.errors import UserError


@pytest.fixture(scope="module")
def corpus():
  rng = np.random.default_rng(0)
  return Corpus.from_token_lists([rng.integers(1, 99, n) for n in rng.integers(1, 60, 50)])


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name])


def take(iterator, count):
  return list(itertools.islice(iterator, count))


@pytest.mark.parametrize("stop_after", [0, 1, 5, "last of the epoch", "first of the next"])
def test_resume_is_exact_wherever_it_stops(corpus, stop_after):
  settings = dict(batch_size=4, seq_len=16, seed=7)
  iterator = make_dataset(corpus, **settings)
  per_epoch = iterator.dataset.batches_in_epoch(0)
  stop_after = {"last of the epoch": per_epoch, "first of the next": per_epoch + 1}.get(
    stop_after, stop_after
  )
  take(iterator, stop_after)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, per_epoch + 3)  # across the end of an epoch

  fresh = make_dataset(corpus, **settings)
  fresh.set_state(state)
  for a, b in zip(expected, take(fresh, per_epoch + 3), strict=True):
    same(a, b)
  iterator.set_state(state)  # and back, on the one that has gone on
  same(next(iterator), expected[0])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_the_single_host_order(corpus, hosts):
  settings = dict(batch_size=4, seq_len=16, seed=1, num_epochs=2)
  whole = list(make_dataset(corpus, **settings))
  shares = [
    make_dataset(corpus, process_index=i, process_count=hosts, **settings) for i in range(hosts)
  ]
  assert len({json.dumps(s.get_state()) for s in shares}) == 1
  for batch, *parts in zip(whole, *shares, strict=True):
    joined = {name: np.concatenate([p[name] for p in parts]) for name in batch}
    same(batch, joined)


def test_a_state_moves_between_host_counts(corpus):
  settings = dict(batch_size=4, seq_len=16)
  one = make_dataset(corpus, **settings)
  take(one, 3)
  two = make_dataset(corpus, process_index=1, process_count=2, **settings)
  two.set_state(one.get_state())
  np.testing.assert_array_equal(next(one)["tokens"][2:], next(two)["tokens"])


def test_parts_of_a_batch_that_are_no_neighbours(corpus):
  settings = dict(batch_size=8, seq_len=16, seed=2)
  whole = make_dataset(corpus, **settings)
  some = make_dataset(corpus, share=Share((0, 2), 4), **settings)
  for _ in range(3):
    batch, part = next(whole), next(some)
    same({name: value[[0, 1, 4, 5]] for name, value in batch.items()}, part)
  for parts, of in (((), 1), ((1, 0), 2), ((0, 0), 2), ((2,), 2), ((-1,), 2), ((0,), 0)):
    with pytest.raises(UserError, match="parts of a"):
      Share(parts, of)


def test_an_epoch_holds_every_token_once_and_ends(corpus):
  batches = list(make_dataset(corpus, batch_size=8, seq_len=16, num_epochs=1))
  tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
  np.testing.assert_array_equal(np.sort(tokens), np.sort(corpus.tokens))
  assert all(b["tokens"].shape == (8, 16) for b in batches)


def test_dtypes_and_seeds(corpus):
  batch = next(make_dataset(corpus, batch_size=2, seq_len=16))
  dtypes = {name: str(a.dtype) for name, a in batch.items()}
  integer = dict.fromkeys(("tokens", "segment_ids", "positions"), "int32")
  assert dtypes == {**integer, "loss_mask": "bool"}
  first = [
    next(make_dataset(corpus, batch_size=2, seq_len=16, seed=s))["tokens"] for s in (0, 0, 1)
  ]
  np.testing.assert_array_equal(first[0], first[1])
  assert (first[0] != first[2]).any()


def test_documents_end_with_end_of_text(tokenizer, stdlib_documents):
  corpus = tokenize_documents(stdlib_documents, tokenizer)
  assert len(corpus) == len(stdlib_documents)
  for ids, document in zip(corpus, stdlib_documents):
    assert ids[-1] == 0 and (ids[:-1] != 0).all()
    assert tokenizer.decode(ids[:-1].tolist()) == document.text
  assert corpus.num_bytes == sum(len(d.text.encode()) for d in stdlib_documents)


def test_a_special_name_in_a_text_ends_nothing(tokenizer):
  corpus = tokenize_documents(["a<|endoftext|>b"], tokenizer, cache=False)
  assert np.flatnonzero(corpus.tokens == 0).tolist() == [len(corpus.tokens) - 1]
  assert tokenizer.encode("<|endoftext|>").ids == [0]  # and the tokenizer is left as it was


def test_our_tokenizer_object_gives_the_same_ids_and_its_beginning(tokenizer, stdlib_documents):
  from jaxdec.io.tokenizers import Tokenizer

  documents = stdlib_documents[:3]
  plain = tokenize_documents(documents, tokenizer)
  wrapped = tokenize_documents(documents, Tokenizer(tokenizer, eos_ids=[0]))
  assert wrapped.fingerprint == plain.fingerprint
  with_bos = tokenize_documents(documents, Tokenizer(tokenizer, eos_ids=[5], bos_id=7))
  for ids, other in zip(plain, with_bos, strict=True):
    assert other.tolist() == [7, *ids[:-1], 5]


def test_the_cache_is_used_and_never_stale(tokenizer, stdlib_documents):
  documents = stdlib_documents[:3]

  def kept():
    return sorted((cache_folder() / "corpus").glob("[0-9a-f]*"))

  first = tokenize_documents(documents, tokenizer)
  assert len(kept()) == 1 and isinstance(first.tokens, np.memmap)
  assert tokenize_documents(documents, tokenizer).fingerprint == first.fingerprint
  assert len(kept()) == 1
  # Another text, the same texts cut elsewhere, another end: each is another corpus.
  texts = [d.text for d in documents]
  joined = [texts[0] + texts[1], texts[2]]
  for other in ([*texts[:2], "x"], joined):
    assert tokenize_documents(other, tokenizer).fingerprint != first.fingerprint
  tokenize_documents(documents, tokenizer, eos_id=1)
  assert len(kept()) == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "no meta"])
def test_a_damaged_cache_is_made_again(tokenizer, stdlib_documents, damage):
  first = tokenize_documents(stdlib_documents[:3], tokenizer)
  tokens, fingerprint = np.array(first.tokens), first.fingerprint
  (folder,) = (cache_folder() / "corpus").glob("[0-9a-f]*")
  file = folder / ("meta.json" if damage == "no meta" else "tokens.npy")
  raw = bytearray(file.read_bytes())
  del first
  if damage == "no meta":
    file.unlink()
  elif damage == "cut":
    file.write_bytes(raw[: len(raw) // 2])
  else:
    raw[-1] ^= 1
    file.write_bytes(raw)
  again = tokenize_documents(stdlib_documents[:3], tokenizer)
  np.testing.assert_array_equal(again.tokens, tokens)
  assert again.fingerprint == fingerprint


def test_an_unwritable_cache_is_no_error(tokenizer, tmp_path):
  (tmp_path / "file").write_text("")
  corpus = tokenize_documents(["some text"], tokenizer, cache=tmp_path / "file")
  assert len(corpus) == 1


def test_errors(corpus, tokenizer):
  good = dict(batch_size=4, seq_len=16)
  for bad, match in [
    ({"batch_size": 3, "process_count": 2}, "positive multiple of their number 2, got 3"),
    ({"process_index": 1}, "process_index must be in 0..0"),
    ({"process_index": 0, "share": Share()}, "not both"),
    ({"seed": -1}, "seed must be 0 or more, got -1"),
    ({"num_epochs": 0}, "num_epochs must be at least 1"),
    ({"seq_len": 1}, "seq_len must be at least 2"),
  ]:
    with pytest.raises(UserError, match=match):
      make_dataset(corpus, **{**good, **bad})
  with pytest.raises(UserError, match="needs a tokenizer"):
    make_dataset(["text"], **good)
  with pytest.raises(UserError, match="no document in this source"):
    make_dataset([], tokenizer, **good)
  with pytest.raises(UserError, match="declares no end-of-text"):
    make_dataset(["text"], object(), **good)
  other = make_dataset(corpus, **{**good, "seed": 1}).get_state()
  with pytest.raises(UserError, match="another data set"):
    make_dataset(corpus, **good).set_state(other)


def test_nothing_heavy_is_loaded(tmp_path):
  """The demo's way to its data loads neither TensorFlow, torch nor transformers."""
  code = """
import sys, itertools
from jaxdec.data import open_source, make_dataset, train_tokenizer, cut_prompts
documents = list(itertools.islice(open_source("python_stdlib", "test"), 5))
tokenizer = train_tokenizer((d.text for d in documents), vocab_size=400)
next(make_dataset(documents, tokenizer, batch_size=2, seq_len=32))
cut_prompts(documents, tokenizer, 2, min_tokens=8, max_tokens=16)
heavy = {"tensorflow", "torch", "transformers", "tensorflow_datasets"}
print(sorted(heavy & set(sys.modules)))
"""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXDEC_CACHE": str(tmp_path)}
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == "[]"
