# SPDX-License-Identifier: Apache-2.0
"""Trees that grow by the mass left before each draw."""

from __future__ import annotations

import dataclasses
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_laws import MODEL, PLAIN, V, context, drawn, text_law, three_tokens

from jaxdec.decoding.sampling import request_keys
from jaxdec.decoding.verify import WithoutReplacement
from jaxdec.drafting.dyspec import DySpec
from tests.decoding.chi_square import chi_square_p

ROWS, DEPTH = 40, 3


def greedy_tree(first, after, num_nodes: int) -> tuple[set, float]:
  """The paper's loop over a heap, for draws that take the likeliest token: paths, sum of values."""
  heap, paths, total = [(-1.0, 0, (), first, 1.0)], set(), 0.0
  order = 1
  while heap and len(paths) < num_nodes - 1:
    _, _, path, law, value = heapq.heappop(heap)
    token = int(np.argmax(law))
    mine = value * law[token]  # law: what is left of q, not renormalised
    paths.add((*path, token))
    total += mine
    rest = law.copy()
    rest[token] = 0
    if rest.sum() > 0:
      heapq.heappush(heap, (-value * rest.sum(), order, path, rest, value))
    if len(path) + 1 < DEPTH:
      heapq.heappush(heap, (-mine, order + 1, (*path, token), after[token], mine))
    order += 2
  return paths, total


def paths_of(tree, row: int) -> set:
  tokens, parent, valid = (np.asarray(x)[row] for x in (tree.tokens, tree.parent, tree.valid))
  out = {}
  for node in range(1, len(tokens)):
    if valid[node]:
      out[node] = (*out.get(parent[node], ()), int(tokens[node]))
  return set(out.values())


@pytest.mark.parametrize("num_nodes", [2, 7, 13])
def test_the_tree_is_that_of_the_greedy_loop(num_nodes):
  rng = np.random.default_rng(num_nodes)
  q0, q1 = (rng.dirichlet(np.full(V, 0.5), size) for size in (ROWS, (ROWS, V)))
  drafter = DySpec(model=MODEL, draws="greedy", width=12, depth=DEPTH, num_nodes=num_nodes)

  @jax.jit
  def grow(q0, q1):
    def feed(tokens, topology, n):
      return jnp.log(q1)[jnp.arange(ROWS)[:, None], tokens[:, -n:]]

    return drafter.grow(context(request_keys(0, ROWS)), jnp.log(q0), feed)

  tree = grow(jnp.asarray(q0), jnp.asarray(q1))
  assert tree.tokens.shape[1] == num_nodes
  for row in range(ROWS):
    paths, total = greedy_tree(q0[row], q1[row], num_nodes)
    assert paths_of(tree, row) == paths
    # Worth at least what the chain of as many nodes is.
    chain, value, law = 0.0, 1.0, q0[row]
    for _ in range(min(num_nodes - 1, DEPTH)):
      value *= law.max()
      chain, law = chain + value, q1[row, int(np.argmax(law))]
    assert total >= chain - 1e-9


def test_a_certain_draft_model_makes_a_chain():
  drafter = DySpec(model=MODEL, draws="sampled", width=3, depth=3, num_nodes=8)
  logits = jnp.where(jnp.arange(V) == 2, 0.0, -jnp.inf)[None]
  feed = lambda tokens, _, n: jnp.broadcast_to(logits[:, None], (1, n, V))  # noqa: E731
  tree = jax.jit(lambda x: drafter.grow(context(request_keys(0, 1), PLAIN), x, feed))(logits)
  assert paths_of(tree, 0) == {(2,), (2, 2), (2, 2, 2)}
  assert tree.valid.sum() == 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class AfterTheDraw(DySpec):
  """Wrong: a draw is kept or dropped by its own value."""

  def values(self, value, draws):
    after = super().values(value, draws)[1]
    return after, after


def test_selection_after_the_draw_breaks_the_law():
  options = dict(model=MODEL, draws="sampled", width=3, depth=2, num_nodes=5, threshold=0.1)
  seen, _ = three_tokens(AfterTheDraw(**options), WithoutReplacement())
  assert chi_square_p(seen, text_law()) < 1e-6
  # The right one at a threshold that leaves few draws, their number varying.
  right = DySpec(**{**options, "threshold": 0.4})
  seen, _ = three_tokens(right, WithoutReplacement())
  assert chi_square_p(seen, text_law()) > 1e-4
  used = np.asarray(drawn(right, 500).valid).sum(axis=1)
  assert used.min() >= 2 and len(set(used.tolist())) > 1
