# SPDX-License-Identifier: Apache-2.0
"""Falcon: blocks of slots, its memory, its tree, glancing, and what it is with k = 1."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import (
  VOCAB,
  init,
  logits_by_depth,
  loss_of,
  random_batch,
  randomized,
  run,
  target,
)
from universal import Universal, start

from jaxdec.decoding import generate
from jaxdec.drafting import Eagle, Falcon, StaticTree
from jaxdec.drafting.base import Context, Prompt, TargetOutput
from jaxdec.drafting.falcon import LSTM, glance_slots
from jaxdec.drafting.objectives import Term
from jaxdec.errors import UserError

PLAIN = {"glance": (0.0, 0.0), "dropout": 0.0, "noise": 0.0}


class TestFalcon(Universal):
  kind = Falcon
  overfit_options = {  # noqa: RUF012
    "objective": (Term("smooth_l1"), Term("hard", 0.1)), "rollouts": 3, **PLAIN,
  }  # fmt: skip


@functools.cache
def random_drafter(**options):
  drafter = Falcon.for_target(target().model.config, **{"num_heads": 4, **PLAIN, **options})
  return drafter, randomized(init(drafter, target()), scale=0.5)


def chosen(drafter, params, root=3):
  """The tree drafted after one prompt."""
  t = target()
  text = np.random.default_rng(0).integers(0, VOCAB, (1, 12))
  text[0, 8] = root
  state, root = start(drafter, params, t, text, [8])
  context = Context(root=root, length=jnp.asarray([8]), history=text, target=t, sampler=None)
  return jax.jit(lambda state: drafter.propose(params, state, context, None)[0])(state)


def test_blocks_of_one_without_lstm_are_eagle():
  """The same weights, logits at every depth, loss, and drafts."""
  t, batch = target(), random_batch(2)
  same = {"num_heads": 3, "noise": 0.0, "objective": (Term("smooth_l1"), Term("soft", 0.1))}
  same["tree"] = StaticTree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)])
  eagle = Eagle.for_target(t.model.config, **same)
  falcon = Falcon.for_target(t.model.config, block=1, recurrent=False, glance=(0.0, 0.0), **same)
  params = randomized(init(eagle, t), scale=0.5)
  assert jax.tree.map(jnp.shape, init(falcon, t)) == jax.tree.map(jnp.shape, params)
  output = run(t, batch)
  for ours, theirs in zip(
    logits_by_depth(falcon, params, t, output, batch),
    logits_by_depth(eagle, params, t, output, batch),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
  ours, theirs = (
    loss_of(d, params, t, output, batch, jax.random.key(0))[0] for d in (falcon, eagle)
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  np.testing.assert_array_equal(chosen(falcon, params).tokens, chosen(eagle, params).tokens)


def test_lstm_by_hand():
  module = LSTM(8, 2, 0.0, jnp.float32)
  x, memory = jax.random.normal(jax.random.key(0), (2, 5, 6)), jnp.zeros((2, 2, 2, 8))
  params = randomized(nn.unbox(module.init(jax.random.key(1), x, memory))["params"])
  memory = jax.random.normal(jax.random.key(2), memory.shape)
  begins = jnp.asarray([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
  out, after = module.apply({"params": params}, x, memory, begins)

  def sigmoid(y):
    return 1 / (1 + np.exp(-y))

  for row in range(2):
    below = np.asarray(x[row], np.float64)
    for layer in range(2):
      h, c = np.asarray(memory[row, layer], np.float64)
      outputs = []
      for s in range(5):
        if begins[row, s]:
          h, c = np.zeros(8), np.zeros(8)
        dense = params[f"inputs_{layer}"]
        gates = below[s] @ dense["kernel"] + dense["bias"] + h @ params[f"hidden_{layer}"]
        i, f, g, o = np.split(np.asarray(gates), 4)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
        np.testing.assert_allclose(after[row, s, layer], [h, c], atol=2e-6)
      below = np.stack(outputs)
    np.testing.assert_allclose(out[row], below, atol=2e-6)


@pytest.mark.parametrize("recurrent", [True, False])
def test_a_block_sees_itself_wholly_and_nothing_later(recurrent):
  """Both drafts of the block that ends with t depend on every slot up to t, t included."""
  drafter, params = random_drafter(recurrent=recurrent)
  t, batch, slot = target(), random_batch(0, rows=1, length=10), 4
  output = run(t, batch)

  @jax.jit
  def moved(hidden):
    def f(i):  # row 10 moves nothing; ``teacher_forced`` cuts gradients off, so move and look
      hidden = output.hidden + (jnp.arange(10) == i)[None, :, None]
      states = drafter.teacher_forced(params, t, output.replace(hidden=hidden), batch)
      return jnp.stack([x[0, slot] for x in states])

    out = jax.vmap(f)(jnp.arange(11))
    return jnp.max(jnp.abs(out[:10] - out[10]), axis=-1)

  seen = np.asarray(moved(output.hidden)) > 1e-5  # [slots, depths]
  for depth in range(4):
    np.testing.assert_array_equal(seen[:, depth], np.arange(10) <= slot, err_msg=str(depth + 1))


def test_one_pass_a_block():
  """A tree of depth 8 takes ceil(8 / k) passes; the first is the one that reads."""
  calls, t = [], target()

  class Counting(Falcon):
    def _apply(self, params, *args, method):
      calls.append(method)
      return super()._apply(params, *args, method=method)

  def trace(rng, drafter):
    params = drafter.init_params(rng, t)
    prompt = Prompt(jnp.zeros((1, 5), jnp.int32), jnp.asarray([5]), jnp.asarray([1]))
    output = TargetOutput(jnp.zeros((1, 5, 32)))
    state = drafter.start(params, drafter.init_state(1, 32), prompt, output, t)
    context = Context(root=prompt.root, length=prompt.lengths, history=None, target=t, sampler=None)
    return drafter.propose(params, state, context, None)[0].tokens

  for block, passes in ((1, 8), (2, 4), (3, 3)):
    fields = dict(num_heads=8, block=block, tree=StaticTree.chain(8))
    calls.clear()
    jax.eval_shape(
      functools.partial(trace, drafter=Counting.for_target(t.model.config, **fields)),
      jax.random.key(0),
    )
    assert calls.count("read") + calls.count("draft") == passes


def test_one_table_a_slot_within_a_block_and_one_a_path_between_blocks():
  """Nodes fed together get what each gets alone: depth 2 ignores the path, depths 3 and 4 don't."""
  drafter, params = random_drafter()
  t, text = target(), np.random.default_rng(0).integers(0, VOCAB, (1, 12))
  state, root = start(drafter, params, t, text, [8])
  context = Context(root=root, length=jnp.asarray([8]), history=text, target=t, sampler=None)

  @functools.partial(jax.jit, static_argnums=2)
  def feed(first, second, parents):
    _, carry = drafter.first(params, state, context)
    step, logits = drafter.step(params, state, context), []
    nodes = np.zeros(first.shape[1], np.int32), np.array(parents), np.arange(len(parents))
    for level, tokens in enumerate((first, second, jnp.ones_like(second)), 1):
      out, carry = step(carry, level, tokens, nodes[level - 1])
      logits.append(out[0])
    return logits

  first, second, parents = [3, 7, 9], [4, 4, 5, 6], (0, 1, 2, 2)
  together = feed(jnp.asarray([first]), jnp.asarray([second]), parents)
  assert together[0].shape == (1, VOCAB)  # one table
  for i, parent in enumerate(parents):
    alone = feed(jnp.asarray([[first[parent]]]), jnp.asarray([[second[i]]]), (0,))
    for level in (1, 2):
      np.testing.assert_allclose(together[level][i], alone[level][0], atol=1e-5)
  for level in (1, 2):
    assert float(jnp.abs(together[level][0] - together[level][1]).max()) > 1e-2


def test_published_trees_with_repeated_paths_are_cleaned():
  tree = StaticTree.from_paths([(0,), (1,), (0, 0), (0,), (0, 0), (1, 0)])
  assert tree.num_nodes == 5 and tree.paths == ((0,), (1,), (0, 0), (1, 0))


def test_memory_after_rejections_is_that_of_a_fresh_start():
  drafter, params = random_drafter(tree=StaticTree.from_paths([(0,), (1,), (0, 0), (0, 0, 0)]))
  t, prompt = target(), [3, 1, 4, 1, 5]
  out = generate(
    t.model, t.params, [prompt], max_new_tokens=15, drafter=drafter, drafter_params=params,
    stop=None,
  )  # fmt: skip
  text = np.array([[*prompt, *out.tokens[0]]])
  fresh, _ = start(drafter, params, t, text, [text.shape[1] - 1])
  for name in ("last", "recent", "memory"):
    ours, theirs = getattr(out.drafter_state, name), getattr(fresh, name)
    np.testing.assert_allclose(ours, theirs, atol=3e-5, err_msg=name)
  assert np.any(np.asarray(fresh.memory))


def test_glanced_slots_are_fed_their_answers():
  t, batch, at = target(), random_batch(0, rows=2, length=12), (4, 8)

  class Glancing(Falcon):
    def _glanced(self, params, target, output, states, batch, rng):
      return jnp.zeros(batch["tokens"].shape, bool).at[0, np.array(at)].set(True)

  fields = dict(num_heads=2, dropout=0.0, noise=0.0)
  drafter = Glancing.for_target(t.model.config, **fields)
  plain = Falcon.for_target(t.model.config, glance=(0.0, 0.0), **fields)
  params, output = randomized(init(drafter, t), scale=0.5), run(t, batch)
  forced = jax.jit(
    lambda d: d.teacher_forced(params, t, output, batch, jax.random.key(0)), static_argnums=0
  )
  ours = forced(drafter)
  hidden, e = output.hidden, t.model.apply({"params": t.params}, batch["tokens"], method="embed")
  follow = jnp.pad(e[:, 1:], ((0, 0), (0, 1), (0, 0)))
  for s in at:
    hidden = hidden.at[0, s].set(output.hidden[0, s + 2])
    follow = follow.at[0, s].set(e[0, s + 3])
  args = hidden, e, batch["positions"], batch["segment_ids"], follow
  expected = jax.jit(lambda *a: plain._apply(params, *a[:4], 2, a[4], method="rollout"))(*args)
  without = forced(plain)
  for k in (1, 2):
    np.testing.assert_allclose(ours[k - 1], expected[k - 1][:, : -1 - k], atol=1e-5)
    assert float(jnp.abs(ours[k - 1] - without[k - 1])[0, 4:].max()) > 1e-3
    np.testing.assert_allclose(ours[k - 1][1], without[k - 1][1], atol=1e-6)


def test_a_drafter_that_copies_is_right_where_it_glances():
  """What a slot is shown is its own label: states are exact there and only there."""
  t, batch, at = target(), random_batch(0, rows=2, length=14), (3, 8)

  class Glancing(Falcon):
    def _glanced(self, params, target, output, states, batch, rng):
      return jnp.zeros(batch["tokens"].shape, bool).at[1, np.array(at)].set(True)

  drafter = Glancing.for_target(
    t.model.config, num_heads=2, recurrent=False, fuse_bias=False, dropout=0.0, noise=0.0
  )
  params = jax.tree.map(jnp.zeros_like, init(drafter, t))  # the layer adds nothing,
  params["fc"]["kernel"] = jnp.concatenate([jnp.zeros((32, 32)), jnp.eye(32)])  # f passes
  output = run(t, batch)

  @jax.jit
  def misses(params, output):
    states = drafter.teacher_forced(params, t, output, batch, jax.random.key(0))
    return [
      jnp.max(jnp.abs(drafter.predicted(params, x) - output.hidden[:, k:-1]), axis=-1)
      for k, x in enumerate(states, 1)
    ]

  for k, miss in enumerate(misses(params, output), 1):
    # The block that ends with t drafts depth k at its slot t - 2 + k.
    slot = np.arange(miss.shape[1]) - 2 + k
    right = np.array([np.zeros(len(slot), bool), np.isin(slot, at)])
    np.testing.assert_array_equal(np.asarray(miss) < 1e-5, right, err_msg=f"depth {k}")


def test_glancing_shows_every_kth_answered_slot_as_often_as_asked():
  rng = np.random.default_rng(0)
  answered = rng.random((3, 40)) < 0.8
  order, zeros = rng.random((3, 40)), np.zeros((3, 40), np.int32)
  offset = np.array([[0], [1], [1]])
  shown = np.asarray(glance_slots(answered, np.array([0, 3, 99]), offset, order, zeros + 1, 2))
  number = np.cumsum(answered, 1) - 1
  places = answered & (number % 2 == offset)
  assert shown.sum(1).tolist() == [0, 3, places[2].sum()]
  assert np.all(places[shown])
  assert np.array_equal(
    np.flatnonzero(shown[1]), np.sort(np.argsort(np.where(places[1], order[1], 2))[:3])
  )
  # Blocks of 4: runs of up to three slots, which fit between two places.
  shown = np.asarray(glance_slots(np.ones((1, 40), bool), np.array([2]), np.array([[1]]),
                                  order[:1], zeros[:1] + 3, 4))  # fmt: skip
  first = np.sort(np.argsort(np.where(np.arange(40) % 4 == 1, order[0], 2))[:2])
  assert np.flatnonzero(shown[0]).tolist() == sorted(int(s) + i for s in first for i in range(3))


def test_glancing_follows_the_errors():
  """lambda times the wrong slots of each row; none where the drafter is right."""
  t, batch = target(), random_batch(0, rows=2, length=20)
  drafter = Falcon.for_target(t.model.config, num_heads=2, glance=(0.4, 0.4), noise=0.0)
  params, output = init(drafter, t), run(t, batch)
  right = [jnp.pad(output.hidden[:, k:], ((0, 0), (0, k), (0, 0))) for k in (1, 2)]
  # Row 0 is right; in row 1 every state is its negative, whose best token is another.
  states = [x.at[1].multiply(-1) for x in right]
  shown = drafter._glanced(params, t, output, states, batch, jax.random.key(0))
  slots = ((18) + (17)) / 2
  assert np.sum(np.asarray(shown), axis=1).tolist() == [0, int(0.4 * slots)]
  assert not np.any(np.asarray(shown)[:, 17:])  # no answer there


def test_training_with_everything_on_is_finite_and_random():
  drafter = Falcon.for_target(target().model.config, num_heads=3)
  params, batch = init(drafter, target()), random_batch(0)
  output = run(target(), batch)
  losses = [
    float(loss_of(drafter, params, target(), output, batch, jax.random.key(i))[0])
    for i in (0, 0, 1)
  ]
  assert losses[0] == losses[1] != losses[2] and np.all(np.isfinite(losses))


@pytest.mark.parametrize(
  ("options", "message"),
  [({"block": 0}, "block of at least 1"), ({"glance": (0.5, 0.2)}, "least, largest"),
   ({"num_layers": 2}, "one attention layer")],
)  # fmt: skip
def test_wrong_settings_are_one_sentence(options, message):
  with pytest.raises(UserError, match=message):
    Falcon.for_target(target().model.config, **options)
