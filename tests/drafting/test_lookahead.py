# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding against windows and pools in plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import Lookahead, get
from jaxdec.errors import UserError
from tests.decoding.targets import target
from tests.drafting.driven import drive, node_texts
from tests.drafting.spelled import spelled

PROMPTS = [(3,), (1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)]
VOCAB = 11


def law(text):
  """Long texts of few words."""
  return (3 * text[-1] + (text[-2] % 2 if len(text) > 1 else 1)) % VOCAB


class Pool:
  """Rows of at most G n-grams, the youngest last."""

  def __init__(self, rows, guesses):
    self.rows, self.guesses, self.held = rows, guesses, {}

  def file(self, column):
    key, gram = column[0], tuple(column[1:])
    owner, grams = self.held.get(key % self.rows, (key, []))
    grams = [g for g in (grams if owner == key else []) if g != gram] + [gram]
    self.held[key % self.rows] = key, grams[-self.guesses :]

  def drafts(self, root):
    owner, grams = self.held.get(root % self.rows, (None, []))
    return {g[: j + 1] for g in grams if owner == root for j in range(len(g))}


@pytest.mark.parametrize("drafter", [
  Lookahead(window=4, ngram=4, guesses=3),
  Lookahead(window=3, ngram=2, guesses=2, pool_rows=4),
  Lookahead(window=5, ngram=3, guesses=2, from_prompt=False, realign=True),
])  # fmt: skip
def test_windows_and_pool_equal_the_reference(drafter):
  pools = [Pool(drafter.pool_rows or VOCAB, drafter.guesses) for _ in PROMPTS]
  if drafter.from_prompt:
    for pool, prompt in zip(pools, PROMPTS):
      for i in range(len(prompt) - drafter.levels):
        pool.file(prompt[i : i + drafter.ngram])
  expected, tokens = [None] * len(PROMPTS), np.zeros(len(PROMPTS), int)
  for n, step in enumerate(drive(drafter, law, PROMPTS, 24, VOCAB)):
    tokens += step.counts
    for b, text in enumerate(step.texts):
      # The last valid index of every guess: a node of the tree is a guess, or a probe.
      assert spelled(step.tree, b) == pools[b].drafts(text[-1])
      window = np.asarray(step.tree.tokens[b])[drafter.slots]
      assert window[0, 0] == text[-1]
      if expected[b] is not None:
        known = expected[b] >= 0
        known[0, 0] = False
        np.testing.assert_array_equal(window[known], expected[b][known])
      # A guess follows level 0 up to its column, then its own column.
      new = [law((*text[:-1], *window[0, : c + 1], *window[1:, c])) for c in range(drafter.window)]
      columns = np.concatenate([window, [new]])
      if n >= drafter.levels - 1:
        for c in range(drafter.window):
          pools[b].file(columns[:, c].tolist())
      expected[b] = columns[1:]
      if drafter.realign:
        gone = step.counts[b] - 1
        expected[b] = np.pad(
          columns[1:, gone:], ((0, 0), (0, min(gone, drafter.window))), constant_values=-1
        )
  assert (tokens > 24 * 1.2).all()


def test_what_a_window_token_sees():
  """The tree's mask and depths are the window's, row by row."""
  drafter = Lookahead(window=4, ngram=4, guesses=2)
  step = next(drive(drafter, law, PROMPTS, 1, VOCAB))
  seen = np.asarray(step.tree.topology.ancestors)
  for b in range(len(PROMPTS)):
    assert spelled(step.tree, b) == set() or b == 1
    for r in range(drafter.levels):
      for c in range(drafter.window):
        want = {drafter.slots[0, j] for j in range(c + 1)}
        want |= {drafter.slots[i, c] for i in range(r + 1)}
        node = drafter.slots[r, c]
        assert set(np.flatnonzero(seen[b, node])) == want
        assert step.tree.depth[b, node] == r + c == len(node_texts(step.tree, b)[node])
        assert bool(step.tree.valid[b, node]) == (node == 0)


def test_stop_tokens_end_a_column():
  """After a 5 of the prompt, met at random, the model would stop: such guesses go nowhere."""
  drafter, would = Lookahead(window=3, ngram=3, guesses=2), 0
  law = lambda text: 10 if text[-1] == 5 else 1  # noqa: E731
  for step in drive(drafter, law, [(5, 0)], 8, VOCAB, eos=(10,)):
    window = np.asarray(step.tree.tokens[0])[drafter.slots]
    would += (window[-1] == 5).sum()
    assert not (window == 10).any() and not (np.asarray(step.state.pool.grams) == 10).any()
  assert would


def test_without_guesses_it_is_plain_decoding():
  model, params = target()
  options = dict(max_new_tokens=9, stop=None, sampler=Sampler(temperature=1.0))
  plain = generate(model, params, [[1, 2], [3]], **options)
  out = generate(model, params, [[1, 2], [3]], drafter=Lookahead(window=3, guesses=0), **options)
  assert out.tokens == plain.tokens and out.stats.row_steps == (8, 8)


def test_options():
  assert get("lookahead").num_nodes == 56
  assert get("lookahead", window=15, guesses=15).num_nodes == 120
  assert Lookahead(num_drafts=10).num_nodes == 38
  with pytest.raises(UserError, match="ngram >= 2"):
    Lookahead(ngram=1)
