# SPDX-License-Identifier: Apache-2.0
"""Trees drawn from the law of a draft model, level by level.

At every node of a level the children are drawn in order and without replacement: the K largest of
``log q + Gumbel``, largest first (Gumbel-top-k, arXiv 1903.06059). Which of the draws become nodes
is what methods differ in; rule ``without_replacement`` keeps the target's law as long as that is
decided for each draw without a look at its token. Rules ``match`` and ``point_mass`` take any tree.

The draft model reads all nodes so far in each of its D - 1 passes below the root, so its state is
the text and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.draft_model import DraftDecoder
from jaxdec.drafting.selection import top_k
from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError
from jaxdec.mixers.base import Topology, gather_nodes

Feed = Callable[[Array, Topology, int], Array]


@struct.dataclass
class Draws:
  """K ordered draws at each of the n nodes of a level.

  ``log_q``: of the drawn tokens. ``perturbed``: ``log q`` plus the noise, non-increasing in K; -inf
  where the law has fewer tokens.
  """

  tokens: Int[Array, "B n K"]
  log_q: Float[Array, "B n K"]
  perturbed: Float[Array, "B n K"]


@struct.dataclass
class Kept:
  """Draws that become nodes, in the order of their ids: for siblings the order of the draws.

  ``index``: into the n K draws of the level, ``node * K + k``. ``ok``: unset in unused slots.
  ``carry``: what the next level is told.
  """

  index: Int[Array, "B m"]
  ok: Bool[Array, "B m"]
  carry: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledTree(DraftDecoder):
  """Base. A subclass says how many draws are made (``fan``) and which are kept (``keep``)."""

  depth: int = 4

  def __post_init__(self):
    super().__post_init__()
    if self.depth < 1:
      raise UserError(f"drafter {self.name!r} needs depth >= 1, got {self.depth}")

  @property
  def max_depth(self) -> int:
    return self.depth

  @property
  def distinct_siblings(self) -> bool:
    """Whether siblings are drawn without replacement, which rule ``multi_round`` can't judge."""
    return True

  def fan(self, level: int) -> int:
    """Draws at each node whose children have depth ``level``."""
    raise NotImplementedError

  def keep(self, level: int, draws: Draws, carry: Any) -> Kept:
    """The nodes of depth ``level``; ``carry`` is None at the first."""
    raise NotImplementedError

  def inner(self, level: int) -> np.ndarray | None:
    """Which nodes of a level may have children, by their number in it; None: all."""
    return None

  def select(self, tree: Tree, carry: Any) -> Tree:
    """The last word on a finished tree."""
    return tree

  def propose(self, params, state, context, rng):
    decoder, logits = self._catch_up(params, state, context)

    def feed(tokens, topology, n):
      out = self.model.apply(
        {"params": params}, tokens, decoder, topology, method="verify", logits=False
      )
      return self._unembed(params, out.hidden[:, -n:])

    return self.grow(context, logits, feed), self._forget(state, context, decoder)

  def grow(self, context, logits: Float[Array, "B V"], feed: Feed) -> Tree:
    """The tree below ``context.root``.

    Args:
      logits: the draft model's after the root.
      feed: ``(tokens [B,N], topology, n) -> logits [B,n,V]`` after the last n of N nodes below the
        root, which are at depth 0 of the topology where they are its children.
    """
    b = context.root.shape[0]
    column = lambda value, dtype: jnp.full((b, 1), value, dtype)  # noqa: E731
    tokens, parents, depths = [context.root[:, None]], [column(0, jnp.int32)], [np.zeros(1, int)]
    valid, laws, carry, size = [column(True, bool)], [], None, 1
    # The nodes read last: their slots, whether they exist, their lines of ancestors.
    slots, exist, lines = column(0, jnp.int32), column(True, bool), jnp.zeros((b, 1, 0), bool)
    read, read_depths, ancestors = [], [], jnp.zeros((b, 0, 0), bool)
    for level in range(1, self.depth + 1):
      log_q = self.law(context.sampler, logits if level > 1 else logits[:, None])
      draws = self.draw(context, log_q, level)
      kept = self.keep(level, draws, carry)
      carry, k, m = kept.carry, draws.tokens.shape[-1], kept.index.shape[1]
      pick = lambda x: jnp.take_along_axis(x.reshape(b, -1), kept.index, axis=1)  # noqa: B023, E731
      above = kept.index // k
      ok = kept.ok & (pick(draws.perturbed) > -jnp.inf) & jnp.take_along_axis(exist, above, axis=1)
      token = jnp.where(ok, pick(draws.tokens), 0)
      tokens.append(token)
      parents.append(jnp.take_along_axis(slots, above, axis=1))
      depths.append(np.full(m, level))
      valid.append(ok)
      if self.gives_draft_probs and not context.sampler.greedy:
        laws.append(gather_nodes(jnp.exp(log_q), above))
      if level < self.depth:
        inner = self.inner(level)
        inner = np.arange(m) if inner is None else inner
        slots = jnp.broadcast_to(size + jnp.asarray(inner, jnp.int32), (b, len(inner)))
        exist, above, n = ok[:, inner], above[:, inner], len(inner)
        lines = jnp.concatenate(
          [gather_nodes(lines, above), jnp.broadcast_to(jnp.eye(n, dtype=bool), (b, n, n))], axis=-1
        )
        ancestors = jnp.pad(ancestors, ((0, 0), (0, 0), (0, n)))
        ancestors = jnp.concatenate([ancestors, lines], axis=1)
        read.append(token[:, inner])
        read_depths.append(np.full(n, level - 1))
        depth = jnp.asarray(np.concatenate(read_depths), jnp.int32)
        topology = Topology(jnp.broadcast_to(depth, (b, len(depth))), ancestors)
        logits = feed(jnp.concatenate(read, axis=1), topology, n)
      size += m
    probs = None
    if laws:
      probs = jnp.concatenate([jnp.zeros_like(laws[0][:, :1]), *laws], axis=1)
    tree = Tree(
      tokens=jnp.concatenate(tokens, axis=1).astype(jnp.int32),
      parent=jnp.concatenate(parents, axis=1).astype(jnp.int32),
      depth=jnp.broadcast_to(jnp.asarray(np.concatenate(depths), jnp.int32), (b, size)),
      valid=jnp.concatenate(valid, axis=1),
      max_depth=self.depth,
      draft_probs=probs,
    )
    return self.select(tree, carry)

  def law(self, sampler, logits: Float[Array, "B n V"]) -> Float[Array, "B n V"]:
    """``log q``; where decoding is greedy, of the law at temperature 1, to rank tokens by."""
    logits = logits.astype(jnp.float32) if sampler.greedy else sampler.process(logits)
    return jax.nn.log_softmax(logits, axis=-1)

  def draw(self, context, log_q: Float[Array, "B n V"], level: int) -> Draws:
    """Ordered draws without replacement; the likeliest tokens where draws are greedy."""
    vocab, k = log_q.shape[-1], self.fan(level)
    if k > vocab:
      raise UserError(f"{self.name} draws {k} children of a node, from a vocabulary of {vocab}")
    perturbed = log_q
    if not (context.sampler.greedy or self.draws == "greedy"):
      if self.draws == "shared":
        noise = context.sampler.noise(context.keys, context.length + level, vocab)[:, None]
      else:
        noise = self.noise(context, level, log_q.shape[1], vocab)
      perturbed = log_q + noise
    perturbed, tokens = top_k(perturbed, k)
    tokens = jnp.minimum(tokens, vocab - 1)  # of tokens there aren't, perturbed = -inf
    return Draws(tokens, jnp.take_along_axis(log_q, tokens, axis=-1), perturbed)

  def noise(self, context, level: int, count: int, size: int) -> Float[Array, "B n V"]:
    """Gumbel noise of the drafts' own, by (position of the root, level, number).

    No two steps share noise: what a step decided by its draws says nothing about later ones.
    """
    from jaxdec.decoding.sampling import DRAFT, gumbel, position_keys  # which imports this package

    keys = position_keys(context.keys, context.length, DRAFT)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, level)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(count))
    return gumbel(keys, size)
