# SPDX-License-Identifier: Apache-2.0
"""Parallel Prompt Decoding: prompts, ensembles, sparse trees and what they are worth."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lookahead import BLANK, accuracy, counting, counting_target
from probing import Probing, hybrid
from toy_target import VOCAB, batch_of, init, random_batch, randomized, run, target, train
from universal import SAMPLERS, plain

from jaxdec.decoding import generate
from jaxdec.drafting.base import Target
from jaxdec.drafting.checkpoint import from_config, to_config
from jaxdec.drafting.ppd import PPD, measured_latency
from jaxdec.drafting.ppd_tree import PromptTree, SparseTrees, choose_rows, stationary, transitions
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.trained import embed
from jaxdec.errors import UserError
from jaxdec.models.decoder import stack_layers
from pallas_kernels.testing import COMPILE_ONCE

ACCURACY = np.array([[0.55, 0.2, 0.1], [0.5, 0.15, 0.05], [0.4, 0.1, 0.05]])


class TestPPD(Probing):
  kind = PPD
  options = {"anchors": None, "ensemble": 2}  # noqa: RUF012
  steps, learning_rate = 100, 3e-2
  reached = 0.15  # no prompt makes a random target look far ahead; what they can do: see below


def ppd(t, **options):
  return PPD.for_target(t.model.config, **{"anchors": None, **options})


def probed(drafter, params, t, batch):
  """Logits by depth at every slot, ``[B,A,V]``."""

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def logits(params, target_params, output):
    t_ = Target(t.model, target_params, None)
    examples = drafter.examples(params, t_, output, batch, None)
    return [drafter.head(params, t_, e.depth, e.states) for e in examples]

  return logits(params, t.params, run(t, batch) if t.model.layout == "unrolled" else t.state)


def test_prompts_are_all_that_is_trained():
  t = target()
  for n, e in ((3, 1), (2, 4)):
    params = init(ppd(t, num_heads=n, ensemble=e), t)
    assert [x.shape for x in jax.tree.leaves(params)] == [(n, e, 32)]


def test_one_member_is_causal_attention_over_the_text_and_its_prompts():
  """Text and prompts as one plain sequence, prompt i where the token ``x_{t+i}`` would stand."""
  t = target()
  drafter = ppd(t, num_heads=3)
  params = randomized(init(drafter, t))
  text = np.random.default_rng(0).integers(0, VOCAB, 9)
  got = probed(drafter, params, t, batch_of([text]))
  for slot in (0, 4, 6):
    read = slot + 1
    tokens = jnp.asarray(np.concatenate([text[:read], np.zeros(3, int)])[None], jnp.int32)
    values = jnp.concatenate([jnp.zeros((1, read, 32)), params["prompts"][None, :, 0]], axis=1)
    where = jnp.arange(read + 3)[None] >= read
    out = t.model.apply({"params": t.params}, tokens, embeddings=(values, where))
    for i in range(3):
      np.testing.assert_allclose(got[i][0, slot], out.logits[0, read + i], atol=3e-5)


def test_an_ensemble_is_the_mean_of_its_members_alone():
  t = target()
  drafter = ppd(t, num_heads=2, ensemble=3)
  params = randomized(init(drafter, t))
  batch = random_batch(1, rows=1, length=8)
  got = probed(drafter, params, t, batch)
  alone = [
    probed(ppd(t, num_heads=2), {"prompts": params["prompts"][:, e : e + 1]}, t, batch)
    for e in range(3)
  ]
  for depth in range(2):
    expected = np.mean([x[depth] for x in alone], axis=0)
    np.testing.assert_allclose(got[depth], expected, atol=3e-5)
    assert np.max(np.abs(alone[0][depth] - alone[1][depth])) > 1e-2


def test_scanned_targets_and_recomputation_give_the_same():
  t = target()
  drafter = ppd(t, num_heads=2)
  params = randomized(init(drafter, t))
  batch = random_batch(2, rows=1, length=8)
  output = run(t, batch)
  scanned = Target(t.model.clone(layout="scanned"), stack_layers(t.params, t.model.config), None)
  again = Target(t.model.clone(remat="full"), t.params, None)

  def gradient(target):
    @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
    def f(params, target_params):
      t_ = Target(target.model, target_params, None)
      return jax.grad(lambda p: drafter.loss(p, t_, output, batch)[0])(params)

    return f(params, target.params)["prompts"]

  expected = gradient(t)
  assert np.max(np.abs(expected)) > 1e-4
  for other in (scanned, again):
    np.testing.assert_allclose(gradient(other), expected, atol=1e-5, rtol=1e-4)


def test_gradient_is_that_of_finite_differences():
  """Along each prompt's own gradient, where the slope is its length."""
  t = target()
  drafter = ppd(t, num_heads=3)
  params = randomized(init(drafter, t))
  batch = random_batch(2, rows=2, length=9)
  output = run(t, batch)

  @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
  def loss_and_gradient(prompts):
    return jax.value_and_grad(lambda p: drafter.loss({"prompts": p}, t, output, batch)[0])(prompts)

  gradient = np.asarray(loss_and_gradient(params["prompts"])[1])
  for i in range(3):
    along = np.zeros_like(gradient)
    along[i] = gradient[i] / np.linalg.norm(gradient[i])
    up, down = (loss_and_gradient(params["prompts"] + e * along)[0] for e in (5e-3, -5e-3))
    slope = np.linalg.norm(gradient[i])
    assert slope > 1e-3
    np.testing.assert_allclose((up - down) / 1e-2, slope, rtol=2e-2, err_msg=f"prompt {i + 1}")


@pytest.mark.slow
def test_prompts_find_what_makes_the_target_look_ahead():
  """As good as an embedding known to work; random and mean ones are not, nor any where none can."""
  t = counting_target(hidden=0.3)
  drafter = ppd(t)
  start = init(drafter, t)
  table = embed(t, jnp.arange(VOCAB), "float32")

  def all_prompts(x):
    return {"prompts": jnp.broadcast_to(x, start["prompts"].shape)}

  assert np.all(accuracy(drafter, all_prompts(table[BLANK]), t) >= 0.95)
  untrained = accuracy(drafter, start, t), accuracy(drafter, all_prompts(table.mean(0)), t)
  assert np.max(untrained) <= 0.5
  learned, _ = train(drafter, t, counting, 150, 1e-1)
  assert np.all(accuracy(drafter, learned, t) >= 0.95)
  # A target that never had to look ahead can't be made to.
  blind = counting_target(hidden=0.0)
  assert np.max(accuracy(drafter, train(drafter, blind, counting, 150, 1e-1)[0], blind)) <= 0.5


def test_slots_are_drawn_among_those_that_may_be_learned():
  t = target()
  drafter = ppd(t, num_heads=2, anchors=4)
  mask = [[0] * 8 + [1] * 8]
  batch = batch_of(np.zeros((1, 16)), None, mask)
  drawn = [np.asarray(drafter._slots_of(batch, jax.random.key(i)))[0] for i in range(20)]
  assert all(len(set(x.tolist())) == 4 and min(x) >= 7 and max(x) <= 13 for x in drawn)
  assert len({tuple(x) for x in drawn}) > 5
  np.testing.assert_array_equal(drafter._slots_of(batch, None), [[0, 4, 8, 13]])


# Sparse trees.


def sparse_drafter(t, rows=14, **options):
  return ppd(t, num_heads=3, **options).with_budget(ACCURACY, rows)


@pytest.mark.parametrize("sampler", ["greedy", "sampled"])
def test_sparse_trees_are_lossless(sampler):
  t = target()
  drafter = sparse_drafter(t, rows=20, ensemble=2)
  params = randomized(init(drafter, t), scale=0.5)
  prompts = ((1, 2, 3, 4, 5), (6, 7), (8, 9, 10))
  out = generate(
    t.model, t.params, [list(p) for p in prompts], max_new_tokens=20, drafter=drafter,
    drafter_params=params, sampler=SAMPLERS[sampler], stop=None, seed=5,
  )  # fmt: skip
  assert out.tokens == plain(sampler, prompts, 20)
  assert from_config(to_config(drafter)) == drafter


def test_sparse_probes_are_those_of_a_fresh_start():
  check = TestPPD()
  drafter = sparse_drafter(target())
  check.check_state(drafter, target(), randomized(init(drafter, target()), scale=0.5))


def walk(trees, accuracy, steps, seed=0):
  """Tokens per step of decoding where the draft of rank r at depth d is right with its accuracy."""
  rng = np.random.default_rng(seed)
  n, tokens = len(trees.trees), 0
  state = n
  for _ in range(steps):
    tree = trees.trees[state - 1]
    slot = {(): 0} | {path: i for i, path in enumerate(tree.candidates.paths, 1)}
    path = ()
    for d in range(n):
      rank = int(np.searchsorted(np.cumsum(accuracy[d]), rng.random(), side="right"))
      if (*path, rank) not in slot:
        break
      path = (*path, rank)
    tokens += 1 + len(path)
    state = tree.prompts[slot[path]]
  return tokens / steps


def with_idle_state(trees, accuracy):
  """tau of a chain that goes through one more state, worth nothing, where nothing is accepted."""
  matrix, value = transitions(trees, accuracy)
  n = len(value)
  bigger = np.zeros((n + 1, n + 1))
  bigger[1:, 1:] = matrix
  for s, tree in enumerate(trees.trees):
    nothing = tree.last(accuracy)[0]
    bigger[s + 1, n] -= nothing
    bigger[s + 1, 0] += nothing
  bigger[0, n] = 1.0
  law = np.linalg.matrix_power(bigger, 4096)[0]
  return float(law @ np.concatenate([[1.0], value]))


@pytest.mark.parametrize("rows", [9, 14, 30])
def test_stationary_value_is_that_of_simulated_decoding(rows):
  trees = SparseTrees.build(ACCURACY, rows, 3)
  assert trees.rows() <= rows
  tau, steps = stationary(trees, ACCURACY), 30_000
  error = 3 / np.sqrt(steps)  # tokens of a step vary by less than 1
  simulated = walk(trees, ACCURACY, steps)
  assert abs(simulated - tau) < error
  assert abs(simulated - with_idle_state(trees, ACCURACY)) > 5 * error
  for law in transitions(trees, ACCURACY)[0]:
    assert np.all(law >= 0) and law.sum() == pytest.approx(1)


def test_stationary_value_is_that_of_real_decoding():
  """The loop itself, with drafts that are right as often as the table says."""
  t, prompts = target(), tuple((i, i + 1, 2 * i) for i in range(4))
  new = 400
  truth = [list(p) + x for p, x in zip(prompts, plain("greedy", prompts, new))]
  truth = jnp.asarray(np.pad(truth, ((0, 0), (0, 8))), jnp.int32)

  class Known(PPD):
    def _ranked(self, params, state, context, width):
      rows, depth = jnp.arange(4)[:, None], jnp.arange(1, 4)[None]
      at = context.length[:, None] + depth
      right = truth[rows, at]

      def draw(row, position, d):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), row), position * 8 + d)
        return jnp.searchsorted(jnp.cumsum(jnp.asarray(ACCURACY)[d - 1]), jax.random.uniform(key))

      rank = jax.vmap(jax.vmap(draw))(jnp.broadcast_to(rows, at.shape), at, depth + 0 * at)
      # Others differ from the right token and among themselves.
      wrong = (right[..., None] + 1 + jnp.arange(width)) % VOCAB
      return jnp.where(jnp.arange(width) == rank[..., None], right[..., None], wrong)

  drafter = sparse_drafter(t, rows=14)
  fields = {f.name: getattr(drafter, f.name) for f in dataclasses.fields(drafter)}
  out = generate(
    t.model, t.params, [list(p) for p in prompts], max_new_tokens=new, drafter=Known(**fields),
    drafter_params=init(drafter, t), stop=None,
  )  # fmt: skip
  assert out.tokens == plain("greedy", prompts, new)
  tau = stationary(drafter.sparse, ACCURACY)
  steps = 4 * new / tau
  assert abs(out.stats.tokens_per_step - tau) < 3 / np.sqrt(steps)


def shapes_of(depth, ranks, nodes):
  """Every tree of up to ``nodes`` nodes."""
  seen = level = {frozenset()}
  for _ in range(nodes - 1):
    level = {
      tree | {(*path, r)}
      for tree in level
      for path in ((), *tree)
      if len(path) < depth
      for r in range(ranks)
    }
    seen = seen | level
  return [StaticTree.from_paths(tree) for tree in seen]


def best_of_all(accuracy, rows, n):
  """The largest tau over all trees and all numbers of prompts."""
  best = 0.0
  for nodes in range(2, rows):
    trees = [
      [
        PromptTree(shape, (n, *prompts))
        for shape in shapes_of(s, accuracy.shape[1], nodes)
        for prompts in itertools.product(range(1, n + 1), repeat=shape.num_nodes - 1)
        if nodes + n + sum(prompts) <= rows
      ]
      for s in range(1, n + 1)
    ]
    for choice in itertools.product(*trees):
      best = max(best, stationary(SparseTrees(choice), accuracy))
  return best


def test_built_trees_are_the_best_of_all():
  rng = np.random.default_rng(0)
  for _ in range(4):
    table = np.sort(rng.dirichlet(np.ones(3), 2) * rng.uniform(0.5, 1, (2, 1)))[:, :0:-1]
    for rows in (6, 8):
      built = SparseTrees.build(table, rows, 2)
      assert built.rows() <= rows
      assert stationary(built, table) == pytest.approx(best_of_all(table, rows, 2), abs=1e-9)


def test_prompts_go_where_they_are_used():
  """More rows are never worse, and a full tree is worth no more than the best of its size."""
  values = [stationary(SparseTrees.build(ACCURACY, rows, 3), ACCURACY) for rows in (8, 12, 20, 40)]
  assert values == sorted(values)
  full = SparseTrees.full(StaticTree.from_paths([(0,), (1,), (0, 0), (0, 0, 0)]), 3)
  assert full.rows() == 5 + 15
  assert stationary(full, ACCURACY) < stationary(SparseTrees.build(ACCURACY, 20, 3), ACCURACY)


def test_budget_follows_the_machine():
  budgets = (8, 16, 32)
  assert choose_rows(ACCURACY, budgets, lambda rows: 1.0, 3)[0] == 32
  assert choose_rows(ACCURACY, budgets, lambda rows: float(rows), 3)[0] == 8
  knee = choose_rows(ACCURACY, budgets, lambda rows: 1.0 if rows <= 16 else 2.0, 3)
  assert knee[0] == 16 and knee[1].rows() <= 16
  latency = measured_latency(target(), length=32, repeats=2)
  assert latency(8) > 0
  assert ppd(target()).tuned(ACCURACY, budgets, lambda rows: float(rows)).sparse.rows() <= 8


def test_errors_say_what_to_change():
  t = target()
  with pytest.raises(UserError, match="at least 6 rows, got 5"):
    SparseTrees.build(ACCURACY, 5, 3)
  with pytest.raises(UserError, match="trees for up to 2 prompts, but the drafter has 3"):
    ppd(t, num_heads=3, sparse=SparseTrees.build(ACCURACY, 8, 2))
  with pytest.raises(UserError, match="takes no draft vocabulary"):
    from jaxdec.drafting import DraftVocabulary

    ppd(t, vocabulary=DraftVocabulary(np.arange(4), VOCAB))
  with pytest.raises(UserError, match="gated-delta layers"):
    drafter, batch = ppd(hybrid()), random_batch(0)
    drafter.loss(init(drafter, hybrid()), hybrid(), run(hybrid(), batch), batch)
