# SPDX-License-Identifier: Apache-2.0
"""Jacobi decoding against its definition, pass by pass."""

from __future__ import annotations

import pytest

from jaxdec.drafting import Jacobi, get
from jaxdec.drafting.jacobi import UNKNOWN
from jaxdec.errors import UserError
from tests.drafting.driven import drive

PROMPTS = [(3,), (1, 4, 1, 5)]


def mixed(text):
  """Depends on the last two tokens, weakly on the second: iterations converge from the left."""
  return (3 * text[-1] + (text[-2] % 2 if len(text) > 1 else 1)) % 11


@pytest.mark.parametrize("width", [1, 4])
def test_every_guess_is_corrected_in_every_pass(width):
  more = 0
  for step in drive(Jacobi(num_drafts=width), mixed, PROMPTS, 12, 11):
    for b, text in enumerate(step.texts):
      drafts = tuple(int(t) for t in step.tree.tokens[b, 1:])
      assert set(drafts) <= {*text, *range(11)} and all(step.tree.valid[b])
      rows = [mixed((*text, *drafts[:i])) for i in range(width + 1)]
      accepted = next((i for i in range(width) if drafts[i] != rows[i]), width)
      assert step.counts[b] == accepted + 1
      want = rows[accepted + 1 :]
      assert step.state[b].tolist() == want + [UNKNOWN] * (width - len(want))
      more += accepted > 0
  assert more


def test_a_law_of_positions_is_solved_in_one_pass():
  """Then W + 1 tokens are there at once, and all guesses are used up."""
  steps = drive(Jacobi(num_drafts=5), lambda text: 100 + len(text), PROMPTS, 6, 200)
  assert [s.counts.tolist() for s in steps] == [[1, 1], [6, 6]] * 3


def test_options():
  assert get("jacobi").num_nodes == 9
  with pytest.raises(UserError, match="num_drafts >= 1, got 0"):
    Jacobi(num_drafts=0)
