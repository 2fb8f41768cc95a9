# SPDX-License-Identifier: Apache-2.0
"""Parallel Prompt Decoding (arXiv 2405.18628): trained prompt tokens make the target look ahead.

  probe (i, e) behind slot t = the embedding P[i, e], at position t + i
  logits of depth i = mean_e W_lm norm(h of probe (i, e))       guesses x_{t+1+i}

for i = 1..n and E ensemble members e; member e sees the members e of smaller i, not its siblings.
The embeddings, ``n E D`` numbers, are all that is trained. By default every node carries all n
prompts; ``sparse`` trees (``jaxdec.drafting.ppd_tree``) put fewer behind nodes that are rarely the
last accepted, and the next tree is as deep as the prompts of the accepted node reach.

Decided here: prompts start as the embeddings of random tokens (the paper starts them from a text);
the target's law along the text is learned, which is the paper's loss where the text is the target's
own continuation; several random places of a text are learned from at once, since groups don't see
each other.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxdec.drafting.base import Context, Params, Target
from jaxdec.drafting.objectives import Objective
from jaxdec.drafting.ppd_tree import SparseTrees, choose_rows
from jaxdec.drafting.probes import ProbeDrafter, ProbedTree, Probes
from jaxdec.drafting.selection import top_k
from jaxdec.drafting.trained import embed
from jaxdec.errors import UserError
from jaxdec.mixers.base import Topology
from jaxdec.models.decoder import DecoderState


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPD(ProbeDrafter):
  """Parallel Prompt Decoding.

  Attributes:
    num_heads: n, prompt tokens in a row. ensemble: E, members of each.
    sparse: one tree for each number of prompts that the last accepted node had; None: ``tree``, all
      prompts behind every node.
  """

  name: ClassVar[str] = "ppd"

  num_heads: int = 3
  ensemble: int = 1
  objective: Objective = "kl"
  depth_decay: float = 0.8
  sparse: SparseTrees | None = None

  def __post_init__(self):
    if self.ensemble < 1:
      raise UserError(f"ensemble must be at least 1, got {self.ensemble}")
    if self.sparse is not None and len(self.sparse.trees) != self.num_heads:
      raise UserError(
        f"sparse has trees for up to {len(self.sparse.trees)} prompts, but the drafter has "
        f"{self.num_heads}; build them with num_prompts={self.num_heads}"
      )
    super().__post_init__()

  @property
  def members(self) -> int:
    return self.ensemble

  @property
  def num_nodes(self) -> int:
    return super().num_nodes if self.sparse is None else self.sparse.num_nodes

  @property
  def max_depth(self) -> int:
    return super().max_depth if self.sparse is None else self.sparse.max_depth

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    tokens = jax.random.randint(rng, (self.num_heads, self.ensemble), 0, self.vocab_size)
    prompts = embed(target, tokens, "float32")
    return {"prompts": nn.LogicallyPartitioned(prompts, (None, None, "embed"))}

  def rows(self, params, layer, x, probes: Probes, before):
    if layer:
      return None
    return params["prompts"][probes.offset - 1, jnp.minimum(probes.member, self.ensemble - 1)]

  def propose(self, params, state, context: Context, rng):
    if self.sparse is None:
      return super().propose(params, state, context, rng)
    tables = self.sparse.tables(self.ensemble)
    ranked = self._ranked(params, state, context, int(tables["rank"].max()) + 1)
    t = jax.tree.map(lambda x: jnp.asarray(x)[state.available - 1], tables)
    rows = jnp.arange(context.root.shape[0])[:, None]
    drafted = ranked[rows, jnp.maximum(t["depth"] - 1, 0), t["rank"]]
    tree = ProbedTree(
      tokens=jnp.where(t["depth"] == 0, context.root[:, None], drafted).astype(jnp.int32),
      parent=t["parent"],
      depth=t["depth"],
      valid=t["valid"],
      max_depth=self.max_depth,
      probes=Probes(t["anchor"], t["offset"], t["member"]),
    )
    return tree, state

  def _ranked(self, params, state, context: Context, width: int) -> Int[Array, "B n R"]:
    """The best tokens of every depth."""
    logits = self.head(params, context.target, 1, state.hidden)
    noise = self._noise(context)
    if noise is not None:
      levels = range(self.num_heads)
      logits = jnp.concatenate([noise(logits[:, i : i + 1], i) for i in levels], axis=1)
    return top_k(logits, width)[1]

  def with_budget(self, accuracy: np.ndarray, rows: int) -> PPD:
    """The drafter with the sparse trees that suit measured accuracies, ``rows`` rows a pass."""
    trees = SparseTrees.build(accuracy, rows, self.num_heads, self.ensemble)
    return dataclasses.replace(self, sparse=trees)

  def tuned(
    self, accuracy: np.ndarray, budgets: Iterable[int], latency: Callable[[int], float]
  ) -> PPD:
    """The drafter with the trees of the largest tokens per second among budgets of rows a pass.

    ``latency``: seconds of a pass by its rows, see ``measured_latency``."""
    trees = choose_rows(accuracy, budgets, latency, self.num_heads, self.ensemble)[1]
    return dataclasses.replace(self, sparse=trees)


def measured_latency(
  target: Target, *, batch: int = 1, length: int = 256, repeats: int = 10
) -> Callable[[int], float]:
  """A function of the number of rows: the median time in seconds of a verify pass on this machine.

  Args:
    length: tokens in the target's state.
  """

  @jax.jit
  def verify(params, tokens, state, nodes):
    out = target.model.apply({"params": params}, tokens, state, nodes, method="verify")
    return out.logits, out.pending

  @functools.cache
  def latency(rows: int) -> float:
    state = target.model.init_state(batch, length + rows)
    full = jnp.full(batch, length, jnp.int32)
    state = DecoderState(tuple(layer.replace(length=full) for layer in state.layers))
    tokens = jnp.zeros((batch, rows), jnp.int32)
    chain = jnp.tril(jnp.ones((rows, rows), bool))
    nodes = Topology(
      jnp.broadcast_to(jnp.arange(rows), tokens.shape),
      jnp.broadcast_to(chain, (batch, rows, rows)),
    )
    jax.block_until_ready(verify(target.params, tokens, state, nodes))
    times = []
    for _ in range(repeats):
      begin = time.perf_counter()
      jax.block_until_ready(verify(target.params, tokens, state, nodes))
      times.append(time.perf_counter() - begin)
    return statistics.median(times)

  return latency
