# SPDX-License-Identifier: Apache-2.0
"""What all trees of draws share: the laws of draws, the draft model's passes, lossless decoding."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_laws import MODEL, PLAIN, V, context, drawn, laws, text_law, three_tokens

from jaxdec.decoding import Sampler, generate
from jaxdec.decoding.sampling import request_keys
from jaxdec.decoding.verify import MultiRound, PointMass, WithoutReplacement
from jaxdec.drafting.base import Prompt
from jaxdec.drafting.dyspec import DySpec
from jaxdec.drafting.rsd import RsdC, RsdS
from jaxdec.drafting.sequoia import Sequoia
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.errors import UserError
from tests.decoding.chi_square import chi_square_p
from tests.decoding.targets import target

SHAPE = StaticTree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (2, 0)])
TOYS = {
  "rsd_c": RsdC(model=MODEL, draws="sampled", branching=(2, 2)),
  "rsd_s": RsdS(model=MODEL, draws="sampled", width=3, depth=2),
  "dyspec": DySpec(model=MODEL, draws="sampled", width=3, depth=2, num_nodes=5, threshold=0.1),
  "sequoia": Sequoia(model=MODEL, draws="sampled", tree=SHAPE),
}


@pytest.mark.parametrize("name", TOYS)
def test_texts_have_the_targets_law(name):
  seen, count = three_tokens(TOYS[name], WithoutReplacement())
  assert chi_square_p(seen, text_law()) > 1e-4
  assert set(np.unique(count)) == {1, 2, 3}


def test_independent_siblings_have_it_too_and_other_rules():
  drafter = RsdC(model=MODEL, draws="sampled", branching=(2, 2), replacement=True)
  assert chi_square_p(three_tokens(drafter, MultiRound())[0], text_law()) > 1e-4
  assert chi_square_p(three_tokens(TOYS["rsd_s"], PointMass())[0], text_law()) > 1e-4
  # Distinct siblings judged as independent ones: seen to be wrong.
  assert chi_square_p(three_tokens(TOYS["rsd_c"], MultiRound())[0], text_law()) < 1e-6


def pair_law(q: np.ndarray, replace: bool) -> np.ndarray:
  """P(first two draws), ``[V, V]``."""
  law = np.outer(q, q)
  if replace:
    return law
  np.fill_diagonal(law, 0)
  return law / (1 - q)[:, None]


@pytest.mark.parametrize("replace", [False, True])
def test_pairs_of_siblings(replace):
  drafter = dataclasses.replace(TOYS["rsd_c"], replacement=replace)
  tree, q = drawn(drafter), [np.asarray(x, np.float64) for x in laws()[1]]
  tokens = np.asarray(tree.tokens)
  pairs = lambda a, b: np.bincount(a * V + b, minlength=V * V)  # noqa: E731
  assert chi_square_p(np.bincount(tokens[:, 1], minlength=V), q[0]) > 1e-4
  assert chi_square_p(pairs(tokens[:, 1], tokens[:, 2]), pair_law(q[0], replace)) > 1e-4
  assert chi_square_p(pairs(tokens[:, 1], tokens[:, 2]), pair_law(q[0], not replace)) < 1e-6
  # Children of the second child, where that is token 1; they are nodes 5 and 6.
  rows = tokens[:, 2] == 1
  below = pairs(tokens[rows, 5], tokens[rows, 6])
  assert chi_square_p(below, pair_law(q[1][1], replace)) > 1e-4
  np.testing.assert_allclose(
    tree.draft_probs[rows, 5], np.tile(q[1][1], (rows.sum(), 1)), rtol=1e-5
  )


def test_siblings_are_the_first_draws_whatever_is_kept():
  """All methods draw the children of the root, and of its first child, with the same noise; each
  keeps a beginning of the order."""
  every = np.asarray(drawn(RsdC(model=MODEL, draws="sampled", branching=(V, V)), 300).tokens)
  families = {0: every[:, 1 : V + 1], 1: every[:, V + 1 : 2 * V + 1]}
  for name, drafter in TOYS.items():
    tree = jax.device_get(drawn(drafter, 300))
    sizes = set()
    for row, (node, order) in itertools.product(range(300), families.items()):
      kept = tree.valid[row] & (tree.parent[row] == node) & (tree.depth[row] > 0)
      children = tree.tokens[row, kept].tolist()
      assert children == order[row, : len(children)].tolist()
      sizes.add((node, len(children)))
    assert (len(sizes) > 2) == (name in ("rsd_s", "dyspec"))


def test_trees_are_well_formed():
  for drafter in TOYS.values():
    tree = drawn(drafter, 300)
    parent, valid, depth = (np.asarray(x) for x in (tree.parent, tree.valid, tree.depth))
    assert parent.shape == (300, drafter.num_nodes)
    assert np.all(parent[:, 1:] < np.arange(1, drafter.num_nodes)) and np.all(parent[:, 0] == 0)
    above = np.take_along_axis(depth, parent, axis=1)
    assert np.all(np.where(valid, depth - above - (np.arange(depth.shape[1]) > 0), 0) == 0)
    assert np.all(np.take_along_axis(valid, parent, axis=1) | ~valid)
    # No two siblings are equal.
    siblings = parent[:, :, None] == parent[:, None]
    same = siblings & (np.asarray(tree.tokens)[:, :, None] == np.asarray(tree.tokens)[:, None])
    both = valid[:, :, None] & valid[:, None] & ~np.eye(depth.shape[1], dtype=bool)
    both[:, 0] = both[:, :, 0] = False
    assert not np.any(same & both)


def test_laws_of_fewer_tokens_than_children_leave_invalid_nodes():
  drafter = TOYS["rsd_c"]
  logits = jnp.where(jnp.arange(V) == 2, 0.0, -jnp.inf)[None]
  feed = lambda tokens, _, n: jnp.zeros((1, n, V))  # noqa: E731
  tree = jax.jit(lambda x: drafter.grow(context(request_keys(0, 1)), x, feed))(logits)
  assert tree.valid.tolist() == [[True, True, False, True, True, False, False]]
  assert tree.tokens[0, 1] == 2


# With models.

PROMPTS = [[1, 2, 3, 4, 1], [5]]
DRAFTERS = {
  "rsd_c": ("hybrid", dict(branching=(3, 2)), RsdC),
  "rsd_s": ("attention", dict(width=3, depth=3), RsdS),
  "dyspec": ("linear", dict(width=3, depth=3, num_nodes=8), DySpec),
  "sequoia": ("recurrent", dict(), Sequoia),
}
RUNS = dict(max_new_tokens=15, stop=None, seed=2)


CASES = [*((name, PLAIN) for name in DRAFTERS), ("rsd_s", Sampler()), ("dyspec", Sampler())]


@pytest.mark.parametrize("name, sampler", CASES)
def test_decoding_is_lossless_and_self_drafts_are_right(name, sampler):
  """Another model's drafts, then the target's own: there the first draw is always right, step after
  step, as long as the draft model reads what the target reads.
  """
  kind, options, make = DRAFTERS[name]
  model, params = target(kind)
  plain = generate(model, params, PROMPTS, sampler=sampler, **RUNS)
  other, other_params = target("attention" if kind != "attention" else "hybrid", seed=1)
  for drafts, weights in ((other, other_params), (model, params)):
    drafter = make(model=drafts, **options)
    out = generate(
      model, params, PROMPTS, sampler=sampler, drafter=drafter, drafter_params=weights, **RUNS
    )
    assert out.tokens == plain.tokens
  if name == "dyspec" and not sampler.greedy:  # does not grow below a draw it thinks unlikely
    assert out.stats.tokens_per_step > 2.5
  else:
    assert out.stats.tokens_per_step == pytest.approx(14 / np.ceil(14 / (drafter.max_depth + 1)))


def test_laws_are_those_of_the_draft_model():
  """``draft_probs`` of every node against a pass over the prompt and the path to its parent."""
  model, params = target("recurrent")
  drafter = RsdC(model=model, draws="sampled", branching=(2, 2, 2))
  prompt = jnp.asarray([[1, 2, 3, 4, 1, 7], [5, 2, 9, 0, 0, 0]])
  lengths = jnp.asarray([5, 2])

  @jax.jit
  def draft(params):
    state = drafter.init_state(2, 64)
    state = drafter.start(params, state, Prompt(prompt, lengths, None), None, None)
    history = jnp.pad(prompt, ((0, 0), (0, 10)))
    root = history[jnp.arange(2), lengths]
    here = dataclasses.replace(
      context(request_keys(0, 2)), root=root, length=lengths, history=history
    )
    return drafter.propose(params, state, here, None)[0]

  tree = draft(params)
  texts, where = [], []
  for row in range(2):
    for node in range(1, drafter.num_nodes):
      path, at = [], int(tree.parent[row, node])
      while at:
        path.append(int(tree.tokens[row, at]))
        at = int(tree.parent[row, at])
      text = [*prompt[row, : lengths[row] + 1].tolist(), *path[::-1]]
      where.append((row, node, len(text) - 1))
      texts.append(text + [0] * (9 - len(text)))
  logits = jax.jit(lambda t: model.apply({"params": params}, t).logits)(jnp.asarray(texts))
  for i, (row, node, last) in enumerate(where):
    want = jax.nn.softmax(logits[i, last])
    np.testing.assert_allclose(tree.draft_probs[row, node], want, atol=2e-5)


def test_generated_texts_have_the_targets_law():
  """The rule, the noise of many steps and the draft model together."""
  model, params = target(vocab=V)
  draft, draft_params = target(vocab=V, seed=1)
  texts = np.stack(np.meshgrid(*[range(V)] * 4, indexing="ij"), -1).reshape(-1, 4)
  full = jnp.asarray([[1, 3, *t] for t in texts.tolist()])
  log_p = PLAIN.log_probs(model.apply({"params": params}, full).logits)
  log_p = jnp.take_along_axis(log_p[:, 1:5], full[:, 2:, None], -1).sum((1, 2))
  drafter = DySpec(model=draft, draws="sampled", width=3, depth=2, num_nodes=5)
  seen = np.zeros(V**4)
  for seed in range(3):
    out = generate(
      model,
      params,
      [[1, 3]] * 4096,
      max_new_tokens=4,
      sampler=PLAIN,
      stop=None,
      seed=seed,
      drafter=drafter,
      drafter_params=draft_params,
      rule="without_replacement",
    )
    seen += np.bincount(np.asarray(out.tokens) @ [64, 16, 4, 1], minlength=V**4)
  assert chi_square_p(seen, np.exp(np.asarray(log_p, np.float64))) > 1e-4
  assert out.stats.tokens_per_step > 1.2


def test_mistakes_are_named():
  model, params = target()
  with pytest.raises(UserError, match="draws"):
    RsdS(model=model, draws="lucky")
  with pytest.raises(UserError, match="branching"):
    RsdC(model=model, branching=(20,))
  with pytest.raises(UserError, match="noise of their own"):
    RsdC(model=model, replacement=True)
  with pytest.raises(UserError, match="2 to 13"):
    DySpec(model=model, width=4, depth=3, num_nodes=14)
  with pytest.raises(UserError, match="without the draw before it"):
    Sequoia(model=model, tree=StaticTree.from_paths([(1,)]))
  for rule, drafter, words in (
    ("without_replacement", RsdS(model=model), "draws='sampled'"),
    ("ratio", RsdS(model=model, draws="sampled"), "chains"),
    ("multi_round", RsdS(model=model, draws="sampled"), "without replacement"),
  ):
    with pytest.raises(UserError, match=words):
      generate(
        model, params, PROMPTS, sampler=PLAIN, rule=rule, drafter=drafter, drafter_params=params,
        **RUNS,
      )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "linear", "hybrid"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_decoding_is_lossless_for_every_target(name, kind):
  """Batch 1 and a ragged batch, by a filtered law."""
  _, options, make = DRAFTERS[name]
  model, params = target(kind)
  draft, draft_params = target("linear", seed=1)
  drafter = make(model=draft, **options)
  run = dict(sampler=Sampler(0.8, top_p=0.9), **RUNS)
  for prompts in ([[1, 2, 3, 4, 1], [5], [7, 7], [2] * 11], [[3, 1]]):
    plain = generate(model, params, prompts, **run)
    out = generate(model, params, prompts, drafter=drafter, drafter_params=draft_params, **run)
    assert out.tokens == plain.tokens
