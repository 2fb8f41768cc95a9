# SPDX-License-Identifier: Apache-2.0
"""Medusa heads: initialisation, label indices, masks, drafting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import (
  VOCAB,
  batch_of,
  init,
  logits_by_depth,
  loss_of,
  random_batch,
  randomized,
  run,
  target,
)

from jaxdec import drafting
from jaxdec.drafting.base import Accepted, Context, Prompt, TargetOutput
from jaxdec.drafting.losses import (
  cross_entropy,
  label_rank,
  overlap,
  soft_cross_entropy,
)
from jaxdec.drafting.medusa import Medusa
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.trained import label_weights
from jaxdec.errors import UserError


def medusa(target, **options):
  return Medusa.for_target(target.model.config, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share_head", [False, True])
def test_heads_start_as_the_lm_head(tied, share_head):
  t = target(tied=tied)
  drafter = medusa(t, share_head=share_head, num_blocks=2)
  params = init(drafter, t)
  batch = random_batch(0)
  output = run(t, batch)
  for k, logits in enumerate(logits_by_depth(drafter, params, t, output, batch), 1):
    np.testing.assert_allclose(logits, output.logits[:, : -1 - k], atol=1e-5)


def test_blocks_have_weights_of_their_own():
  t = target()
  drafter = medusa(t, num_blocks=2, num_heads=3)
  params = init(drafter, t)
  assert len(jax.tree.leaves(params)) == 3 * (2 * 2 + 1)
  count = sum(x.size for x in jax.tree.leaves(params))
  assert count == 3 * (2 * (32 * 32 + 32) + 32 * VOCAB)


def test_cross_entropies_match_autodiff():
  keys = jax.random.split(jax.random.key(0), 4)
  logits = 3 * jax.random.normal(keys[0], (2, 5, 11))
  teacher = 3 * jax.random.normal(keys[1], (2, 5, 11))
  labels = jax.random.randint(keys[2], (2, 5), 0, 11)
  weight = jax.random.uniform(keys[3], (2, 5))

  def hard(x):
    return jnp.sum(
      weight * -jnp.take_along_axis(jax.nn.log_softmax(x), labels[..., None], -1)[..., 0]
    )

  def soft(x):
    return jnp.sum(weight * -jnp.sum(jax.nn.softmax(teacher) * jax.nn.log_softmax(x), -1))

  pairs = [
    (hard, lambda x: jnp.sum(weight * cross_entropy(x, labels))),
    (soft, lambda x: jnp.sum(weight * soft_cross_entropy(x, teacher))),
  ]
  for reference, ours in pairs:
    np.testing.assert_allclose(ours(logits), reference(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(reference)(logits), atol=1e-6)
  teacher_grad = jax.grad(lambda x: jnp.sum(soft_cross_entropy(logits, x)))(teacher)
  assert not np.any(teacher_grad)


def test_label_rank_is_the_place_in_top_k():
  logits = jnp.asarray([[0.5, 2.0, 2.0, -1.0, 2.0]])
  order = jax.lax.top_k(logits, 5)[1][0]
  for place, token in enumerate(order):
    assert int(label_rank(logits, jnp.asarray([token]))[0]) == place
  p = jax.nn.softmax(logits)
  np.testing.assert_allclose(overlap(logits, logits), jnp.ones(1), rtol=1e-6)
  np.testing.assert_allclose(
    overlap(jnp.zeros_like(logits), logits), jnp.minimum(p, 0.2).sum(-1), rtol=1e-6
  )


def test_labels_are_k_plus_one_ahead():
  """A text that counts: a head set by hand to add k + 1 to the current token is perfect."""
  t = target()
  drafter = medusa(t, num_heads=3)
  text = (np.arange(16)[None] + np.array([[0], [5]])) % VOCAB
  batch = batch_of(text)
  # The synthetic target's state spells its current token; its law is the next number, for sure.
  hidden = jax.nn.one_hot(batch["tokens"], 32)
  logits = 40.0 * jax.nn.one_hot((batch["tokens"] + 1) % VOCAB, VOCAB)
  output = TargetOutput(hidden, (), logits)

  def heads(shift):
    params = init(drafter, t)
    for k in range(1, 4):
      kernel = np.zeros((32, VOCAB), np.float32)
      for token in range(VOCAB):
        kernel[token, (token + k + 1 + shift) % VOCAB] = 40.0
      params[f"head_{k - 1}"]["lm_head"]["kernel"] = jnp.asarray(kernel)
    return params

  for objective in ("hard", "soft"):
    used = medusa(t, num_heads=3, objective=objective)
    loss, metrics = loss_of(used, heads(0), t, output, batch)
    assert float(loss) < 1e-6
    np.testing.assert_allclose(metrics["top1"], np.ones(3))
    np.testing.assert_allclose(metrics["overlap"], np.ones(3), atol=1e-5)
    assert float(metrics["tokens_per_step"]) == pytest.approx(4.0)
    for shift in (-1, 1):  # off by one must show
      loss, metrics = loss_of(used, heads(shift), t, output, batch)
      assert float(loss) > 30
      np.testing.assert_allclose(metrics["top1"], np.zeros(3))


def test_depth_weights_of_the_loss():
  t = target()
  batch = random_batch(1)
  output = run(t, batch)
  drafter = medusa(t, num_heads=3, depth_decay=0.8)
  params = randomized(init(drafter, t))
  loss, metrics = loss_of(drafter, params, t, output, batch)
  expected = sum(0.8**k * float(metrics["depth_loss"][k - 1]) for k in (1, 2, 3))
  assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_weights_respect_documents_and_loss_mask():
  segments = [[1, 1, 1, 1, 2, 2, 2, 2, 0, 0]]
  mask = [[1, 1, 1, 0, 1, 1, 1, 1, 1, 1]]
  batch = batch_of(np.zeros((1, 10)), segments, mask)
  free = label_weights(batch, 1, prefix=False)
  np.testing.assert_array_equal(free, [[1, 0, 0, 0, 1, 1, 0, 0]])
  np.testing.assert_array_equal(label_weights(batch, 2, prefix=False), [[0, 0, 0, 0, 1, 0, 0]])
  answers = batch_of(np.zeros((1, 6)), None, [[0, 0, 1, 1, 0, 1]])
  np.testing.assert_array_equal(label_weights(answers, 1, prefix=False), [[1, 1, 0, 1]])
  np.testing.assert_array_equal(label_weights(answers, 1, prefix=True), [[0, 1, 0, 0]])


def test_loss_ignores_what_the_mask_leaves_out():
  t = target()
  rng = np.random.default_rng(3)
  first, second, other = (rng.integers(0, VOCAB, 9) for _ in range(3))
  segments = [[1] * 9 + [2] * 9]
  drafter = medusa(t)
  params = randomized(init(drafter, t))

  def gradient(tail):
    batch = batch_of([np.concatenate([first, tail])], segments, [[1] * 9 + [0] * 9])
    output = run(t, batch)
    return jax.grad(lambda p: loss_of(drafter, p, t, output, batch)[0])(params)

  jax.tree.map(np.testing.assert_array_equal, gradient(second), gradient(other))


def test_a_fraction_of_the_slots_estimates_the_loss():
  t = target()
  batch = random_batch(4, rows=2, length=40)
  output = run(t, batch)
  params = randomized(init(medusa(t), t))
  full = float(loss_of(medusa(t), params, t, output, batch)[0])
  part = medusa(t, loss_fraction=0.25)
  draws = [float(loss_of(part, params, t, output, batch, jax.random.key(i))[0]) for i in range(60)]
  assert np.std(draws) > 0
  assert abs(np.mean(draws) - full) < 4 * np.std(draws) / np.sqrt(60)
  assert float(loss_of(part, params, t, output, batch)[0]) == pytest.approx(full)


def context_for(t, root, length, sampler=None, keys=None):
  b = root.shape[0]
  return Context(
    root=root,
    length=length,
    history=jnp.zeros((b, 8), jnp.int32),
    target=t,
    sampler=sampler,
    keys=keys,
  )


@pytest.mark.parametrize("share_head", [False, True])
def test_static_tree_holds_each_heads_best_tokens(share_head):
  t = target()
  paths = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)]
  drafter = medusa(t, num_heads=3, tree=StaticTree.from_paths(paths), share_head=share_head)
  params = randomized(init(drafter, t))
  hidden = jax.random.normal(jax.random.key(1), (2, 1, 32))
  root = jnp.asarray([3, 4])
  prompt = Prompt(jnp.zeros((2, 5), jnp.int32), jnp.asarray([5, 3]), root)
  state = drafter.start(params, drafter.init_state(2, 32), prompt, TargetOutput(hidden), t)
  tree, _ = drafter.propose(params, state, context_for(t, root, prompt.lengths), jax.random.key(0))
  assert drafter.num_nodes == tree.tokens.shape[1] == 9 and tree.max_depth == 3
  np.testing.assert_array_equal(tree.tokens[:, 0], root)
  for slot, path in enumerate(drafter.shape.paths, 1):
    k = len(path)
    states = drafter._residual(params, k, hidden[:, 0])
    ranked = jax.lax.top_k(drafter.head(params, t, k, states), 4)[1]
    np.testing.assert_array_equal(tree.tokens[:, slot], ranked[:, path[-1]])


def test_observe_keeps_the_state_of_the_last_accepted_node():
  t = target()
  drafter = medusa(t)
  state = drafter.init_state(3, 32)
  hidden = jax.random.normal(jax.random.key(0), (3, 5, 32))
  accepted = Accepted(
    path=jnp.asarray([[0, 2, 4], [0, 0, 0], [0, 1, 1]]),
    count=jnp.asarray([3, 1, 0]),
    next_token=jnp.zeros(3, jnp.int32),
    tokens=jnp.zeros((3, 3), jnp.int32),
  )
  new = drafter.observe({}, state, None, accepted, TargetOutput(hidden), None)
  np.testing.assert_array_equal(new.hidden[0], hidden[0, 4])
  np.testing.assert_array_equal(new.hidden[1], hidden[1, 0])
  np.testing.assert_array_equal(new.hidden[2], state.hidden[2])  # finished row


def test_errors_say_what_to_change():
  t = target()
  with pytest.raises(UserError, match="3 deep, but it drafts 1 to 2"):
    medusa(t, num_heads=2, tree=StaticTree.chain(3))
  with pytest.raises(UserError, match="too short to train 4"):
    batch = random_batch(0, length=5)
    loss_of(medusa(t), init(medusa(t), t), t, run(t, batch), batch)
  with pytest.raises(UserError, match="'medusa' must be distilled for its target first"):
    drafting.get("medusa")
  assert drafting.get("medusa", config=t.model.config, num_heads=2) == medusa(t, num_heads=2)
  with pytest.raises(UserError, match="objective"):
    medusa(t, objective="both")
