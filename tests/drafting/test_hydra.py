# SPDX-License-Identifier: Apache-2.0
"""Hydra and Hydra++: reduction to Medusa, level-by-level drafting, the prefix layer's cache."""

from __future__ import annotations

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
from jaxdec.drafting.hydra import Hydra, HydraPlusPlus
from jaxdec.drafting.medusa import Medusa
from jaxdec.drafting.static_tree import StaticTree

PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0), (0, 1, 2)]


def of(cls, target, **options):
  return cls.for_target(target.model.config, **options)


@functools.cache
def random_drafter(cls, **options):
  t = target()
  drafter = of(cls, t, num_heads=3, tree=StaticTree.from_paths(PATHS), **options)
  return t, drafter, randomized(init(drafter, t))


@pytest.mark.parametrize("cls", [Hydra, HydraPlusPlus])
def test_shared_heads_start_at_the_teacher_or_near(cls):
  t = target()
  drafter = of(cls, t, share_head=True, num_heads=2)
  params = init(drafter, t)
  batch = random_batch(0)
  output = run(t, batch)
  for k, logits in enumerate(logits_by_depth(drafter, params, t, output, batch), 1):
    expected = output.logits[:, : -1 - k]
    if cls is HydraPlusPlus:  # z starts as RMSNorm(h): the weights of the norm are all one
      hidden = output.hidden[:, : -1 - k]
      hidden = hidden / np.sqrt(np.mean(hidden**2, -1, keepdims=True) + 1e-6)
      expected = t.model.apply({"params": t.params}, hidden, method="unembed")
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_hydra_with_medusas_weights_is_medusa():
  """R = [I | 0], zero biases, no weight on the embeddings: head i equals Medusa's head i + 1."""
  t = target()
  medusa, hydra = of(Medusa, t, num_heads=3), of(Hydra, t, num_heads=3, init="fan_in")
  source = randomized(init(medusa, t))
  params = init(hydra, t)
  for k in range(3):
    ours, theirs = params[f"head_{k}"], source[f"head_{k}"]
    width = (k + 2) * t.model.config.dim
    ours["reduce"] = {"kernel": jnp.eye(width, 32), "bias": jnp.zeros(32)}
    kernel = jnp.zeros((width, 32)).at[:32].set(theirs["block_0"]["kernel"])
    ours["block_0"] = {"kernel": kernel, "bias": theirs["block_0"]["bias"]}
    ours["lm_head"] = {"kernel": theirs["lm_head"]["kernel"], "bias": jnp.zeros(VOCAB)}
  batch = random_batch(2)
  output = run(t, batch)
  pairs = zip(
    logits_by_depth(medusa, source, t, output, batch),
    logits_by_depth(hydra, params, t, output, batch),
  )
  for a, b in pairs:
    np.testing.assert_allclose(a, b, atol=2e-6)


def prompt_and_state(t, drafter, params, lengths, width=12, seed=0):
  """The drafter after a ragged prompt, fed as the decode loop feeds it."""
  b = len(lengths)
  tokens = np.random.default_rng(seed).integers(0, VOCAB, (b, width))
  lengths = np.asarray(lengths)
  valid = np.arange(width)[None] < lengths[:, None]
  batch = batch_of(np.where(valid, tokens, 0), valid.astype(np.int32))
  output = run(t, batch, drafter.capture)
  root = jnp.asarray([3, 11][:b])
  prompt = Prompt(batch["tokens"], jnp.asarray(lengths), root)
  if not drafter.needs_prompt_hidden:
    last = jnp.asarray(lengths - 1)[:, None, None]
    output = TargetOutput(jnp.take_along_axis(output.hidden, last, axis=1))
  state = drafter.start(params, drafter.init_state(b, 40), prompt, output, t)
  context = Context(root=root, length=prompt.lengths, history=None, target=t, sampler=None)
  return batch, prompt, state, context


@pytest.mark.parametrize("cls", [Hydra, HydraPlusPlus])
def test_drafted_logits_equal_training_logits(cls):
  """Every node's children are ranked by what the training pass gives for that node's path."""
  t, drafter, params = random_drafter(cls)
  batch, prompt, state, context = prompt_and_state(t, drafter, params, [12, 7])
  tree = jax.jit(lambda: drafter.propose(params, state, context, None)[0])()
  tokens, parent = np.asarray(tree.tokens), np.asarray(tree.parent)
  paths = [(), *drafter.shape.paths]

  for row in range(2):
    length = int(prompt.lengths[row])
    for leaf in ((0, 0, 0), (0, 1, 2), (1, 0), (2,)):
      path = [int(tokens[row, paths.index(leaf[:i])]) for i in range(len(leaf) + 1)]
      text = np.zeros((1, 20), np.int32)
      text[0, :length] = batch["tokens"][row, :length]
      text[0, length : length + len(path)] = path
      b = batch_of(text)
      by_depth = logits_by_depth(drafter, params, t, run(t, b, drafter.capture), b)
      for depth in range(1, len(leaf) + 1):
        ranked = jax.lax.top_k(by_depth[depth - 1][0, length - 1], 3)[1]
        assert path[depth] == int(ranked[leaf[depth - 1]]), (row, leaf, depth)
  assert np.array_equal(parent[0], drafter.shape.parent)


def test_only_nodes_with_children_are_fed_one_call_a_level():
  t, drafter, params = random_drafter(Hydra)
  _, _, state, context = prompt_and_state(t, drafter, params, [5])
  fed = []

  class Counting(Hydra):
    def step(self, *args):
      inner = super().step(*args)

      def feed(carry, level, tokens, parents):
        fed.append((level, tokens.shape[1]))
        return inner(carry, level, tokens, parents)

      return feed

  counting = of(Counting, t, num_heads=3, tree=drafter.tree)
  counting.propose(params, state, context, None)
  assert fed == [(1, 2), (2, 2)]  # (0,) and (1,); then (0, 0) and (0, 1)


def test_prefix_cache_reads_accepted_nodes_only():
  """State after observe equals a fresh start on the committed text; finished rows stay."""
  t, drafter, params = random_drafter(HydraPlusPlus)
  batch, _, state, context = prompt_and_state(t, drafter, params, [9, 6])
  nodes = 5
  path = jnp.asarray([[0, 2, 4], [0, 1, 1]])
  count = jnp.asarray([3, 0])
  text = np.zeros((1, 12), np.int32)
  text[0, :9] = batch["tokens"][0, :9]
  text[0, 9:12] = [3, 8, 1]
  whole = run(t, batch_of(text))
  hidden = jax.random.normal(jax.random.key(5), (2, nodes, 32))
  hidden = hidden.at[0, np.array([0, 2, 4])].set(whole.hidden[0, 9:12])
  accepted = Accepted(
    path=path, count=count, next_token=jnp.zeros(2, jnp.int32), tokens=jnp.zeros((2, 3), jnp.int32)
  )
  new = drafter.observe(params, state, None, accepted, TargetOutput(hidden), context)
  fresh = drafter.start(
    params,
    drafter.init_state(1, 40),
    Prompt(jnp.asarray(text), jnp.asarray([12]), jnp.asarray([0])),
    whole,
    t,
  )
  np.testing.assert_allclose(new.hidden[0], fresh.hidden[0], atol=1e-5)
  np.testing.assert_allclose(new.cache.k[0, :, :12], fresh.cache.k[0, :, :12], atol=1e-5)
  np.testing.assert_array_equal(new.cache.length, [12, 6])
  np.testing.assert_array_equal(new.hidden[1], state.hidden[1])
  np.testing.assert_array_equal(new.cache.k[1, :, :6], state.cache.k[1, :, :6])


@pytest.mark.parametrize("cls", [Hydra, HydraPlusPlus])
def test_packed_documents_do_not_leak(cls):
  """The loss on two packed documents is that of the two apart."""
  t, drafter, params = random_drafter(cls)
  rng = np.random.default_rng(0)
  first, second = rng.integers(0, VOCAB, 9), rng.integers(0, VOCAB, 11)

  def losses(batch):
    return loss_of(drafter, params, t, run(t, batch), batch)[1]["depth_loss"]

  packed = batch_of([np.concatenate([first, second])], [[1] * 9 + [2] * 11])
  joint = losses(packed)
  a, b = losses(batch_of([first])), losses(batch_of([second]))
  for k in (1, 2, 3):
    n, m = 9 - 1 - k, 11 - 1 - k
    expected = (n * a[k - 1] + m * b[k - 1]) / (n + m)
    np.testing.assert_allclose(joint[k - 1], expected, rtol=2e-5)


def test_dropout_only_in_training():
  t, drafter, params = random_drafter(HydraPlusPlus)
  batch = random_batch(3)
  output = run(t, batch)

  def loss(rng):
    return loss_of(drafter, params, t, output, batch, rng)[0]

  assert float(loss(None)) == float(loss(None))
  assert float(loss(jax.random.key(0))) != float(loss(jax.random.key(1)))
  assert drafter.dropout == 0.2 and drafter.num_blocks == 4 and drafter.objective == "soft"


@pytest.mark.parametrize(
  ("cls", "temperature"), [(Medusa, 0.0), (Medusa, 1.0), (Hydra, 1.0), (HydraPlusPlus, 0.0)]
)
def test_random_heads_change_no_token(cls, temperature):
  """U1, U2: with random weights and ragged prompts the output is that of plain decoding."""
  t = target()
  drafter = of(cls, t, num_heads=3, tree=StaticTree.from_paths(PATHS))
  params = randomized(init(drafter, t))
  prompts = [[1, 2, 3, 4, 5], [7, 8]]
  options = dict(max_new_tokens=20, sampler=Sampler(temperature=temperature), stop=None)
  plain = generate(t.model, t.params, prompts, **options)
  ours = generate(t.model, t.params, prompts, drafter=drafter, drafter_params=params, **options)
  assert ours.tokens == plain.tokens
  assert ours.stats.tokens_per_step >= 1.0


def markov_rows(rng, matrix, rows, length):
  rows_out = np.zeros((rows, length), np.int32)
  rows_out[:, 0] = rng.integers(0, len(matrix), rows)
  for t in range(1, length):
    u = rng.random((rows, 1))
    rows_out[:, t] = np.argmax(np.cumsum(matrix[rows_out[:, t - 1]], -1) > u, -1)
  return rows_out


def test_hydra_beats_medusa_on_markov_text():
  """Medusa head k can't beat E max_v P^{k+1}[x_t, v]; Hydra may reach E max_v P[x_{t+k}, v]."""
  rng = np.random.default_rng(0)
  matrix = rng.dirichlet(np.full(VOCAB, 0.08), VOCAB)
  t = target()
  law = jnp.log(jnp.asarray(matrix) + 1e-9)

  def perfect(batch):
    """A target that knows the chain: its state spells the token, its law is the matrix row."""
    hidden = jax.nn.one_hot(batch["tokens"], 32)
    return TargetOutput(hidden, (), law[batch["tokens"]])

  test = batch_of(markov_rows(rng, matrix, 16, 64))
  accuracy = {}
  for cls in (Medusa, Hydra):
    drafter = of(cls, t, num_heads=3)
    params = train_on(
      drafter,
      t,
      perfect,
      lambda i: batch_of(markov_rows(np.random.default_rng(i), matrix, 8, 32)),
      150,
    )
    hits = [
      jnp.mean(jnp.argmax(x, -1) == test["tokens"][:, 1 + k :])
      for k, x in enumerate(logits_by_depth(drafter, params, t, perfect(test), test), 1)
    ]
    accuracy[cls] = np.asarray(hits)
  tokens = np.asarray(test["tokens"])
  for k in (1, 2, 3):
    ceiling = np.max(np.linalg.matrix_power(matrix, k + 1), -1)[tokens[:, : -1 - k]].mean()
    best = np.max(matrix, -1)[tokens[:, k:-1]].mean()
    assert accuracy[Medusa][k - 1] < ceiling + 0.04
    assert accuracy[Hydra][k - 1] > accuracy[Medusa][k - 1] + 0.05
    assert accuracy[Hydra][k - 1] > best - 0.08


def train_on(drafter, t, teacher, batches, steps):
  import optax

  params = init(drafter, t)
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps, 0.05))

  @jax.jit
  def step(params, state, batch):
    grads = jax.grad(lambda p: drafter.loss(p, t, teacher(batch), batch, None)[0])(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for i in range(steps):
    params, state = step(params, state, batches(i))
  return params
