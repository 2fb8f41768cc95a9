# SPDX-License-Identifier: Apache-2.0
"""Adaptive draft-verification: a tri-gram table, corrected by what is emitted, grows the tree.

Source: "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (ADED, arXiv
2407.12021). ``weight[(u, v)][w]`` says how likely w is after u v. Drafting is a search for the most
probable continuations,

  value(w_1 .. w_d) = prod_i weight[(w_{i-2}, w_{i-1})][w_i] / sum_w weight[(w_{i-2}, w_{i-1})][w],

and every emitted tri-gram gains ``add``, up to ``cap``. Our decisions, where the paper and its code
leave them open or are sequential: the code's Monte-Carlo tree search visits prefixes nearly in
proportion to their prior, so we take the M - 1 most probable prefixes outright, level by level; a
tri-gram is added once, when it is emitted, where the code adds less but counts everything in a
window again each step. A table may begin with relative frequencies of a corpus
(``trigram_table``, as ``drafter_params``). It outlives a prompt: pass ``Generation.drafter_state``
to the next call. All rows share it.

The table is a hash table of fixed size: a context lives in one of ``PROBES`` slots; where all are
taken, the one of least total weight gives way. A slot keeps ``successors`` tokens, the lightest
gives way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.source import Candidates, Source
from jaxdec.errors import UserError

PROBES = 4
_EMPTY = -1


@struct.dataclass
class Trigrams:
  """``keys[s]``: the context in slot s, -1 where free; its successors and their weights."""

  keys: Int[Array, "H 2"]
  successors: Int[Array, "H K"]
  weight: Float[Array, "H K"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aded(Source):
  """Attributes:

  size: M, nodes of the tree, root included. depth: deepest node.
  slots: contexts the table holds. successors: kept of each.
  add, cap: what an emitted tri-gram gains, and the most it weighs.
  learn_prompt: add the prompt's tri-grams too.
  """

  size: int = 16
  depth: int = 4
  slots: int = 2**15
  successors: int = 12
  add: float = 0.25
  cap: float = 3.0
  learn_prompt: bool = True

  name: ClassVar[str] = "aded"

  def __post_init__(self):
    if self.size < 2 or min(self.depth, self.successors) < 1 or self.slots < PROBES:
      raise UserError(
        f"aded needs size >= 2, depth and successors >= 1 and slots >= {PROBES}, got {self}"
      )
    if not 0 < self.add <= self.cap:
      raise UserError(f"aded needs 0 < add <= cap, got add={self.add:g} and cap={self.cap:g}")

  @property
  def num_nodes(self) -> int:
    return self.size

  @property
  def max_depth(self) -> int:
    return self.depth

  @property
  def levels(self) -> tuple[int, ...]:
    """Prefixes kept of each length: the M - 1 best, which hold every node of the best tree."""
    sizes = [1]
    for _ in range(self.depth):
      sizes.append(min(self.size - 1, sizes[-1] * self.successors))
    return tuple(sizes[1:])

  @property
  def num_candidates(self) -> int:
    return sum(self.levels)

  def start(self, params, state, prompt, output, target):
    """The table of ``params``, else an empty one, unless a warm one is passed."""
    shape = (self.slots, self.successors)
    if not isinstance(state, Trigrams):
      state = params if params else empty_table(*shape)
    if state.weight.shape != shape:
      raise UserError(
        f"the table has {state.weight.shape[0]} slots of {state.weight.shape[1]} successors, this "
        f"drafter {self.slots} of {self.successors}"
      )
    if not self.learn_prompt:
      return state
    width = prompt.tokens.shape[1]

    def text(at):  # the root comes after the prompt
      token = prompt.tokens[:, jnp.minimum(at, width - 1)]
      return jnp.where(at == prompt.lengths, prompt.root, token)

    def learn(at, table):
      trigrams = jnp.stack([text(at - 2), text(at - 1), text(at)], axis=1)
      return self._learn(table, trigrams, at <= prompt.lengths)

    return jax.lax.fori_loop(2, jnp.max(prompt.lengths) + 1, learn, state)

  def observe(self, params, state, tree, accepted, output, context):
    before = jnp.take_along_axis(context.history, context.length[:, None] - 1, axis=1)
    text = jnp.concatenate([before, context.root[:, None], accepted.tokens], axis=1)
    trigrams = jnp.stack([text[:, :-2], text[:, 1:-1], text[:, 2:]], axis=-1)
    new = jnp.arange(trigrams.shape[1]) < accepted.count[:, None]
    return self._learn(state, trigrams.reshape(-1, 3), new.reshape(-1))

  def _learn(self, table: Trigrams, trigrams: Int[Array, "n 3"], new: Bool[Array, "n"]) -> Trigrams:
    """In order, one at a time: several may want one slot."""

    def one(i, table):
      return add_trigram(table, trigrams[i], jnp.where(new[i], self.add, 0.0), self.cap)

    return jax.lax.fori_loop(0, trigrams.shape[0], one, table)

  def candidates(self, params, state, context, rng):
    before = jnp.take_along_axis(context.history, context.length[:, None] - 1, axis=1)[:, 0]
    tokens, weight = jax.vmap(self._search, (None, 0, 0))(state, before, context.root)
    return Candidates(tokens, weight > 0, weight)

  def _search(self, table, before, root):
    """The most probable prefixes of each length, as rows of tokens and of values."""
    u, v, value = before[None], root[None], jnp.ones(1)
    tokens, values = jnp.zeros((1, self.depth), jnp.int32), jnp.zeros((1, self.depth))
    found = []
    for level, keep in enumerate(self.levels):
      successors, weight = jax.vmap(lookup, (None, 0, 0))(table, u, v)
      total = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-9)
      value, at = jax.lax.top_k((value[:, None] * weight / total).reshape(-1), keep)
      parent = at // self.successors
      u, v = v[parent], successors.reshape(-1)[at]
      tokens = tokens[parent].at[:, level].set(v)
      values = values[parent].at[:, level].set(value)
      found.append((tokens, jnp.where(value[:, None] > 0, values, 0.0)))
    tokens, values = zip(*found)
    return jnp.concatenate(tokens), jnp.concatenate(values)


def empty_table(slots: int, successors: int) -> Trigrams:
  """A table that knows nothing."""
  return Trigrams(
    jnp.full((slots, 2), _EMPTY, jnp.int32),
    jnp.full((slots, successors), _EMPTY, jnp.int32),
    jnp.zeros((slots, successors), jnp.float32),
  )


def _slots(u, v, slots: int):
  """Where the context u v may live, ``[..., PROBES]``."""
  mixed = u.astype(np.uint32) * np.uint32(0x9E3779B1) ^ v.astype(np.uint32) * np.uint32(0x85EBCA77)
  mixed = (mixed ^ mixed >> np.uint32(15)) * np.uint32(0x2C1B3C6D)
  first = (mixed ^ mixed >> np.uint32(13)) % np.uint32(slots)
  return (first[..., None] + np.arange(PROBES, dtype=np.uint32)) % np.uint32(slots)


def lookup(
  table: Trigrams, u: Int[Array, ""], v: Int[Array, ""]
) -> tuple[Int[Array, "K"], Float[Array, "K"]]:
  """Successors of u v and their weights; weight 0 where there is none."""
  slots = _slots(u, v, table.keys.shape[0])
  match = jnp.all(table.keys[slots] == jnp.stack([u, v]), axis=1)
  slot = slots[jnp.argmax(match)]
  return table.successors[slot], jnp.where(jnp.any(match), table.weight[slot], 0.0)


def add_trigram(
  table: Trigrams, trigram: Int[Array, "3"], add: Float[Array, ""], cap: float
) -> Trigrams:
  """``weight[(u, v)][w] = min(weight + add, cap)``; ``add`` 0 changes nothing."""
  u, v, w = trigram
  slots = _slots(u, v, table.keys.shape[0])
  match = jnp.all(table.keys[slots] == trigram[:2], axis=1)
  load = jnp.sum(table.weight[slots], axis=1)
  # The context's own slot, else the first free one, else the lightest.
  rank = jnp.where(match, -2.0, jnp.where(table.keys[slots, 0] == _EMPTY, -1.0, load))
  chosen = jnp.argmin(rank)
  slot, known = slots[chosen], match[chosen]
  successors = jnp.where(known, table.successors[slot], _EMPTY)
  weight = jnp.where(known, table.weight[slot], 0.0)
  hit = successors == w
  at = jnp.argmin(jnp.where(hit, -1.0, weight))
  gained = jnp.minimum(jnp.where(hit[at], weight[at], 0.0) + add, cap)
  slot = jnp.where(add > 0, slot, table.keys.shape[0])  # dropped
  return Trigrams(
    table.keys.at[slot].set(trigram[:2], mode="drop"),
    table.successors.at[slot].set(successors.at[at].set(w), mode="drop"),
    table.weight.at[slot].set(weight.at[at].set(gained), mode="drop"),
  )


def trigram_table(
  documents: Iterable[np.ndarray], slots: int = 2**15, successors: int = 12
) -> Trigrams:
  """Relative frequencies ``count(u v w) / count(u v)`` of a corpus, as ``drafter_params`` of Aded.

  The commonest contexts come first where slots are scarce, the others are left out.
  """
  parts = [
    np.stack([d[:-2], d[1:-1], d[2:]], axis=1)
    for d in (np.asarray(document, np.int64) for document in documents)
    if len(d) > 2
  ]
  if not parts:
    raise UserError("the corpus holds no three tokens in a row; give files with some text")
  trigrams, counts = np.unique(np.concatenate(parts), axis=0, return_counts=True)
  contexts, owner = np.unique(trigrams[:, :2], axis=0, return_inverse=True)
  owner = owner.reshape(-1)
  totals = np.bincount(owner, counts)
  order = np.lexsort((np.arange(len(owner)), -counts, owner))  # of each context the commonest first
  begins = np.searchsorted(owner[order], np.arange(len(contexts)))
  rank = np.arange(len(owner)) - begins[owner[order]]
  order, rank = order[rank < successors], rank[rank < successors]

  keys = np.full((slots, 2), _EMPTY, np.int32)
  place = np.full(len(contexts), _EMPTY, np.int64)
  homes = _slots(contexts[:, 0].astype(np.int32), contexts[:, 1].astype(np.int32), slots)
  common = np.argsort(-totals, kind="stable")
  for probe in range(PROBES):
    waiting = common[place[common] == _EMPTY]
    wanted = homes[waiting, probe].astype(np.int64)
    free = keys[wanted, 0] == _EMPTY
    taken, first = np.unique(wanted[free], return_index=True)
    winners = waiting[free][first]
    keys[taken], place[winners] = contexts[winners], taken
  table = np.full((slots, successors), _EMPTY, np.int32), np.zeros((slots, successors), np.float32)
  kept = place[owner[order]] != _EMPTY
  order, rank = order[kept], rank[kept]
  at = place[owner[order]], rank
  table[0][at] = trigrams[order, 2]
  table[1][at] = counts[order] / totals[owner[order]]
  return Trigrams(*map(jnp.asarray, (keys, *table)))
