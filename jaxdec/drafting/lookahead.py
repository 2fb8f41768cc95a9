# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding (arXiv 2402.02057): n-grams out of Jacobi iterations, kept and verified.

The window holds N - 1 levels of W guesses, ``w[r, c]`` for position ``length + r + c``; ``w[0, 0]``
is the root. A guess sees level 0 up to its column and its own column's earlier levels:

  (0, 0) .. (0, c), (1, c) .. (r, c)                           a path of a tree of probe nodes

The argmax at the last level is the next one, ``w[N-1]``. Each column is an n-gram: the pool files
``w[1..N-1, c]`` under the key ``w[0, c]``, at most G a key, the oldest making room. Then the levels
move up by one. In the same pass up to G pooled n-grams of the root's key are verified, ordinary
nodes merged into one tree: ``(N-1) (W+G)`` rows in all.

Decided here: the levels start as tokens of the text at random, and nothing is filed before all of
them come from the model (pass N - 1); one column a pass is left behind however many tokens were
accepted, as the authors' code does (``realign``: one for each token); every row has a pool of its
own, and one pool row serves the tokens of equal remainder, the last one taking it over; a stop
token ends a column. The window is greedy at every temperature: its n-grams are used elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxdec.drafting.base import Drafter
from jaxdec.drafting.jacobi import UNKNOWN, later, text_tokens
from jaxdec.drafting.merge import merge_paths
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.tree import Tree, chain
from jaxdec.errors import UserError
from jaxdec.mixers.base import Topology, ancestors_from_parents


@struct.dataclass
class Pool:
  """N-grams by their first token, modulo R.

  Attributes:
    key: which token holds the row. age: when an n-gram was filed last, 0: never; clock: the latest.
  """

  grams: Int[Array, "B R G L"]
  key: Int[Array, "B R"]
  age: Int[Array, "B R G"]
  clock: Int[Array, "B"]


@struct.dataclass
class LookaheadState:
  """``window[b, r, c]``, and how many passes have filled it."""

  window: Int[Array, "B L W"]
  passes: Int[Array, "B"]
  pool: Pool


@struct.dataclass
class WindowedTree(Tree):
  """Nodes that may be accepted, then the window, whose probes reach ``reach`` deep."""

  reach: int = struct.field(pytree_node=False, default=0)

  @property
  def topology(self) -> Topology:
    return Topology(self.depth, ancestors_from_parents(self.parent, self.reach))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookahead(Drafter):
  """Attributes:

  window: W, columns. ngram: N. guesses: G, n-grams kept a key and verified a pass; 0: none, which
    is plain decoding at a higher price.
  num_drafts: nodes the guesses are merged into; None: ``G (N - 1)``, room for all.
  pool_rows: R; None: one for each token of the vocabulary, up to 2 ** 14.
  from_prompt: file the prompt's n-grams too.
  realign: keep the window's columns at the text's positions.
  """

  window: int = 7
  ngram: int = 5
  guesses: int = 7
  num_drafts: int | None = None
  pool_rows: int | None = None
  from_prompt: bool = True
  realign: bool = False

  name: ClassVar[str] = "lookahead"

  def __post_init__(self):
    bad = self.window < 1 or self.ngram < 2 or self.guesses < 0
    if bad or self._drafts < min(self.guesses, 1) or (self.pool_rows or 1) < 1:
      raise UserError(
        "lookahead needs window >= 1, ngram >= 2, guesses >= 0, num_drafts >= 1 and pool_rows >= 1,"
        f" got {self}"
      )

  @property
  def levels(self) -> int:
    """L = N - 1: levels of the window, and tokens behind a key."""
    return self.ngram - 1

  @property
  def _drafts(self) -> int:
    most = self.guesses * self.levels
    return most if self.num_drafts is None else min(self.num_drafts, most)

  @property
  def num_nodes(self) -> int:
    return self._drafts + self.levels * self.window

  @property
  def max_depth(self) -> int:
    return self.levels if self.guesses else 0

  @functools.cached_property
  def slots(self) -> np.ndarray:
    """``[L, W]`` node ids of the window; the root is 0, the drafts come before the others."""
    flat = np.arange(self.levels * self.window)
    return np.where(flat > 0, self._drafts + flat, 0).reshape(self.levels, self.window)

  def init_state(self, batch, capacity):
    return ()

  def start(self, params, state, prompt, output, target):
    batch, vocab = prompt.root.shape[0], target.model.config.vocab_size
    rows = min(self.pool_rows or 2**14, vocab)
    pool = Pool(
      jnp.zeros((batch, rows, self.guesses, self.levels), jnp.int32),
      jnp.full((batch, rows), UNKNOWN, jnp.int32),
      jnp.zeros((batch, rows, self.guesses), jnp.int32),
      jnp.zeros(batch, jnp.int32),
    )
    if self.from_prompt and self.guesses:

      def learn(i, pool):
        text = jax.lax.dynamic_slice_in_dim(prompt.tokens, i, self.ngram, axis=1)
        return filed(pool, text[:, 0], text[:, 1:], i + self.levels < prompt.lengths)

      last = jnp.minimum(jnp.max(prompt.lengths), prompt.tokens.shape[1]) - self.levels
      pool = jax.lax.fori_loop(0, jnp.maximum(last, 0), learn, pool)
    window = jnp.full((batch, self.levels, self.window), UNKNOWN, jnp.int32)
    return LookaheadState(window, jnp.zeros(batch, jnp.int32), pool)

  def propose(self, params, state, context, rng):
    batch = context.root.shape[0]
    random = text_tokens(context, self.levels * self.window).reshape(state.window.shape)
    window = jnp.where(state.window == UNKNOWN, random, state.window)
    window = window.at[:, 0, 0].set(context.root)
    drafts = chain(context.root, jnp.zeros((batch, 0), jnp.int32))
    if self.guesses:
      tokens, weight = pooled(state.pool, context.root)
      valid = jnp.broadcast_to(weight[..., None] > 0, tokens.shape)
      drafts = merge_paths(context.root, tokens, valid, weight, self._drafts + 1)
    r, c = np.divmod(np.arange(1, self.slots.size), self.window)
    above = np.where(r > 0, self.slots[r - 1, c], self.slots[0, c - 1])
    probes = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, r.size))  # noqa: E731
    join = lambda x, y: jnp.concatenate([x, y], axis=1)  # noqa: E731
    tree = WindowedTree(
      tokens=join(drafts.tokens, window.reshape(batch, -1)[:, 1:]),
      parent=join(drafts.parent, probes(above)),
      depth=join(drafts.depth, probes(r + c)),
      valid=join(drafts.valid, jnp.zeros((batch, r.size), bool)),
      max_depth=self.max_depth,
      reach=max(self.max_depth, self.levels + self.window - 2),
    )
    return tree, state

  def observe(self, params, state, tree, accepted, output, context):
    window, alive = tree.tokens[:, self.slots], accepted.count > 0
    new = argmax(output.logits[:, self.slots[-1]])
    stop = jnp.asarray(context.target.model.config.eos_ids or (UNKNOWN,))
    new = jnp.where(jnp.any(new[..., None] == stop, axis=-1), UNKNOWN, new)
    columns = jnp.concatenate([window, new[:, None]], axis=1)  # [B,N,W]
    pool = state.pool
    if self.guesses:
      ready = (alive & (state.passes >= self.levels - 1))[:, None] & (new != UNKNOWN)

      def learn(c, pool):
        return filed(pool, columns[:, 0, c], columns[:, 1:, c], ready[:, c])

      pool = jax.lax.fori_loop(0, self.window, learn, pool)
    moved = columns[:, 1:]
    if self.realign:
      by_column = jnp.swapaxes(moved, 1, 2)
      rest = later(by_column, jnp.maximum(accepted.count - 1, 0), self.window, UNKNOWN)
      moved = jnp.swapaxes(rest, 1, 2)
    moved = jnp.where(alive[:, None, None], moved, state.window)
    return LookaheadState(moved, state.passes + alive, pool)


def filed(pool: Pool, key: Int[Array, "B"], gram: Int[Array, "B L"], ok: Bool[Array, "B"]) -> Pool:
  """The pool with one more n-gram a row, where ``ok``: as the youngest of its key."""
  b, size = jnp.arange(key.shape[0]), pool.key.shape[1]
  row = key % size
  age = jnp.where((pool.key[b, row] == key)[:, None], pool.age[b, row], 0)
  same = (age > 0) & jnp.all(pool.grams[b, row] == gram[:, None], axis=-1)
  at = jnp.where(jnp.any(same, axis=1), jnp.argmax(same, axis=1), jnp.argmin(age, axis=1))
  clock = pool.clock + ok
  row = jnp.where(ok, row, size)  # out of bounds: dropped
  return Pool(
    pool.grams.at[b, row, at].set(gram, mode="drop"),
    pool.key.at[b, row].set(key, mode="drop"),
    pool.age.at[b, row].set(age.at[b, at].set(clock), mode="drop"),
    clock,
  )


def pooled(pool: Pool, key: Int[Array, "B"]) -> tuple[Int[Array, "B G L"], Array]:
  """The n-grams of a key, and weights that prefer younger ones; 0: no n-gram."""
  b, row = jnp.arange(key.shape[0]), key % pool.key.shape[1]
  age = jnp.where((pool.key[b, row] == key)[:, None], pool.age[b, row], 0)
  return pool.grams[b, row], age / jnp.maximum(pool.clock, 1)[:, None]
