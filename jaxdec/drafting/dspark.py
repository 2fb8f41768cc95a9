# SPDX-License-Identifier: Apache-2.0
"""DSpark (arXiv 2607.05147): DFlash's blocks, drafted with a look at the token before.

All slots of a block guess at once and can't agree on what to say. DSpark adds to the logits of slot
i, which come from its state h_i, a bias of rank r by the token drafted before (e = W_1[x_{i-1}];
the anchor's for slot 0): cheap enough to be drafted slot by slot.

  vanilla:  W_2 e
  gated:    W_2 (sigmoid(W_g [h_i; e] + b_g) * e)
  rnn:      W_2 tanh(o),  [g; c; o] = W [s_{i-1}; e; h_i] + b,
            s_i = sigmoid(g) s_{i-1} + (1 - sigmoid(g)) tanh(c)

A confidence head guesses how likely slot i's draft is to be accepted, ``sigmoid(w [h_i; e] + b)``,
and drafting is cut before the first slot whose confidence is under ``threshold``. It never reads
the token it would cut off, so the text keeps its law under every rule (``drafting/stopping.py``).

With rank 0, without confidence and on cross-entropy alone it is DFlash with ``from_anchor`` labels.
W_2 starts at zero, so that training starts there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxdec.drafting.base import Context, Params, Target
from jaxdec.drafting.dflash import DFlash, take_slots
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.drafting.objectives import Objective, Term, parse
from jaxdec.drafting.stopping import cut_tree, verify_widths
from jaxdec.errors import UserError


@struct.dataclass
class SparkStates:
  """What the head reads at a slot.

  Attributes:
    hidden: h_i. latent: what W_2 maps to the bias. embedded: e.
  """

  hidden: Float[Array, "*B D"]
  latent: Float[Array, "*B r"]
  embedded: Float[Array, "*B r"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSpark(DFlash):
  """DSpark.

  Attributes:
    rank: r; 0: no bias. markov: the kind of bias.
    objective: the published mixture, ``0.1 CE + 0.9 sum_v |q - p| + BCE``; without its
      ``confidence`` term there is no confidence head.
    threshold: least confidence a slot is drafted with; None drafts whole blocks.
    temperatures: by depth, confidences are ``sigmoid(logit / temperature)``; empty: 1. See
      ``jaxdec.drafting.stopping.fit_temperature``.
    widths: sizes of trees the target verifies; the smallest that holds what wasn't cut off is
      taken, at the price of one compiled pass each. Empty: always the whole tree.
  """

  name: ClassVar[str] = "dspark"

  labels: Literal["same_position", "from_anchor"] = "from_anchor"
  rank: int = 256
  markov: Literal["vanilla", "gated", "rnn"] = "vanilla"
  objective: Objective = (Term("hard", 0.1), Term("tv", 1.8), Term("confidence", 1.0))
  threshold: float | None = None
  temperatures: tuple[float, ...] = ()
  widths: tuple[int, ...] = ()

  def __post_init__(self):
    if self.markov not in ("vanilla", "gated", "rnn") or self.rank < 0:
      raise UserError(
        "markov must be 'vanilla', 'gated' or 'rnn' and rank at least 0, got "
        f"{self.markov!r} and {self.rank}"
      )
    super().__post_init__()
    if self.threshold is not None and not self.has_confidence:
      raise UserError(
        "threshold needs a confidence head: add Term('confidence') to the objective, or leave "
        "threshold=None"
      )
    if self.temperatures and len(self.temperatures) != self.num_heads:
      raise UserError(
        f"temperatures has {len(self.temperatures)} numbers for {self.num_heads} depths"
      )
    if any(not 1 <= w <= self.num_nodes for w in self.widths):
      raise UserError(f"widths must lie in 1..{self.num_nodes}, got {self.widths}")

  @property
  def has_confidence(self) -> bool:
    return any(term.name == "confidence" for term in parse(self.objective))

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    params = super().init_boxed(rng, target)
    keys = jax.random.split(jax.random.fold_in(rng, 1), 3)
    r, d = self.rank, self.dim

    def box(x, *axes):
      return nn.LogicallyPartitioned(x, axes)

    def dense(key, rows, columns):
      kernel = jax.random.normal(key, (rows, columns)) * rows**-0.5
      return {"kernel": box(kernel, None, None), "bias": box(jnp.zeros(columns), None)}

    if r:
      table = jax.random.normal(keys[0], (self.vocab_size, r)) * r**-0.5
      params["markov"] = {
        "w1": box(table, "vocab", None),
        "w2": box(jnp.zeros((r, self.vocab_size)), None, "vocab"),
      }
      if self.markov == "gated":
        params["markov"]["gate"] = dense(keys[1], d + r, r)
      if self.markov == "rnn":
        params["markov"]["joint"] = dense(keys[1], 2 * r + d, 3 * r)
    if self.has_confidence:
      params["confidence"] = dense(keys[2], d + r, 1)
    return params

  def _markov(self, params, hidden, tokens, memory) -> tuple[SparkStates, Array]:
    """States of slots with ``hidden [..., D]`` after ``tokens [...]``; ``memory [..., r]`` is the
    recurrent kind's s of the slot before."""
    if not self.rank:
      nothing = jnp.zeros((*hidden.shape[:-1], 0), hidden.dtype)
      return SparkStates(hidden, nothing, nothing), memory
    e = params["markov"]["w1"].astype(hidden.dtype)[tokens]
    if self.markov == "vanilla":
      latent = e
    elif self.markov == "gated":
      x = jnp.concatenate([hidden, e], axis=-1)
      latent = jax.nn.sigmoid(_affine(params["markov"]["gate"], x)) * e
    else:
      x = jnp.concatenate([memory, e, hidden], axis=-1)
      gate, candidate, latent = jnp.split(_affine(params["markov"]["joint"], x), 3, axis=-1)
      gate = jax.nn.sigmoid(gate)
      memory, latent = gate * memory + (1 - gate) * jnp.tanh(candidate), jnp.tanh(latent)
    return SparkStates(hidden, latent, e), memory

  def _bias(self, params, latent):
    if not self.rank:
      return 0.0
    w2 = params["markov"]["w2"].astype(latent.dtype)
    return jnp.matmul(latent, w2, preferred_element_type=jnp.float32)

  def head(self, params, target, depth, states: SparkStates):
    return super().head(params, target, depth, states.hidden) + self._bias(params, states.latent)

  def predicted(self, params, states: SparkStates):
    return states.hidden

  def confidence(self, params, states: SparkStates) -> Float[Array, "*B"]:
    """Log-odds that the draft of these slots is accepted."""
    x = jnp.concatenate([states.hidden, states.embedded], axis=-1)
    return _affine(params["confidence"], x)[..., 0].astype(jnp.float32)

  # Training.

  def _states(self, params, hidden, batch, slots):
    memory = jnp.zeros((*slots.shape, self.rank), hidden.dtype)
    for k in range(self.num_heads):
      before = take_slots(batch["tokens"], slots + 1 + k)
      states, memory = self._markov(params, hidden[:, :, k], before, memory)
      yield states

  def _slots(self, params, target, example):
    slots, best = super()._slots(params, target, example)
    if self.has_confidence:
      slots = slots.replace(confidence=self.confidence(params, example.states))
    return slots, best

  # Inference.

  def first(self, params, state, context: Context):
    block = self._block(params, state, context)[:, : self.max_depth]
    logits = super().head(params, context.target, 1, block)
    memory = jnp.zeros((block.shape[0], 1, self.rank), block.dtype)
    states, memory = self._markov(params, block[:, :1], context.root[:, None], memory)
    first = logits[:, 0] + self._bias(params, states.latent[:, 0])
    return first, (block, logits, memory)

  def step(self, params, state, context: Context):
    def feed(carry, level, tokens, parents):
      block, logits, memory = carry
      hidden = jnp.broadcast_to(block[:, level, None], (*tokens.shape, self.dim))
      states, memory = self._markov(params, hidden, tokens, take_nodes(memory, parents))
      bias = self._bias(params, states.latent)
      return logits[:, level, None] + bias, (block, logits, memory)

    return feed

  def propose(self, params, state, context, rng):
    if self.threshold is None:
      return super().propose(params, state, context, rng)
    block = self._block(params, state, context)
    tree, _ = super().propose(params, state.replace(block=block), context, rng)
    keep = self.acceptance(params, block, tree) >= self.threshold
    return cut_tree(tree, keep), state

  def acceptance(self, params, block: Float[Array, "B K D"], tree: Any) -> Float[Array, "B M"]:
    """The calibrated chance of every node to be accepted after its parent; the root's is 1."""
    depth = jnp.maximum(tree.depth - 1, 0)
    before = jnp.take_along_axis(tree.tokens, tree.parent, axis=1)
    hidden = jnp.take_along_axis(block, depth[..., None], axis=1)
    memory = jnp.zeros((*depth.shape, self.rank), block.dtype)  # confidence doesn't read it
    logit = self.confidence(params, self._markov(params, hidden, before, memory)[0])
    if self.temperatures:
      logit = logit / jnp.asarray(self.temperatures, jnp.float32)[depth]
    return jnp.where(tree.depth == 0, 1.0, jax.nn.sigmoid(logit))

  def verify(self, params, tree, context):
    return verify_widths(super().verify, params, tree, context, self.widths)


def _affine(block: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
  return x @ block["kernel"].astype(x.dtype) + block["bias"].astype(x.dtype)
