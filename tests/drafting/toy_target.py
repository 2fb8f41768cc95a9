# SPDX-License-Identifier: Apache-2.0
"""Small targets and batches for the tests of trained drafters."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdec.drafting.base import Target, TargetOutput
from jaxdec.models import Decoder, tiny_llama

VOCAB, DIM = 23, 32


@functools.cache
def target(vocab=VOCAB, dim=DIM, layers=3, seed=0, tied=False) -> Target:
  """A random decoder; its embeddings are scaled up so that tokens matter to what comes next."""
  config = tiny_llama(
    vocab_size=vocab,
    dim=dim,
    num_layers=layers,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    max_length=512,
    tie_embeddings=tied,
  )
  model = Decoder(config)
  init = jax.jit(lambda rng: nn.unbox(model.init(rng, jnp.zeros((1, 4), jnp.int32))["params"]))
  params = dict(init(jax.random.key(seed)))
  params["embed"] = jax.tree.map(lambda x: x * 50, params["embed"])
  return Target(model, params, None)


def run(target: Target, batch, capture=()) -> TargetOutput:
  """The target over a whole batch."""
  args = batch["tokens"], batch["positions"], batch["segment_ids"]
  return _run(target.model, target.params, *args, capture)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _run(model, params, tokens, positions, segment_ids, capture):
  out = model.apply({"params": params}, tokens, positions, segment_ids, capture=capture)
  return TargetOutput(out.hidden, out.features, out.logits)


def init(drafter, target: Target, seed=0):
  return _init(drafter, target.model, target.params, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(drafter, model, params, rng):
  return drafter.init_params(rng, Target(model, params, None))


def logits_by_depth(drafter, params, target: Target, output: TargetOutput, batch):
  """Teacher-forced logits of every depth, ``[B, T-1-k, V]``."""
  return _logits(drafter, target.model, params, target.params, output, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(drafter, model, params, target_params, output, batch):
  target = Target(model, target_params, None)
  states = drafter.teacher_forced(params, target, output, batch)
  return [drafter.head(params, target, k, x) for k, x in enumerate(states, 1)]


def loss_of(drafter, params, target: Target, output: TargetOutput, batch, rng=None):
  return _loss(drafter, target.model, params, target.params, output, batch, rng)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(drafter, model, params, target_params, output, batch, rng):
  return drafter.loss(params, Target(model, target_params, None), output, batch, rng)


def batch_of(tokens, segment_ids=None, loss_mask=None):
  """A packed batch; positions restart with every segment."""
  tokens = np.asarray(tokens, np.int32)
  segments = np.ones_like(tokens) if segment_ids is None else np.asarray(segment_ids, np.int32)
  positions = np.zeros_like(tokens)
  for row in range(tokens.shape[0]):
    for t in range(1, tokens.shape[1]):
      if segments[row, t] == segments[row, t - 1]:
        positions[row, t] = positions[row, t - 1] + 1
  mask = segments > 0 if loss_mask is None else np.asarray(loss_mask)
  return {
    "tokens": jnp.asarray(tokens),
    "segment_ids": jnp.asarray(segments),
    "positions": jnp.asarray(positions),
    "loss_mask": jnp.asarray(mask, jnp.float32),
  }


def random_batch(rng, rows=2, length=17, vocab=VOCAB):
  return batch_of(np.random.default_rng(rng).integers(0, vocab, (rows, length)))


def greedy_text(target: Target, prompt, length):
  """The target's own greedy continuation, one forward pass a token over a fixed buffer."""
  tokens = np.zeros((1, length), np.int32)
  tokens[0, : len(prompt)] = prompt

  @jax.jit
  def next_token(tokens, position):
    logits = target.model.apply({"params": target.params}, tokens).logits
    return jnp.argmax(logits[0, position])

  for t in range(len(prompt), length):
    tokens[0, t] = next_token(tokens, t - 1)
  return tokens[0]


def overfit_batch(text, prompt=8):
  """One sequence; the prompt, which the target did not write, is no label."""
  return batch_of([text], loss_mask=[[0] * prompt + [1] * (len(text) - prompt)])


def train(drafter, target: Target, batches, steps, learning_rate=1e-2, seed=0, schedule=True):
  """Adam on the drafter's loss; ``batches`` is one batch or a function of the step."""
  params = init(drafter, target, seed)
  rate = optax.cosine_decay_schedule(learning_rate, steps, 0.05) if schedule else learning_rate
  optimizer = optax.adam(rate)
  fixed = None if callable(batches) else batches

  @jax.jit
  def step(params, state, batch, output, rng):
    def loss(params):
      return drafter.loss(params, target, output, batch, rng)

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, metrics

  state, output = optimizer.init(params), None
  for i in range(steps):
    batch = fixed if fixed is not None else batches(i)
    if output is None or fixed is None:
      output = run(target, batch, drafter.capture)
    params, state, metrics = step(params, state, batch, output, jax.random.key(i))
  return params, metrics


def randomized(params, seed=0, scale=0.3):
  """Parameters with every zero-initialised tensor made non-trivial."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    tree,
    [x + scale * x.shape[0] ** -0.5 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)],
  )


def replace(drafter, **fields):
  return dataclasses.replace(drafter, **fields)
