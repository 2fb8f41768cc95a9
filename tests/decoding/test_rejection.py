# SPDX-License-Identifier: Apache-2.0
"""The rules that test siblings in turn: each keeps the target's law for drafts made as it says, and
is seen to break it for others."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding.sampling import ACCEPT, Sampler, position_keys, request_keys
from jaxdec.decoding.verify import (
  Match,
  MultiRound,
  PointMass,
  Ratio,
  WithoutReplacement,
  get_rule,
  rejection,
)
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError
from tests.decoding.chi_square import chi_square_p
from tests.decoding.trees import random_tree

ROWS, V, K = 200_000, 6, 3
PLAIN = Sampler(temperature=1.0)
STAR = StaticTree.from_paths([(i,) for i in range(K)])
TWO = StaticTree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)])
SAMPLED = (MultiRound(), WithoutReplacement())
RULES = (*SAMPLED, PointMass())


@functools.cache
def pair() -> tuple[np.ndarray, np.ndarray]:
  """Target and draft law of one slot."""
  logits = np.random.default_rng(5).normal(size=(2, V)) * 1.5
  p, q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  return p, q


# Drafts of one slot, [B, K], and the law each was drawn from, [B, K, V].


def independent(q, rng, b=ROWS):
  """K draws from q."""
  return jax.random.categorical(rng, jnp.log(q), shape=(b, K)), jnp.broadcast_to(q, (b, K, V))


def two_drafters(q, rng, b=ROWS):
  """Every second draw from another law."""
  laws = jnp.stack([q if k % 2 == 0 else q[::-1] for k in range(K)])
  return jax.random.categorical(rng, jnp.log(laws), shape=(b, K)), jnp.broadcast_to(laws, (b, K, V))


def distinct(q, rng, b=ROWS):
  """K ordered draws without replacement."""
  tokens = jax.lax.top_k(jnp.log(q) + jax.random.gumbel(rng, (b, V)), K)[1]
  return tokens, jnp.broadcast_to(q, (b, K, V))


def best(q, rng, b=ROWS):
  """The K likeliest tokens: a fixed set."""
  return jnp.broadcast_to(jax.lax.top_k(q, K)[1], (b, K)), jnp.broadcast_to(q, (b, K, V))


def by_token(q, rng, b=ROWS):
  """Distinct draws, in the order of their ids."""
  tokens, laws = distinct(q, rng, b)
  return jnp.sort(tokens, axis=1), laws


def likely(q, rng, b=ROWS):
  """Distinct draws, of which unlikely ones are dropped once they are seen."""
  tokens, laws = distinct(q, rng, b)
  return jnp.where(q[tokens] > 1 / V, tokens, -1), laws


def star(tokens, laws=None) -> Tree:
  """Root 0 and its children; token -1: invalid."""
  b = tokens.shape[0]
  root = jnp.zeros((b, 1), jnp.int32)
  valid = jnp.concatenate([root == 0, tokens >= 0], axis=1)
  tree = STAR.tree(jnp.concatenate([root, jnp.maximum(tokens, 0)], axis=1), valid)
  if laws is None:
    return tree
  return tree.replace(draft_probs=jnp.concatenate([jnp.zeros_like(laws[:, :1]), laws], axis=1))


@functools.partial(jax.jit, static_argnames=("rule", "draw", "tamper"))
def run(p, q, keys, rng, *, rule, draw, tamper=None):
  """One step of ROWS rows at position 9: the verdict and the drafts."""
  length = jnp.full(len(keys), 8)
  tokens, laws = draw(q, rng, len(keys))
  if tamper is not None:
    tokens = tamper(tokens, keys, length)
  p = jnp.broadcast_to(jnp.log(p), (len(keys), K + 1, V))
  return rule(star(tokens, laws), p, PLAIN, keys, length), tokens


def slot(rule, draw, p=None, q=None, **kwargs):
  """First tokens counted, share of rows that stepped to a child, and the drafts."""
  p, q = (x if y is None else y for x, y in zip(pair(), (p, q)))
  keys, rng = request_keys(3, ROWS), jax.random.key(7)
  out, tokens = run(jnp.asarray(p), jnp.asarray(q), keys, rng, rule=rule, draw=draw, **kwargs)
  counts = np.bincount(np.asarray(out.tokens[:, 0]), minlength=V)
  return counts, float((np.asarray(out.count) > 1).mean()), np.asarray(tokens)


RIGHT = [
  (MultiRound(), independent),
  (MultiRound(), two_drafters),
  (WithoutReplacement(), distinct),
  (WithoutReplacement(), independent),
  (PointMass(), best),
  (PointMass(), distinct),
  (PointMass(), likely),
]
WRONG = [
  (WithoutReplacement(), best),
  (WithoutReplacement(), by_token),
  (WithoutReplacement(), likely),
  (MultiRound(), best),
  (MultiRound(), distinct),
]


@pytest.mark.parametrize("rule, draw", RIGHT, ids=lambda x: getattr(x, "__name__", x.__class__))
def test_the_law_is_kept(rule, draw):
  counts, _, _ = slot(rule, draw)
  assert chi_square_p(counts, pair()[0]) > 1e-4


@pytest.mark.parametrize("rule, draw", WRONG, ids=lambda x: getattr(x, "__name__", x.__class__))
def test_drafts_made_otherwise_break_it(rule, draw):
  counts, _, _ = slot(rule, draw)
  assert chi_square_p(counts, pair()[0]) < 1e-6


def peek(tokens, keys, length):
  """The fixed child is chosen by the uniform that will judge it."""
  u = rejection._uniform(position_keys(keys, length + 1, ACCEPT), jnp.int32(0))
  return tokens.at[:, 0].set(jnp.where(u > 0.5, tokens[:, 0], tokens[:, 1]))


def test_drafts_that_know_the_acceptance_noise_break_the_law():
  counts, _, _ = slot(PointMass(), best, tamper=peek)
  assert chi_square_p(counts, pair()[0]) < 1e-6


# How often a step is made: the exact numbers, by enumeration of the draws.


def residual(p, q):
  r = np.maximum(p - q, 0)
  return r / r.sum()


def descends(p, q, k, replace) -> float:
  """P(one of k children is accepted), P and Q after each rejection as the rule has them."""
  if k == 0:
    return 0.0
  accepted = np.minimum(p, q).sum()
  if k == 1:
    return accepted
  rest = residual(p, q)
  total = accepted
  for x in range(len(q)):
    rejected = q[x] - min(p[x], q[x])
    if rejected > 0:
      out = q if replace else np.where(np.arange(len(q)) == x, 0, q) / (1 - q[x])
      total += rejected * descends(rest, out, k - 1, replace)
  return float(total)


def test_how_often_a_step_is_made():
  p, q = pair()
  expected = {
    "chain": np.minimum(p, q).sum(),
    "multi_round": descends(p, q, K, True),
    "without_replacement": descends(p, q, K, False),
    "point_mass": p[np.argsort(-q)[:K]].sum(),
  }
  measured = {
    "multi_round": slot(MultiRound(), independent)[1],
    "without_replacement": slot(WithoutReplacement(), distinct)[1],
    "point_mass": slot(PointMass(), best)[1],
    "match": slot(Match(), best)[1],
  }
  for name, rate in measured.items():
    want = expected["point_mass" if name == "match" else name]
    assert abs(rate - want) < 4 * np.sqrt(want * (1 - want) / ROWS), (name, rate, want)
  assert expected["chain"] < measured["multi_round"] < measured["without_replacement"]


# Sequences.


@functools.cache
def texts():
  """Target laws of tokens 1, 2, 3 given those before, and draft laws of 1, 2; V = 4."""
  keys = jax.random.split(jax.random.key(11), 5)
  make = lambda key, *shape: jax.nn.softmax(jax.random.normal(key, shape) * 1.5)  # noqa: E731
  target = make(keys[0], 4), make(keys[1], 4, 4), make(keys[2], 4, 4, 4)
  return target, (make(keys[3], 4), make(keys[4], 4, 4))


def two_levels(draft, rng, b, rule):
  """Two children a node, as the rule wants them; parents at ids 0, 1, 2."""

  def pick(key, q):  # q [b, n, 4]
    if isinstance(rule, WithoutReplacement):
      return jax.lax.top_k(jnp.log(q) + jax.random.gumbel(key, q.shape), 2)[1]
    return jnp.moveaxis(jax.random.categorical(key, jnp.log(q), shape=(2, *q.shape[:-1])), 0, -1)

  first, second = jax.random.split(rng)
  q0 = jnp.broadcast_to(draft[0], (b, 1, 4))
  x = pick(first, q0)[:, 0]
  q1 = draft[1][x]
  y = pick(second, q1)
  tokens = jnp.concatenate([jnp.zeros((b, 1), jnp.int32), x, y.reshape(b, 4)], axis=1)
  laws = jnp.concatenate([q0, q0, q0, jnp.repeat(q1, 2, axis=1)], axis=1)
  return TWO.tree(tokens).replace(draft_probs=laws)


@functools.partial(jax.jit, static_argnames=("rule", "tamper"))
def three_tokens(target, draft, keys, rng, *, rule, tamper=False):
  """One verified block, completed to three tokens from the target's own laws."""
  b = len(keys)
  drafting, *rest = jax.random.split(rng, 3)
  tree = two_levels(draft, drafting, b, rule)
  if tamper:  # the laws of the two families mixed up
    tree = tree.replace(draft_probs=tree.draft_probs[:, jnp.asarray([0, 1, 2, 5, 6, 3, 4])])
  t, above = tree.tokens, jnp.asarray([1, 1, 2, 2])
  laws = [
    jnp.broadcast_to(target[0], (b, 1, 4)),
    target[1][t[:, 1:3]],
    target[2][t[:, above], t[:, 3:]],
  ]
  out = rule(tree, jnp.log(jnp.concatenate(laws, 1)), PLAIN, keys, jnp.full(b, 5))
  own2 = jax.random.categorical(rest[0], jnp.log(target[1][out.tokens[:, 0]]))
  second = jnp.where(out.count > 1, out.tokens[:, 1], own2)
  own3 = jax.random.categorical(rest[1], jnp.log(target[2][out.tokens[:, 0], second]))
  third = jnp.where(out.count > 2, out.tokens[:, 2], own3)
  return jnp.stack([out.tokens[:, 0], second, third], axis=1), out.count


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_sequences_have_the_law(rule):
  target, draft = texts()
  keys, rng = request_keys(1, ROWS), jax.random.key(2)
  law = (target[0][:, None, None] * target[1][..., None] * target[2]).ravel()
  seen, count = three_tokens(target, draft, keys, rng, rule=rule)
  assert chi_square_p(np.bincount(np.asarray(seen) @ [16, 4, 1], minlength=64), law) > 1e-4
  assert (np.asarray(count) == 3).mean() > 0.05
  if rule.needs_draft_probs:
    wrong, _ = three_tokens(target, draft, keys, rng, rule=rule, tamper=True)
    assert chi_square_p(np.bincount(np.asarray(wrong) @ [16, 4, 1], minlength=64), law) < 1e-6
    # q = p: every first child is right.
    _, count = three_tokens(target, target[:2], keys, rng, rule=rule)
    assert (np.asarray(count) == 3).mean() >= 0.999


@pytest.mark.parametrize(
  "rule, draw", [(MultiRound(), independent), (WithoutReplacement(), distinct)]
)
def test_disjoint_drafts_are_never_accepted(rule, draw):
  """Also with more children than tokens of positive mass: those without are passed over."""
  p, q = pair()
  p = np.where(np.arange(V) < 4, p, 0) / p[:4].sum()
  q = np.where(np.arange(V) >= 4, q, 0) / q[4:].sum()
  counts, rate, _ = slot(rule, draw, p, q)
  assert rate == 0 and chi_square_p(counts, p) > 1e-4


def test_a_draft_law_used_up_leaves_the_rest_to_the_target():
  p, q = pair()
  q = np.where(np.arange(V) < 2, q, 0) / q[:2].sum()  # two tokens for three children
  counts, _, tokens = slot(WithoutReplacement(), distinct, q=q)
  assert set(np.unique(tokens[:, 2])) - {0, 1}  # the third child is one q can't give
  assert chi_square_p(counts, p) > 1e-4


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_edge_cases(rule, monkeypatch):
  p = jnp.log(jnp.asarray([[[0.5, 0.0, 0.5]] * 4]))
  q = jnp.asarray([[[0.2, 0.6, 0.2]] * 3])
  tree = star(jnp.asarray([[1, 1, 1]]), q)
  tree = tree.replace(draft_probs=jnp.concatenate([q[:, :1], q], axis=1))
  args = (PLAIN, request_keys(0, 1), jnp.asarray([4]))
  monkeypatch.setattr(rejection, "_uniform", lambda keys, k: jnp.zeros(keys.shape))
  # p(x) = 0 is rejected at u = 0 as well.
  out = rule(tree, p, *args)
  assert out.count.tolist() == [1] and int(out.tokens[0, 0]) in (0, 2)
  # Invalid nodes are not tested, wherever they stand among their siblings.
  tree = tree.replace(tokens=jnp.asarray([[0, 0, 1, 2]]))
  out = rule(tree.replace(valid=jnp.asarray([[True, False, True, True]])), p, *args)
  assert out.path[0, :2].tolist() == [0, 3] and out.tokens[0, 0] == 2
  out = rule(tree.replace(valid=jnp.asarray([[True, False, False, False]])), p, *args)
  assert out.count.tolist() == [1]
  # A law of underflows gives no NaN, and the target's token.
  out = rule(tree.replace(draft_probs=jnp.zeros((1, 4, 3))), p, *args)
  assert int(out.tokens[0, 0]) in (0, 2)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_rows_are_judged_alone_and_greedily_as_match(rule):
  """Ragged: other rows, deeper or shallower, change nothing."""
  b, nodes, depth = 5, 12, 3
  keys = jax.random.split(jax.random.key(1), 4)
  tokens = jax.random.randint(keys[0], (b, nodes - 1), 0, 3)
  tree = random_tree(keys[1], jnp.zeros(b, jnp.int32), tokens, depth)
  logits = jax.random.normal(keys[2], (b, nodes, 3))
  tree = tree.replace(draft_probs=jax.nn.softmax(jax.random.normal(keys[3], (b, nodes, 3))))
  request, length = request_keys(0, b), jnp.asarray([3, 0, 7, 7, 1])
  judge = jax.jit(rule, static_argnums=2)
  together = judge(tree, logits, PLAIN, request, length)
  assert len(set(together.count.tolist())) > 1
  for i in range(b):
    one = jax.tree.map(lambda x: x[i : i + 1], (tree, logits, request, length))  # noqa: B023
    alone = judge(*one[:2], PLAIN, *one[2:])
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
      np.testing.assert_array_equal(x[0], y[i])
  greedy = rule(tree, logits, Sampler(), request, length)
  for x, y in zip(
    jax.tree.leaves(greedy), jax.tree.leaves(Match()(tree, logits, Sampler(), request, length))
  ):
    np.testing.assert_array_equal(x, y)


def test_on_chains_the_sampled_rules_agree():
  q = jnp.asarray([[[0.2, 0.5, 0.3]] * 3] * 50)
  tree = StaticTree.chain(2).tree(jax.random.randint(jax.random.key(0), (50, 3), 0, 3))
  tree = tree.replace(draft_probs=q)
  p = jax.random.normal(jax.random.key(1), (50, 3, 3))
  args = (tree, p, PLAIN, request_keys(0, 50), jnp.zeros(50, jnp.int32))
  judge = lambda rule: jax.jit(rule, static_argnums=2)(*args)  # noqa: E731
  want = judge(Ratio())
  assert set(want.count.tolist()) == {1, 2, 3}
  for rule in SAMPLED:
    for x, y in zip(jax.tree.leaves(judge(rule)), jax.tree.leaves(want)):
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["multi_round", "without_replacement"])
def test_drafts_without_a_law_are_refused(name):
  with pytest.raises(UserError, match="draft_probs"):
    get_rule(name)(
      star(jnp.zeros((1, K), jnp.int32)),
      jnp.zeros((1, K + 1, V)),
      PLAIN,
      request_keys(0, 1),
      jnp.zeros(1, jnp.int32),
    )
