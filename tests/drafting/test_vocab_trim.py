# SPDX-License-Identifier: Apache-2.0
"""Trimmed draft vocabularies: any drafter, any size, the same output."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import VOCAB, init, randomized, target
from universal import SAMPLERS, plain

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import DraftModel, DraftVocabulary, Eagle3, EarlyExit, Medusa, StaticTree
from jaxdec.drafting.checkpoint import from_config, to_config
from jaxdec.drafting.vocab_trim import (
  VocabTrim,
  draft_bytes,
  frequent,
  memory_bound_speedup,
  token_counts,
  trim,
  trim_decoder,
  written_counts,
)
from jaxdec.errors import UserError
from tests.decoding.chi_square import chi_square_p

PROMPTS = tuple(
  tuple(int(x) for x in np.random.default_rng(3).integers(0, VOCAB, n)) for n in (5, 11, 2)
)
FEW = DraftVocabulary([2, 3, 5, 7, 11, 13], VOCAB)
ALL = DraftVocabulary(range(VOCAB), VOCAB)
BUSHY = StaticTree.from_paths([(0,), (1,), (0, 0), (0, 1)])


@functools.cache
def drafter_of(kind):
  """A drafter with random parameters: own heads (two kinds), the target's head, a decoder."""
  t = target()
  config = t.model.config
  if kind == "early_exit":
    return EarlyExit(exit=2, num_drafts=3), {}
  if kind == "draft_model":
    other = target(seed=1, layers=1)
    return DraftModel(model=other.model, num_drafts=3), other.params
  drafter = {
    "medusa": lambda: Medusa.for_target(config, num_heads=2, tree=BUSHY),
    "shared_medusa": lambda: Medusa.for_target(config, num_heads=2, tree=BUSHY, share_head=True),
    "eagle3": lambda: Eagle3.for_target(config, num_heads=2),
  }[kind]()
  return drafter, randomized(init(drafter, t), scale=0.5)


def decode(drafter, params, sampler="greedy", tokens=17, **kwargs):
  t = target()
  return generate(
    t.model, t.params, [list(p) for p in PROMPTS], max_new_tokens=tokens,
    sampler=SAMPLERS[sampler], drafter=drafter, drafter_params=params, stop=None, seed=5, **kwargs,
  )  # fmt: skip


CASES = [
  ("medusa", "greedy"),
  ("shared_medusa", "sampled"),
  ("eagle3", "sampled"),
  ("early_exit", "greedy"),
  ("draft_model", "sampled"),
]


@pytest.mark.parametrize(("kind", "sampler"), CASES)
def test_lossless_and_inside(kind, sampler):
  """The target's own tokens come out; nothing outside the vocabulary is ever drafted."""
  drafter, params = trim(*drafter_of(kind), target(), FEW)
  out = decode(drafter, params, sampler)
  assert out.tokens == plain(sampler, PROMPTS, 17)
  if kind in ("shared_medusa", "early_exit"):
    assert isinstance(drafter, VocabTrim)


@functools.partial(jax.jit, static_argnums=0)
def trimmed_and_whole(model, params, head, hidden):
  ours = model.apply({"params": {**params, "trimmed_head": head}}, hidden, method="unembed")
  return ours, target().model.apply({"params": params}, hidden, method="unembed")


@pytest.mark.parametrize("vocabulary", [FEW, DraftVocabulary([4], VOCAB), ALL])
def test_head_has_the_columns_of_the_vocabulary(vocabulary):
  """Logits inside are the whole head's, bit by bit where nothing was cut; outside -inf."""
  t, model = target(), trim_decoder(target().model, vocabulary)
  _, params = trim(EarlyExit(), {}, t, vocabulary)
  hidden = jax.random.normal(jax.random.key(0), (2, 3, 32))
  ours, whole = trimmed_and_whole(model, t.params, params["head"], hidden)
  inside = vocabulary.t2d
  assert np.all(np.isneginf(ours[..., ~inside]))
  np.testing.assert_allclose(ours[..., inside], whole[..., inside], atol=1e-5)
  if vocabulary is ALL:
    np.testing.assert_array_equal(ours, whole)


def test_own_heads_are_sliced_and_ids_come_back():
  t = target()
  drafter, params = drafter_of("medusa")
  trimmed, cut = trim(drafter, params, t, FEW)
  for k in range(2):
    before, after = (p[f"head_{k}"]["lm_head"]["kernel"] for p in (params, cut))
    np.testing.assert_array_equal(after, before[:, FEW.ids])
  np.testing.assert_array_equal(FEW.d2t + np.arange(len(FEW.ids)), FEW.ids)
  np.testing.assert_array_equal(np.flatnonzero(FEW.t2d), FEW.ids)
  assert from_config(to_config(trimmed)) == trimmed
  # Once more, to a subset of what is left.
  least = DraftVocabulary([3, 11], VOCAB)
  _, twice = trim(trimmed, cut, t, least)
  _, once = trim(drafter, params, t, least)
  jax.tree.map(np.testing.assert_array_equal, twice, once)


@pytest.mark.parametrize("kind", ["medusa", "early_exit"])
def test_the_whole_vocabulary_changes_nothing(kind):
  before = decode(*drafter_of(kind))
  after = decode(*trim(*drafter_of(kind), target(), ALL))
  assert after.tokens == before.tokens
  assert after.stats.accepted_by_depth == before.stats.accepted_by_depth


def test_what_is_drafted_lies_in_the_vocabulary():
  from universal import start

  from jaxdec.drafting.base import Context

  t = target()
  text = np.asarray([PROMPTS[1]])
  for kind in ("medusa", "shared_medusa"):
    drafter, params = trim(*drafter_of(kind), t, FEW)
    state, root = start(drafter, params, t, text, [10])
    context = Context(
      root=root, length=jnp.asarray([10]), history=jnp.asarray(text), target=t,
      sampler=Sampler(), keys=None,
    )  # fmt: skip
    tree, _ = jax.jit(lambda s, p, d=drafter, c=context: d.propose(p, s, c, None))(state, params)
    drafted = np.asarray(tree.tokens)[0, 1:]
    assert set(drafted.tolist()) <= set(FEW.ids.tolist())
    whole, whole_params = drafter_of(kind)
    logits = whole.first(whole_params, state, context)[0][0]
    assert drafted[0] == FEW.ids[np.argmax(np.asarray(logits)[FEW.ids])]


@pytest.mark.slow
def test_ratio_keeps_the_targets_law():
  """Drafts sampled from a cut law q, of one token even: what comes out has the target's law."""
  t, rows = target(vocab=5, dim=16, layers=1, seed=2), 4000
  other = target(vocab=5, dim=16, layers=1, seed=3)
  plain_drafter = DraftModel(model=other.model, num_drafts=2, draws="sampled")
  for ids in ([1], [0, 2, 3]):
    drafter, params = trim(plain_drafter, other.params, t, DraftVocabulary(ids, 5))
    out = generate(
      t.model, t.params, [[1, 2]] * rows, max_new_tokens=3, sampler=Sampler(1.0), rule="ratio",
      drafter=drafter, drafter_params=params, stop=None, seed=3,
    )  # fmt: skip
    counts = np.zeros((5, 5, 5))
    for a, b, c in out.tokens:
      counts[a, b, c] += 1
    law = np.zeros((5, 5, 5))
    tokens = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    text = np.concatenate([np.tile([1, 2], (125, 1)), tokens], axis=1)
    logits = t.model.apply({"params": t.params}, jnp.asarray(text)).logits
    probs = np.asarray(jax.nn.softmax(logits, -1))
    p = np.prod([probs[np.arange(125), 1 + i, tokens[:, i]] for i in range(3)], axis=0)
    law = p.reshape(5, 5, 5)
    assert chi_square_p(counts.reshape(-1), law.reshape(-1)) > 1e-3


def test_counts_and_choice():
  counts = token_counts([[1, 1, 2], np.array([4, 4, 4])], 6)
  np.testing.assert_array_equal(counts, [0, 2, 1, 0, 3, 0])
  assert frequent(counts, 2).ids.tolist() == [1, 4]
  assert frequent(counts, 4).ids.tolist() == [0, 1, 2, 4]  # of the unseen ones the lowest id
  assert frequent(counts, 2, keep=[5]).ids.tolist() == [4, 5]  # end of sequence, never seen
  with pytest.raises(UserError, match=r"2 \(tokens to keep\) to 6"):
    frequent(counts, 1, keep=[0, 5])
  t = target()
  written = written_counts(
    t.model, t.params, [list(p) for p in PROMPTS], max_new_tokens=17, stop=None
  )
  np.testing.assert_array_equal(written, token_counts(plain("greedy", PROMPTS, 17), VOCAB))


def test_bytes_read_and_speedup():
  t, item = target(), 4
  for kind, heads in [("medusa", 2), ("shared_medusa", 1), ("early_exit", 1), ("draft_model", 1)]:
    before = draft_bytes(*drafter_of(kind), t)
    after = draft_bytes(*trim(*drafter_of(kind), t, FEW), t)
    assert before - after == heads * (VOCAB - len(FEW.ids)) * 32 * item, kind
  assert memory_bound_speedup(3.0, 4, 0.25) == 1.5
  assert memory_bound_speedup(1.0, 4, 0.0) == 1.0


def test_mistakes_are_explained():
  t = target()
  with pytest.raises(UserError, match="subset of 9 tokens"):
    trim(*drafter_of("medusa"), t, DraftVocabulary([1], 9))
  trimmed, params = trim(*drafter_of("medusa"), t, FEW)
  with pytest.raises(UserError, match="lacks 1 of the tokens to keep, 4 among them"):
    trim(trimmed, params, t, DraftVocabulary([3, 4], VOCAB))
