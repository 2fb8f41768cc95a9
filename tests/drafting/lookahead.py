# SPDX-License-Identifier: Apache-2.0
"""A target that is able to look ahead: it counts, and goes on counting over tokens it can't see.

A text counts up, ``x_{t+1} = x_t + s`` modulo V - 1, in steps of s = 1, 2 or 5. The target has
learned to predict it, and with ``hidden > 0`` to do so where that share of the tokens is replaced
by a blank, the last one of the vocabulary. Then one embedding is known, the blank's, that makes it
say what comes two places on: what a drafter that rides in its pass may find.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from toy_target import VOCAB, batch_of, run, target

from jaxdec.drafting.base import Target
from jaxdec.drafting.losses import cross_entropy

BLANK, LENGTH = VOCAB - 1, 24
KNOWN = 3  # tokens that tell the step and are never hidden


def counting(seed, rows=8):
  """A batch of texts; labels begin behind the tokens that tell the step."""
  return batch_of(_texts(np.random.default_rng(seed), rows), loss_mask=_labels(rows))


@functools.cache
def counting_target(hidden: float, steps: int = 400) -> Target:
  t = target(seed=1)
  optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
  rng = np.random.default_rng(0)
  texts = jnp.asarray(np.stack([_texts(rng, 16) for _ in range(steps)]), jnp.int32)

  @jax.jit
  def fit(params, texts, keys):
    def loss(params, text, key):
      blank = jax.random.bernoulli(key, hidden, text.shape) & (jnp.arange(LENGTH) >= KNOWN)
      logits = t.model.apply({"params": params}, jnp.where(blank, BLANK, text)).logits
      return jnp.mean(cross_entropy(logits[:, KNOWN - 1 : -1], text[:, KNOWN:]))

    def step(carry, drawn):
      params, state = carry
      updates, state = optimizer.update(jax.grad(loss)(params, *drawn), state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), (texts, keys))[0][0]

  params = fit(t.params, texts, jax.random.split(jax.random.key(0), steps))
  return Target(t.model, params, None)


def accuracy(drafter, params, t: Target) -> np.ndarray:
  """By depth, on texts not trained on: is the target's best token the drafter's?"""
  batch = counting(99, rows=16)
  metrics = jax.jit(lambda p, o: drafter.loss(p, t, o, batch, None)[1])
  return np.asarray(metrics(params, run(t, batch, drafter.capture))["top1"])


def _texts(rng, rows):
  first, step = rng.integers(0, BLANK, (rows, 1)), rng.choice([1, 2, 5], (rows, 1))
  return (first + step * np.arange(LENGTH)) % BLANK


def _labels(rows):
  return np.tile(np.arange(LENGTH) > KNOWN, (rows, 1))
