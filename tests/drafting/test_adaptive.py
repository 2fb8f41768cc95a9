# SPDX-License-Identifier: Apache-2.0
"""Drafting as much as pays: the output never changes, and the sizes are those of a brute force."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting.adaptive import Adaptive
from jaxdec.drafting.base import Context
from jaxdec.drafting.combined import Combined
from jaxdec.drafting.merge import merge_paths, rank_paths
from jaxdec.drafting.prompt_lookup import PromptLookup
from jaxdec.drafting.source import Candidates, Source
from jaxdec.drafting.suffix import Suffix
from jaxdec.errors import UserError
from tests.decoding.targets import script, target

PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5, 6, 7]]
CHEAP = (1.0, 1.05, 1.1)  # every draft pays
DEAR = (1.0, 50.0, 60.0)  # none does


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knows(Source):
  """Guesses the script of its parameters, of which it is as sure as ``chance`` says."""

  num_drafts: int = 5
  chance: float = 0.9

  @property
  def num_nodes(self):
    return self.num_drafts + 1

  @property
  def num_candidates(self):
    return 1

  def candidates(self, params, state, context, rng):
    at = context.length[:, None] + 1 + jnp.arange(self.num_drafts)
    tokens = jnp.take_along_axis(params, jnp.minimum(at, params.shape[1] - 1), axis=1)[:, None]
    weight = jnp.broadcast_to(self.chance ** jnp.arange(1, self.num_drafts + 1.0), tokens.shape)
    return Candidates(tokens, jnp.ones(tokens.shape, bool), weight)


def run(drafter, kind="attention", params=None, sampler=Sampler(), new_tokens=40):  # noqa: B008
  model, weights = target(kind)
  return generate(
    model, weights, PROMPTS, max_new_tokens=new_tokens, sampler=sampler, drafter=drafter,
    drafter_params=params, stop=None, seed=2,
  )  # fmt: skip


@pytest.mark.parametrize("kind", ["attention", "linear", "hybrid"])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0)], ids=["greedy", "sampled"])
def test_lossless(kind, sampler):
  source = Combined(sources=(Suffix(num_drafts=5), PromptLookup(num_drafts=5)), size=6)
  drafter = Adaptive(source=source, widths=(3, 6), seconds=CHEAP)
  assert run(drafter, kind, sampler=sampler).tokens == run(None, kind, sampler=sampler).tokens


def test_drafts_where_they_pay_and_never_where_they_do_not():
  plain = run(None)
  text = script(PROMPTS, plain)
  knows = Adaptive(source=Knows(), widths=(3, 6), seconds=CHEAP)
  sure, dear = run(knows, params=text), run(dataclasses.replace(knows, seconds=DEAR), params=text)
  assert sure.tokens == dear.tokens == plain.tokens
  assert sure.stats.tokens_per_step > 5
  # the trials after 16 and 16 more tokens apart
  assert dear.stats.tokens_per_step < 1.5
  doubtful = dataclasses.replace(knows, source=Knows(chance=0.01))
  assert run(doubtful, params=text).stats.tokens_per_step < 2.5


def test_size_is_the_brute_force_optimum():
  rng = np.random.default_rng(0)
  widths, seconds = (2, 3, 5, 8), (1.0, 1.2, 1.3, 1.9, 2.4)
  drafter = Adaptive(source=Suffix(num_drafts=7), widths=widths, seconds=seconds)
  seen = set()
  for _ in range(60):
    worth = np.sort(rng.random((3, 8)) ** rng.integers(1, 6), axis=1)[:, ::-1]
    worth[:, 0] = 1
    idle = rng.random(3) < 0.3
    rates = [worth[~idle, :m].sum() / t for m, t in zip((1, *widths), seconds)]
    size, pays = drafter._choose(jnp.asarray(worth, jnp.float32), jnp.asarray(idle))
    assert size == widths[int(np.argmax(rates[1:]))]
    assert bool(pays) == (max(rates[1:]) > 1.03 * rates[0])
    seen.add((int(size), bool(pays)))
  assert len(seen) > 4  # the cases differ


def test_the_best_nodes_come_first():
  """For every m, the first m ranked nodes are the tree of m nodes; the worths are its paths'."""
  rng = np.random.default_rng(1)
  b, r, length, nodes = 3, 5, 4, 12
  tokens = jnp.asarray(rng.integers(0, 3, (b, r, length)), jnp.int32)
  valid = jnp.asarray(rng.random((b, r, length)) < 0.85)
  chance = {}

  def weight(row):  # equal prefixes, equal worth
    out = []
    for j in range(length):
      out.append(chance.setdefault(tuple(row[: j + 1]), rng.random()) * (out[-1] if out else 1))
    return out

  worths = jnp.asarray([[weight(row) for row in rows] for rows in np.asarray(tokens)], jnp.float32)
  root = jnp.zeros(b, jnp.int32)
  ranked, value = rank_paths(root, tokens, valid, worths, nodes)
  assert np.all(np.diff(np.asarray(value), axis=1) <= 0)
  assert np.all(np.asarray(ranked.parent)[:, 1:] < np.arange(1, nodes))

  def paths(tree, row, size):
    spelled = {0: ()}
    for i in range(1, size):
      if tree.valid[row, i]:
        spelled[i] = (*spelled[int(tree.parent[row, i])], int(tree.tokens[row, i]))
        assert len(spelled[i]) == tree.depth[row, i]
    return set(spelled.values())

  for size in range(1, nodes + 1):
    small = merge_paths(root, tokens, valid, worths, size) if size > 1 else None
    for row in range(b):
      wanted = {()} if small is None else paths(small, row, size)
      assert paths(ranked, row, size) == wanted


def test_looks_seldom_while_nothing_pays():
  """``has_draft`` is a look only every ``every`` tokens, and after a trial's time."""
  model, params = target()
  del params
  drafter = Adaptive(source=Knows(), widths=(3, 6), seconds=CHEAP, every=4)
  state = drafter.init_state(1, 64)
  script_of = jnp.zeros((1, 64), jnp.int32)
  state = state.replace(at=jnp.asarray([10]), pays=jnp.asarray([False]))

  @jax.jit
  def has(state, length):
    context = Context(
      root=jnp.zeros(1, jnp.int32), length=length, history=script_of, target=None, sampler=None
    )
    return drafter.has_draft(script_of, state, context)[0]

  assert [bool(has(state, jnp.asarray([n]))) for n in range(11, 20)] == [
    False, False, False, True, False, False, False, True, False,
  ]  # fmt: skip
  dear = dataclasses.replace(drafter, seconds=DEAR)
  del model

  def trial(n, fails):
    context = Context(
      root=jnp.zeros(1, jnp.int32), length=jnp.asarray([n]), history=script_of, target=None,
      sampler=None,
    )  # fmt: skip
    return bool(dear.has_draft(script_of, state.replace(fails=jnp.asarray([fails])), context)[0])

  assert [trial(10 + n, 0) for n in (8, 12, 16)] == [False, False, True]
  assert [trial(10 + n, 1) for n in (16, 32)] == [False, True]
  assert [trial(10 + n, 9) for n in (252, 256)] == [False, True]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"widths": (6, 3)}, "rising widths"),
    ({"widths": (3, 5)}, "largest width must be its source's 6 nodes, got 5"),
    ({"seconds": (1.0, 2.0)}, "needs 3 positive seconds"),
    ({"margin": 0.5}, "margin and every of at least 1"),
    ({"source": None}, "needs a source"),
  ],
)
def test_mistakes_are_explained(fields, message):
  good = {"source": Knows(), "widths": (3, 6), "seconds": CHEAP}
  with pytest.raises(UserError, match=message):
    Adaptive(**{**good, **fields})
