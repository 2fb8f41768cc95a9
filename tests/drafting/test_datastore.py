# SPDX-License-Identifier: Apache-2.0
"""Retrieval against reading the whole corpus in plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import generate
from jaxdec.drafting import Datastore
from jaxdec.drafting.datastore import CONTEXT, SEPARATOR, longest_match
from jaxdec.errors import UserError
from jaxdec.io.datastore import build_datastore
from tests.decoding.targets import target
from tests.drafting.spelled import context_of, estimates


def _corpus(seed, documents=7, alphabet=3):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, alphabet, n) for n in rng.integers(1, 30, documents)]


def _params(documents):
  return {k: jnp.asarray(v) for k, v in build_datastore(documents).items()}


def _places(documents, text, longest):
  """``length, continuations``: of the longest context that occurs, by trying them all."""
  for length in range(min(longest, len(text)), 0, -1):
    found = [
      d[i:].tolist()
      for d in documents
      for i in range(length, len(d))
      if d[i - length : i].tolist() == text[-length:]
    ]
    if found:
      return length, found
  return 0, []


def test_places_are_sorted_by_what_is_before_them():
  documents = _corpus(0)
  params = build_datastore(documents)
  tokens, order = params["tokens"], params["order"]
  assert sorted(order) == np.flatnonzero(tokens != SEPARATOR).tolist()
  contexts = [tokens[p - CONTEXT : p][::-1].tolist() for p in order]
  assert contexts == sorted(contexts)
  assert len({tuple(c) for c in contexts}) > len(order) // 2


@pytest.mark.parametrize("documents", [_corpus(1), _corpus(2, documents=1), [np.asarray([1])]])
def test_the_longest_context_is_found(documents):
  params = _params(documents)
  rng = np.random.default_rng(3)
  find = jax.jit(jax.vmap(longest_match, (None, None, 0)))
  texts = [rng.integers(0, 4, n).tolist() for n in rng.integers(1, 22, 60)]  # 3 never occurs
  texts += [d[: rng.integers(1, len(d) + 1)].tolist() for d in documents for _ in range(5)]
  recent = np.full((len(texts), CONTEXT), -2)
  for row, text in zip(recent, texts):
    row[: len(text)] = text[::-1][:CONTEXT]
  begin, length, count = map(np.asarray, find(*params.values(), jnp.asarray(recent, jnp.int32)))
  tokens, order = np.asarray(params["tokens"]), np.asarray(params["order"])
  for b, text in enumerate(texts):
    want, found = _places(documents, text, CONTEXT)
    assert length[b] == want
    if want:
      at = order[begin[b] : begin[b] + count[b]]
      assert sorted(tokens[p] for p in at) == sorted(f[0] for f in found)
      assert {tuple(tokens[p - want : p]) for p in at} == {tuple(text[-want:])}
    else:
      assert count[b] == len(order)  # every place agrees in nothing


@pytest.mark.parametrize("drafter", [
  Datastore(num_drafts=200, depth=5, matches=200), Datastore(num_drafts=6, depth=9, longest=3),
  Datastore(num_drafts=5, depth=3, shortest=4, longest=6),
])  # fmt: skip
def test_drafts_are_the_commonest_continuations(drafter):
  documents = _corpus(4)
  params = _params(documents)
  rng = np.random.default_rng(5)
  texts = [rng.integers(0, 4, n).tolist() for n in rng.integers(1, 16, 25)]
  texts += [d[: rng.integers(1, len(d) + 1)].tolist() for d in documents]
  context = context_of(texts, 33)
  listed = jax.jit(drafter.candidates)(params, (), context, None)
  has = drafter.has_draft(params, (), context)
  for b, text in enumerate(texts):
    length, found = _places(documents, text, drafter.longest)
    found = found if length >= drafter.shortest else []
    counts: dict = {}
    for follows in found:
      for n in range(1, min(len(follows), drafter.max_depth) + 1):
        counts[tuple(follows[:n])] = counts.get(tuple(follows[:n]), 0) + 1
    got = estimates(listed, b)
    assert bool(has[b]) == bool(found)
    assert len(got) == min(len(counts), drafter.num_drafts)
    for prefix, probability in got.items():
      assert abs(probability - counts[prefix] / (len(found) + 1)) < 1e-6
    left_out = [counts[p] for p in set(counts) - set(got)]
    assert max(left_out, default=0) <= min((counts[p] for p in got), default=0)
  assert 0 < sum(map(bool, has)) < len(texts)


def test_of_many_places_evenly_spread_ones_are_counted():
  """1 is followed by 2 in the first three quarters of its places, by 3 in the rest: their contexts
  (5 1 and 6 1) sort them so."""
  documents = [np.asarray([5, 1, 2])] * 75 + [np.asarray([6, 1, 3])] * 25
  drafter = Datastore(num_drafts=2, longest=1, shortest=1, matches=16)
  listed = drafter.candidates(_params(documents), (), context_of([[9, 1]], 4), None)
  assert estimates(listed) == pytest.approx({(2,): 12 / 17, (3,): 4 / 17})


def test_a_missing_corpus_and_bad_options_are_named():
  model, params = target()
  with pytest.raises(UserError, match="has no corpus; build one with jaxdec datastore"):
    generate(model, params, [[1, 2]], max_new_tokens=2, drafter=Datastore())
  for options in ({"longest": 17}, {"shortest": 0}, {"depth": 0}):
    with pytest.raises(UserError, match="datastore needs"):
      Datastore(**options)
  for documents in ([], [np.zeros(0, np.int32)]):
    with pytest.raises(UserError, match="holds no token"):
      build_datastore(documents)
