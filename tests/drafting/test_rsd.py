# SPDX-License-Identifier: Apache-2.0
"""Stochastic beam search: sequences drawn without replacement."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from toy_laws import MODEL, V, drawn, laws, text_law, three_tokens

from jaxdec.decoding.verify import WithoutReplacement
from jaxdec.drafting.rsd import RsdC, RsdS, conditioned
from jaxdec.drafting.sampled_tree import Kept
from tests.decoding.chi_square import chi_square_p


def sequences(tree, width: int) -> tuple[np.ndarray, np.ndarray]:
  """The ``width`` nodes of the last level as texts, numbers below V^2, and which of them are."""
  tokens, parent = np.asarray(tree.tokens), np.asarray(tree.parent)
  last = tokens[:, -width:]
  first = np.take_along_axis(tokens, parent[:, -width:], axis=1)
  return first * V + last, np.asarray(tree.valid)[:, -width:]


def text_pairs() -> np.ndarray:
  """P(first two sequences drawn without replacement)."""
  q = [np.asarray(x, np.float64) for x in laws()[1]]
  one = (q[0][:, None] * q[1]).ravel()
  both = np.outer(one, one) / (1 - one)[:, None]
  np.fill_diagonal(both, 0)
  return both


def test_sequences_are_drawn_without_replacement():
  text, valid = sequences(drawn(RsdS(model=MODEL, draws="sampled", width=3, depth=2)), 3)
  assert valid.all() and all(len(set(row)) == 3 for row in text[:2000].tolist())
  pairs = np.bincount(text[:, 0] * V * V + text[:, 1], minlength=V**4)
  assert chi_square_p(pairs, text_pairs()) > 1e-4
  # The first two sequences of the tree that branches at every node are drawn otherwise.
  wrong, _ = sequences(drawn(RsdC(model=MODEL, draws="sampled", branching=(2, 2))), 4)
  pairs = np.bincount(wrong[:, 0] * V * V + wrong[:, 1], minlength=V**4)
  assert chi_square_p(pairs, text_pairs()) < 1e-6


def test_a_beam_with_room_for_all_enumerates():
  drafter = RsdS(model=MODEL, draws="sampled", width=2 * V * V, depth=2)
  assert drafter.num_nodes == 1 + V + V * V
  text, valid = sequences(drawn(drafter, 200), V * V)
  assert valid.all() and np.all(np.sort(text, axis=1) == np.arange(V * V))


def test_conditioned_values():
  """Against the plain formula ``-log(exp(-G) - exp(-Z) + exp(-g))`` in float64."""
  rng = np.random.default_rng(0)
  g = -np.sort(-rng.gumbel(size=(200, 5)) * 2, axis=1)
  largest = rng.gumbel(size=(200, 1)) * 2
  got = np.asarray(conditioned(jnp.asarray(g, jnp.float32), jnp.asarray(largest, jnp.float32)))
  want = -np.log(np.exp(-largest) - np.exp(-g[:, :1]) + np.exp(-g))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(got[:, :1], largest.astype(np.float32))
  # Far apart values, and tokens and beams there are none of.
  far = conditioned(
    jnp.asarray([[80.0, 79.0, -90.0], [3.0, -jnp.inf, -jnp.inf], [1.0, 0.0, -1.0]]),
    jnp.asarray([[-100.0], [2.0], [-jnp.inf]]),
  )
  assert not jnp.any(jnp.isnan(far))
  assert far[0, 0] == -100 and far[0, 1] <= -100 and far[0, 2] < -100
  assert far[1].tolist() == [2.0, -np.inf, -np.inf] and far[2].tolist() == [-np.inf] * 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByProbability(RsdS):
  """Wrong: of what was drawn, the likeliest sequences are kept."""

  def keep(self, level, draws, carry):
    b, n, k = draws.tokens.shape
    phi = (carry if carry is not None else jnp.zeros((b, 1)))[..., None]
    value, index = jax.lax.top_k((phi + draws.log_q).reshape(b, n * k), self.width)
    return Kept(index, value > -jnp.inf, value)


def test_keeping_likely_sequences_breaks_the_law():
  drafter = ByProbability(model=MODEL, draws="sampled", width=2, depth=2)
  assert chi_square_p(three_tokens(drafter, WithoutReplacement())[0], text_law()) < 1e-6
  right = RsdS(model=MODEL, draws="sampled", width=2, depth=2)
  assert chi_square_p(three_tokens(right, WithoutReplacement())[0], text_law()) > 1e-4
