# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3: the training rollout is what drafting computes; caches, draft vocabulary."""

from __future__ import annotations

import dataclasses
import functools

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

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting.base import Accepted, Context, Prompt, TargetOutput
from jaxdec.drafting.captured import default_capture
from jaxdec.drafting.dynamic_tree import DynamicTree
from jaxdec.drafting.eagle3 import Eagle3
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.errors import UserError

PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0), (0, 1, 2)]
KEPT = (0, 1, 2, 5, 6, 9, 11, 12, 17, 20, 22)


@functools.cache
def random_drafter(vocabulary=None, **options):
  t = target()
  if vocabulary is not None:
    options["vocabulary"] = DraftVocabulary(vocabulary, VOCAB)
  options = {"num_heads": 4, "tree": StaticTree.from_paths(PATHS), **options}
  drafter = Eagle3.for_target(t.model.config, **options)
  return t, drafter, randomized(init(drafter, t), scale=0.5)


def context_of(t, root, lengths):
  return Context(root=root, length=lengths, history=None, target=t, sampler=None)


@functools.partial(jax.jit, static_argnums=0)
def start(drafter, params, target_params, prompt, output):
  from jaxdec.drafting.base import Target

  state = drafter.init_state(prompt.tokens.shape[0], 40)
  return drafter.start(params, state, prompt, output, Target(target().model, target_params, None))


@pytest.mark.parametrize("options", [{}, {"fc_norm": True, "norm_output": True}])
def test_rollout_in_parallel_equals_drafting_slot_by_slot(options):
  """For every slot t and step j: prefill of slots 0..t with true features, then j fed tokens."""
  t, drafter, params = random_drafter(**options)
  length, depths = 11, drafter.num_heads
  text = np.random.default_rng(0).integers(0, VOCAB, length)
  batch = batch_of([text])
  parallel = logits_by_depth(drafter, params, t, run(t, batch, drafter.capture), batch)
  slots = length - 1 - depths  # one row per slot: the text up to it, the next token as root
  rows = batch_of(np.tile(text, (slots, 1)))
  lengths = jnp.arange(1, slots + 1)
  root = jnp.asarray(text)[lengths]
  prompt = Prompt(rows["tokens"], lengths, root)
  state = start(drafter, params, t.params, prompt, run(t, rows, drafter.capture))

  @jax.jit
  def draft(state):
    context = context_of(t, root, lengths)
    logits, carry = drafter.first(params, state, context)
    step, out = drafter.step(params, state, context), [logits]
    for level in range(1, depths):
      fed = jnp.asarray(text)[lengths + level][:, None]
      logits, carry = step(carry, level, fed, np.zeros(1, np.int32))
      out.append(logits[:, 0])
    return out

  for depth, logits in enumerate(draft(state), 1):
    np.testing.assert_allclose(
      logits, parallel[depth - 1][0, :slots], atol=2e-5, err_msg=str(depth)
    )


@pytest.mark.parametrize("vocabulary", [None, KEPT])
def test_drafted_trees_rank_by_training_logits(vocabulary):
  """Nodes see their ancestors only: each path drafts as if it were alone."""
  t, drafter, params = random_drafter(vocabulary)
  length = 9
  tokens = np.random.default_rng(1).integers(0, VOCAB, (1, length))
  batch = batch_of(tokens)
  root = jnp.asarray([4])
  prompt = Prompt(batch["tokens"], jnp.asarray([length]), root)
  state = start(drafter, params, t.params, prompt, run(t, batch, drafter.capture))
  context = context_of(t, root, prompt.lengths)
  tree, _ = jax.jit(lambda s: drafter.propose(params, s, context, None))(state)
  drafted = np.asarray(tree.tokens[0])
  paths = [(), *drafter.shape.paths]
  names = np.arange(VOCAB) if vocabulary is None else np.asarray(vocabulary)
  for leaf in ((0, 0, 0), (0, 1, 2), (1, 0), (2,)):
    path = [int(drafted[paths.index(leaf[:i])]) for i in range(len(leaf) + 1)]
    text = np.zeros((1, 16), np.int32)
    text[0, :length], text[0, length : length + len(path)] = tokens, path
    b = batch_of(text)
    by_depth = logits_by_depth(drafter, params, t, run(t, b, drafter.capture), b)
    for depth in range(1, len(leaf) + 1):
      ranked = jax.lax.top_k(by_depth[depth - 1][0, length - 1], 3)[1]
      assert path[depth] == names[int(ranked[leaf[depth - 1]])], (leaf, depth)


def test_accepted_slots_are_read_again_with_true_features():
  """State after observe equals a fresh start on the committed text; finished rows stay."""
  t, drafter, params = random_drafter()
  text = np.random.default_rng(2).integers(0, VOCAB, (2, 13))
  batch = batch_of(text)
  whole = run(t, batch, drafter.capture)
  lengths, root = jnp.asarray([9, 9]), batch["tokens"][:, 9]
  before = start(drafter, params, t.params, Prompt(batch["tokens"], lengths, root), whole)
  path = np.array([[0, 2, 4], [0, 2, 4]])
  features = tuple(
    jnp.zeros((2, 5, 32)).at[:, path[0]].set(f[:, 9:12]) + (jnp.arange(5) % 2)[:, None]
    for f in whole.features
  )
  accepted = Accepted(
    path=jnp.asarray(path),
    count=jnp.asarray([3, 0]),
    next_token=None,
    tokens=batch["tokens"][:, 10:13],
  )
  context = context_of(t, root, lengths)
  after = jax.jit(
    lambda s: drafter.observe(
      params, s, None, accepted, TargetOutput(features[0], features), context
    )
  )(before)
  fresh = start(
    drafter,
    params,
    t.params,
    Prompt(batch["tokens"], jnp.asarray([12, 12]), batch["tokens"][:, 12]),
    whole,
  )
  (old,), (cache,), (other,) = before.caches, after.caches, fresh.caches
  np.testing.assert_array_equal(cache.length, [12, 9])
  np.testing.assert_allclose(after.last[0], fresh.last[0], atol=1e-5)
  np.testing.assert_allclose(cache.k[0, :, :12], other.k[0, :, :12], atol=1e-5)
  np.testing.assert_allclose(cache.v[0, :, :12], other.v[0, :, :12], atol=1e-5)
  np.testing.assert_array_equal(after.last[1], before.last[1])
  np.testing.assert_array_equal(cache.k[1, :, :9], old.k[1, :, :9])


def test_loss_by_hand():
  """Depth k at slot t: the target's law at t + k, cut to the draft vocabulary and renormalised."""
  t, drafter, params = random_drafter(KEPT, num_heads=2, tree=None)
  batch = random_batch(5, rows=2, length=9)
  batch["loss_mask"] = batch["loss_mask"].at[0, 4].set(0)
  output = run(t, batch, drafter.capture)
  loss, metrics = loss_of(drafter, params, t, output, batch)
  teacher = np.asarray(output.logits, np.float64)
  expected = 0.0
  for k, logits in enumerate(logits_by_depth(drafter, params, t, output, batch), 1):
    q = jax.nn.log_softmax(jnp.asarray(logits), -1)
    terms, hits = [], []
    for row in range(2):
      for slot in range(9 - 1 - k):
        law = teacher[row, slot + k]
        fed = range(slot + 1, slot + k + 2)
        if int(np.argmax(law)) not in KEPT or any(batch["loss_mask"][row, i] == 0 for i in fed):
          continue
        p = np.exp(law[list(KEPT)])
        terms.append(-np.sum(p / p.sum() * np.asarray(q[row, slot])))
        hits.append(KEPT[int(np.argmax(logits[row, slot]))] == int(np.argmax(law)))
    expected += 0.8**k * np.mean(terms)
    np.testing.assert_allclose(metrics["top1"][k - 1], np.mean(hits), atol=1e-6)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_packed_documents_do_not_leak():
  t, drafter, params = random_drafter(num_heads=3, tree=None)
  rng = np.random.default_rng(0)
  first, second = rng.integers(0, VOCAB, 9), rng.integers(0, VOCAB, 11)

  def losses(batch):
    return loss_of(drafter, params, t, run(t, batch, drafter.capture), batch)[1]["depth_loss"]

  joint = losses(batch_of([np.concatenate([first, second])], [[1] * 9 + [2] * 11]))
  a, b = losses(batch_of([first])), losses(batch_of([second]))
  for k in (1, 2, 3):
    n, m = 9 - 1 - k, 11 - 1 - k
    np.testing.assert_allclose(joint[k - 1], (n * a[k - 1] + m * b[k - 1]) / (n + m), rtol=2e-5)


def test_eagle_3_1_norms():
  """``fc_norm`` makes drafts blind to the scale of each captured state; ``norm_output`` changes
  what later steps are fed, and nothing of the first."""
  t, plain, params = random_drafter(num_heads=2, tree=None)
  batch = random_batch(8, rows=1, length=8)
  output = run(t, batch, plain.capture)
  louder = output.replace(features=(3.0 * output.features[0], *output.features[1:]))

  def logits(drafter, params, output):
    return logits_by_depth(drafter, params, t, output, batch)

  _, normed, normed_params = random_drafter(num_heads=2, tree=None, fc_norm=True)
  np.testing.assert_allclose(
    logits(normed, normed_params, louder)[1], logits(normed, normed_params, output)[1], atol=1e-4
  )
  assert np.max(np.abs(logits(plain, params, louder)[1] - logits(plain, params, output)[1])) > 0.01
  fed = dataclasses.replace(plain, norm_output=True)  # the same parameters
  ours, theirs = logits(fed, params, output), logits(plain, params, output)
  np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
  assert np.max(np.abs(ours[1] - theirs[1])) > 0.01


def test_gradients_flow_through_the_rollout():
  """A loss at the last step alone reaches the fusion of step 0."""
  t, drafter, params = random_drafter(num_heads=3, tree=None)
  batch = random_batch(6)
  output = run(t, batch, drafter.capture)

  def last(params):
    return jnp.sum(jnp.square(drafter.teacher_forced(params, t, output, batch)[2]))

  grads = jax.jit(jax.grad(last))(params)
  assert float(jnp.max(jnp.abs(grads["fuse"]["kernel"]))) > 0
  assert not np.any(grads["lm_head"]["kernel"])


@pytest.mark.parametrize(
  ("tree", "temperature"),
  [
    (StaticTree.from_paths(PATHS), 1.0),
    (DynamicTree(num_nodes=8, max_depth=3, width=3), 0.0),
    (DynamicTree(num_nodes=8, max_depth=3, width=3), 1.0),
  ],
)
def test_random_weights_change_no_token(tree, temperature):
  """U1, U2, with a draft vocabulary that lacks half of the tokens."""
  t, drafter, params = random_drafter(KEPT, tree=tree)
  options = dict(max_new_tokens=20, sampler=Sampler(temperature=temperature), stop=None)
  prompts = [[1, 2, 3, 4, 5], [7, 8]]
  plain = generate(t.model, t.params, prompts, **options)
  ours = generate(t.model, t.params, prompts, drafter=drafter, drafter_params=params, **options)
  assert ours.tokens == plain.tokens


def test_only_kept_tokens_are_drafted():
  t, drafter, params = random_drafter(KEPT, tree=DynamicTree(num_nodes=8, max_depth=3, width=3))
  batch = random_batch(7, rows=2, length=8)
  prompt = Prompt(batch["tokens"], jnp.asarray([8, 5]), jnp.asarray([3, 4]))
  state = start(drafter, params, t.params, prompt, run(t, batch, drafter.capture))
  context = context_of(t, prompt.root, prompt.lengths)
  tree, _ = jax.jit(lambda s: drafter.propose(params, s, context, None))(state)
  assert set(np.asarray(tree.tokens[:, 1:]).ravel().tolist()) <= set(KEPT)


def test_draft_vocabulary_interchange_form():
  counts = np.zeros(10)
  counts[[7, 2, 5]] = [4, 9, 1]
  vocabulary = DraftVocabulary.most_frequent(counts, 2)
  np.testing.assert_array_equal(vocabulary.ids, [2, 7])
  np.testing.assert_array_equal(vocabulary.d2t, [2, 6])
  np.testing.assert_array_equal(np.flatnonzero(vocabulary.t2d), [2, 7])
  assert vocabulary == DraftVocabulary([7, 2], 10) and hash(vocabulary) == hash(
    DraftVocabulary([7, 2], 10)
  )
  with pytest.raises(UserError, match=r"0\.\.9"):
    DraftVocabulary([10], 10)
  with pytest.raises(UserError, match="subset of 10 tokens, but the target has 23"):
    Eagle3.for_target(target().model.config, vocabulary=vocabulary)


def test_captured_layers():
  assert default_capture(32) == (2, 16, 29)
  assert default_capture(8) == (2, 4, 5)
  assert default_capture(6) == (1, 3, 5)
  for layers in range(1, 12):
    assert all(0 <= i <= layers for i in default_capture(layers))


@pytest.mark.parametrize("vocabulary", [None, KEPT])
def test_head_may_start_as_the_targets(vocabulary):
  t, drafter, _ = random_drafter(vocabulary, head_init="target")
  params = init(drafter, t)
  g = jax.random.normal(jax.random.key(1), (1, 3, drafter.dim))
  normed = drafter.network.apply({"params": params}, g, method=lambda m, g: m.out_norm(g))
  expected = t.model.apply({"params": t.params}, normed, method="unembed")
  expected = expected if vocabulary is None else expected[..., np.asarray(vocabulary)]
  np.testing.assert_allclose(drafter.head(params, t, 1, g), expected, atol=1e-5)
  with pytest.raises(UserError, match="head_init of eagle3 is random or target, got 'copy'"):
    dataclasses.replace(drafter, head_init="copy")
