# SPDX-License-Identifier: Apache-2.0
"""Token Recycling: the target's own runner-up tokens, kept in a table, are the drafts.

Source: "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
Recycling" (arXiv 2408.08696). State: ``table[v]`` = the k likeliest successors of token v where the
target last met it. Drafting unrolls the table into a static tree, one gather per level; every node
of a verify pass, accepted or not, then overwrites its token's row:

  table[tokens[i]] = top_k(logits[i])        (the last node wins where a token occurs twice)

The table outlives a prompt: pass ``Generation.drafter_state`` to the next call.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxdec.drafting.selection import top_k
from jaxdec.drafting.source import Candidates, Source
from jaxdec.drafting.static_tree import Path, StaticTree
from jaxdec.errors import UserError

UNKNOWN = -1  # table entry of a token the target has not met
_CHUNK = 64  # prompt positions whose logits exist at once when learning from the prompt

# The released tree "2.2.2": number of children of each node that has any.
_CHILDREN: dict[Path, int] = {
  (): 8,
  # depth 1: (0,) .. (7,)
  **{(r,): n for r, n in enumerate((8, 4, 3, 2, 1, 1, 1, 1))},
  # depth 2
  **{(0, r): n for r, n in enumerate((8, 3, 2, 1, 1, 1, 1, 1))},
  (1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1,
  # depth 3
  (0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1,
  (0, 1, 0): 1, (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1,
  # depth 4
  (0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1,
  (1, 0, 0, 0): 1,
  # depth 5
  (0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1,
}  # fmt: skip
# Weight of a rank where nodes compete. A prior, not a measurement: a step down in rank
# costs about what a step down in depth does. Measure and pass ``tree=greedy_tree(...)`` instead.
_RANK_WEIGHT = (0.5, 0.2, 0.12, 0.08, 0.06, 0.05, 0.04, 0.03)


def template(num_nodes: int = 81) -> StaticTree:
  """The released tree (81 nodes, root included), or its ``num_nodes`` likeliest nodes."""
  paths = [(*path, r) for path, n in _CHILDREN.items() for r in range(n)]
  # Every path weighs less than its parent, so the heaviest ones are closed under parents.
  paths.sort(key=lambda p: (-_weight(p), len(p), p))
  return StaticTree.from_paths(paths[: num_nodes - 1])


def _weight(path: Path) -> float:
  return math.prod(_RANK_WEIGHT[min(r, len(_RANK_WEIGHT) - 1)] for r in path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRecycling(Source):
  """Attributes:

  size: nodes of the sub-template, root included (16, 32, 64, 81: the whole template).
  tree: any static tree instead.
  k: successors kept per token; None: as many as the tree uses.
  learn_prompt: fill the table from the prompt's logits too (one LM-head pass over the prompt); the
    release doesn't, so its first tokens are drafted from an empty table.
  """

  size: int = 16
  tree: StaticTree | None = None
  k: int | None = None
  learn_prompt: bool = False

  name: ClassVar[str] = "token_recycling"

  def __post_init__(self):
    if self.tree is None and not 2 <= self.size <= 81:
      raise UserError(f"token_recycling has trees of 2 to 81 nodes, got size={self.size}")
    if self.k is not None and self.k < self.shape.max_rank:
      raise UserError(
        f"token_recycling needs k >= {self.shape.max_rank} for this tree, got {self.k}"
      )

  @property
  def shape(self) -> StaticTree:
    return self.tree if self.tree is not None else template(self.size)

  @property
  def width(self) -> int:
    """Successors kept per token."""
    return self.k if self.k is not None else self.shape.max_rank

  @property
  def num_nodes(self) -> int:
    return self.shape.num_nodes

  @property
  def max_depth(self) -> int:
    return self.shape.max_depth

  @property
  def num_candidates(self) -> int:
    return self.shape.branches.shape[0]

  @property
  def needs_prompt_hidden(self) -> bool:
    return self.learn_prompt

  def start(self, params, state, prompt, output, target):
    """An empty table, unless a warm one is passed; learns the prompt where asked to."""
    vocab = target.model.config.vocab_size
    table = state
    if isinstance(state, tuple):
      table = jnp.full((vocab, self.width), UNKNOWN, jnp.int32)
    elif state.shape != (vocab, self.width):
      raise UserError(
        f"the drafter_state is a table of {state.shape[0]} tokens x {state.shape[1]} "
        f"successors, this target and tree need {vocab} x {self.width}"
      )
    if not self.learn_prompt:
      return table
    hidden, length = output.hidden, output.hidden.shape[1]

    def learn(table, at):
      piece = jax.lax.dynamic_slice_in_dim(hidden, at, chunk, axis=1)
      tokens = jax.lax.dynamic_slice_in_dim(prompt.tokens, at, chunk, axis=1)
      logits = target.model.apply({"params": target.params}, piece, method="unembed")
      known = at + jnp.arange(chunk) < prompt.lengths[:, None]
      return recycle(table, tokens, logits, known), None

    chunk = min(_CHUNK, length)
    # The last chunk is moved back to end with the text; what it repeats changes nothing.
    starts = jnp.minimum(jnp.arange(0, length, chunk), length - chunk)
    return jax.lax.scan(learn, table, starts)[0]

  def candidates(self, params, state, context, rng):
    """The branches of the tree; a node's weight is the product of its ranks' weights."""
    tree, _ = self.propose(params, state, context, rng)
    shape = self.shape
    weight = jnp.asarray([0.0, *map(_weight, shape.paths)], jnp.float32)
    nodes = shape.branches  # padded with the root, which is no draft
    return Candidates(
      tree.tokens[:, nodes],
      tree.valid[:, nodes] & (nodes > 0),
      jnp.broadcast_to(weight[nodes], (context.root.shape[0], *nodes.shape)),
    )

  def propose(self, params, state, context, rng):
    """What merging the candidates gives, without merging: equal siblings don't occur."""
    shape = self.shape
    tokens = context.root[:, None]
    for nodes in shape.levels:  # slots are ordered by depth: the parents are there already
      above = tokens[:, shape.parent[nodes]]
      drawn = state[jnp.maximum(above, 0), shape.rank[nodes][None]]
      tokens = jnp.concatenate([tokens, jnp.where(above >= 0, drawn, UNKNOWN)], axis=1)
    return shape.tree(jnp.maximum(tokens, 0), tokens >= 0), state

  def observe(self, params, state, tree, accepted, output, context):
    return recycle(state, tree.tokens, output.logits, tree.valid & (accepted.count > 0)[:, None])


def recycle(
  table: Int[Array, "V k"], tokens: Int[Array, "B M"], logits: Array, known: Bool[Array, "B M"]
) -> Int[Array, "V k"]:
  """Overwrites the rows of the ``known`` tokens with the top-k of their logits, last node first.

  A scatter with repeated indices has no defined order, so all but the last occurrence are dropped.
  """
  _, best = top_k(logits, table.shape[1])
  flat, ok = tokens.reshape(-1), known.reshape(-1)
  index = jnp.arange(flat.shape[0])
  later = (flat[:, None] == flat[None]) & ok[None] & (index[None] > index[:, None])
  row = jnp.where(ok & ~jnp.any(later, axis=1), flat, table.shape[0])
  return table.at[row].set(best.reshape(-1, table.shape[1]).astype(table.dtype), mode="drop")
