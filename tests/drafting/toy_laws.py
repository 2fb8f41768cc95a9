# SPDX-License-Identifier: Apache-2.0
"""Made-up target and draft laws of three and two tokens, and trees drawn and judged by them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.decoding.sampling import Sampler, request_keys
from jaxdec.drafting.base import Context
from tests.decoding.targets import target

V = 4
PLAIN = Sampler(temperature=1.0)
MODEL = target(vocab=V)[0]  # what drafters are built around; these laws take its place


@functools.cache
def laws() -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  """Target laws of tokens 1, 2, 3 given those before, and draft laws of tokens 1, 2."""
  keys = jax.random.split(jax.random.key(23), 5)
  make = lambda key, *shape: jax.nn.softmax(jax.random.normal(key, shape) * 1.5)  # noqa: E731
  p = make(keys[0], V), make(keys[1], V, V), make(keys[2], V, V, V)
  return p, (make(keys[3], V), make(keys[4], V, V))


def context(keys, sampler=PLAIN, length: int = 8) -> Context:
  b = len(keys)
  return Context(
    root=jnp.zeros(b, jnp.int32),
    length=jnp.full(b, length, jnp.int32),
    history=None,
    target=None,
    sampler=sampler,
    keys=keys,
  )


def grow(drafter, q, keys, sampler=PLAIN):
  """A tree below a root whose children have the law ``q[0]``, and others ``q[1][parent token]``."""

  def feed(tokens, topology, n):
    return jnp.log(q[1])[tokens[:, -n:]]

  logits = jnp.broadcast_to(jnp.log(q[0]), (len(keys), V))
  return drafter.grow(context(keys, sampler), logits, feed)


@functools.partial(jax.jit, static_argnames="drafter")
def trees(drafter, q, keys):
  return grow(drafter, q, keys)


def drawn(drafter, rows: int = 200_000, seed: int = 3):
  """Many trees of the toy draft law."""
  return trees(drafter, laws()[1], request_keys(seed, rows))


@functools.partial(jax.jit, static_argnames=("drafter", "rule"))
def _three_tokens(drafter, rule, p, q, keys, rng):
  tree = grow(drafter, q, keys)
  rows = jnp.arange(len(keys))[:, None]
  above = tree.tokens[rows, tree.parent]
  at = lambda depth: (tree.depth == depth)[..., None]  # noqa: E731
  second, third = jnp.log(p[1])[tree.tokens], jnp.log(p[2])[above, tree.tokens]
  logits = jnp.where(at(0), jnp.log(p[0]), jnp.where(at(1), second, third))
  out = rule(tree, logits, PLAIN, keys, jnp.full(len(keys), 8))
  first, rng2 = out.tokens[:, 0], jax.random.split(rng)
  own = jax.random.categorical(rng2[0], jnp.log(p[1])[first])
  second = jnp.where(out.count > 1, out.tokens[:, 1], own)
  own = jax.random.categorical(rng2[1], jnp.log(p[2])[first, second])
  third = jnp.where(out.count > 2, out.tokens[:, -1], own)
  return (first * V + second) * V + third, out.count


def three_tokens(drafter: Any, rule: Any, rows: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
  """Counts of the V^3 texts that one verified block, completed by the target, begins with; and the
  number of tokens of every block."""
  p, q = laws()
  keys, rng = request_keys(11, rows), jax.random.key(5)
  text, count = _three_tokens(drafter, rule, p, q, keys, rng)
  return np.bincount(np.asarray(text), minlength=V**3), np.asarray(count)


def text_law() -> np.ndarray:
  p = laws()[0]
  return np.asarray(p[0][:, None, None] * p[1][..., None] * p[2], np.float64).ravel()
