# SPDX-License-Identifier: Apache-2.0
"""What trained drafters share: teacher-forced training, label masks, metrics, tree growing.

Indices. With target states ``h_t`` (having read ``x_0..x_t``) the root is
``x_{t+1}``, and the draft of depth k = 1..K at slot t

* guesses the token ``x_{t+1+k}``, so its hard label is ``tokens[t + 1 + k]``,
* is checked against the target's law at position ``t + k``, so its soft label is ``logits[t + k]``.

Slot t counts at depth k if ``x_t .. x_{t+1+k}`` lie in one document and the label may be learned
(``loss_mask``); drafters that are fed the tokens between need all of these in the mask. Slots
``t >= T - 1 - k`` have no label and are never computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdec.drafting.base import Context, Drafter, DraftState, Params, Target, TargetOutput
from jaxdec.drafting.dynamic_tree import DynamicTree, Step, expand_dynamic, expand_static
from jaxdec.drafting.losses import (
  cross_entropy,
  label_rank,
  masked_mean,
  overlap,
  soft_cross_entropy,
)
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.tree import Tree
from jaxdec.errors import UserError
from jaxdec.models.config import DecoderConfig

NUM_RANKS = 10  # ranks told apart by ``accuracy``: as many children as any static tree gives a node
OVERLAP_STRIDE = 8  # the overlap metric needs two more softmaxes: every 8th slot estimates it


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedDrafter(Drafter):
  """Base of Medusa, Hydra and EAGLE-3; subclasses say how states and logits are made.

  Attributes:
    dim, vocab_size: the target's D and V. logit_cap: its soft-cap on logits.
    num_heads: K, the depths trained.
    tree: topology drafted at inference; None: a chain of ``num_heads``.
    objective: ``hard`` cross-entropy on the text, or ``soft`` on the target's distributions.
    depth_decay: depth k has the loss weight ``depth_decay ** k``.
    loss_fraction: share of the slots, drawn anew each step, whose logits are computed in training:
      a small target's cost is mostly there.
    coupled: at temperature > 0 rank children by ``log q + Gumbel noise``, with the noise that
      verification draws the target's token with. The output law doesn't change (what is emitted
      never depends on the drafts); drafts match more often.
    dtype: compute type of the drafter; parameters are float32.
  """

  trained: ClassVar[bool] = True
  sequential: ClassVar[bool] = False  # is the drafter fed the tokens of the path?

  dim: int
  vocab_size: int
  logit_cap: float | None = None
  num_heads: int = 4
  tree: StaticTree | DynamicTree | None = None
  objective: Literal["hard", "soft"] = "hard"
  depth_decay: float = 1.0
  loss_fraction: float = 1.0
  coupled: bool = True
  dtype: str = "float32"

  def __post_init__(self):
    if self.num_heads < 1:
      raise UserError(f"num_heads must be at least 1, got {self.num_heads}")
    if self.objective not in ("hard", "soft"):
      raise UserError(f"objective must be 'hard' or 'soft', got {self.objective!r}")
    if not 0 < self.loss_fraction <= 1:
      raise UserError(f"loss_fraction must lie in (0, 1], got {self.loss_fraction}")
    if self.max_depth > self.depth_limit or self.max_depth < 1:
      raise UserError(
        f"the tree of {self.name} is {self.max_depth} deep, but it drafts 1 to {self.depth_limit} "
        "tokens; change the tree or train more heads"
      )

  # Subclasses implement these.

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    """Fresh parameters with logical axis names."""
    raise NotImplementedError

  def teacher_forced(
    self,
    params: Params,
    target: Target,
    output: TargetOutput,
    batch: Mapping[str, Array],
    rng: jax.Array | None = None,
  ) -> list[Float[Array, "B _ D"]]:
    """States that ``head`` reads, depth 1 first: entry k - 1 is ``[B, T - 1 - k, D]``.

    ``rng`` turns dropout on.
    """
    raise NotImplementedError

  def head(
    self, params: Params, target: Target, depth: int, states: Float[Array, "... D"]
  ) -> Float[Array, "... V"]:
    """Logits of the draft of ``depth`` (1-based), float32."""
    raise NotImplementedError

  def first(
    self, params: Params, state: DraftState, context: Context
  ) -> tuple[Float[Array, "B V"], Any]:
    """Logits of the root's children, and the carry of ``step``."""
    raise NotImplementedError

  def step(self, params: Params, state: DraftState, context: Context) -> Step:
    """The function that feeds drafted nodes (``jaxdec.drafting.dynamic_tree``)."""
    raise NotImplementedError

  # Configuration.

  @classmethod
  def for_target(cls, config: DecoderConfig, **options) -> TrainedDrafter:
    """A drafter that fits the decoder ``config``; ``options`` are its other fields."""
    return cls(dim=config.dim, vocab_size=config.vocab_size, logit_cap=config.logit_cap, **options)

  @classmethod
  def from_name(cls, config: DecoderConfig | None = None, **options) -> TrainedDrafter:
    """What the registry calls: like ``for_target``, and a clear word where there is no target."""
    if config is None:
      raise UserError(
        f"drafter {cls.name!r} must be distilled for its target first; pass the folder of a "
        "distilled run, or build one for training with config=<the target's configuration>"
      )
    return cls.for_target(config, **options)

  @property
  def depth_limit(self) -> int:
    """Deepest draft the drafter can make."""
    return self.num_heads

  @property
  def shape(self) -> StaticTree | DynamicTree:
    """The tree in use."""
    return self.tree if self.tree is not None else StaticTree.chain(self.num_heads)

  @property
  def num_nodes(self) -> int:
    return self.shape.num_nodes

  @property
  def max_depth(self) -> int:
    return self.shape.max_depth

  @property
  def draft_ids(self) -> Int[Array, "V"] | None:
    """Token ids of the draft vocabulary; None: the target's own."""
    return None

  def init_params(self, rng: jax.Array, target: Target | None = None) -> Params:
    if target is None:
      raise UserError(f"{self.name} starts from its target's weights: pass target=")
    return nn.unbox(self.init_boxed(rng, target))

  # Inference.

  def propose(
    self, params: Params, state: DraftState, context: Context, rng: jax.Array
  ) -> tuple[Tree, DraftState]:
    logits, carry = self.first(params, state, context)
    static = isinstance(self.shape, StaticTree)
    tree = (expand_static if static else expand_dynamic)(
      self.step(params, state, context),
      carry,
      logits,
      context.root,
      self.shape,
      perturb=self._noise(context),
      ids=self.draft_ids,
    )
    return tree, state

  def _noise(self, context: Context) -> Callable[[Array, int], Array] | None:
    if not self.coupled or context.sampler is None or context.sampler.temperature == 0:
      return None

    def perturb(logits, level):
      # The children of a node of depth ``level`` stand at position length + level + 1.
      position = context.length + level + 1
      noise = context.sampler.noise(context.keys, position, self.vocab_size)
      noise = noise if self.draft_ids is None else noise[:, self.draft_ids]
      return context.sampler.process(logits) + noise[:, None]

    return perturb

  # Training.

  def loss(
    self,
    params: Params,
    target: Target,
    output: TargetOutput,
    batch: Mapping[str, Array],
    rng: jax.Array | None = None,
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """``sum_k depth_decay^k mean_t CE_k`` and metrics.

    Args:
      output: the target over ``batch["tokens"]``: hidden, features and logits of every position.
      batch: ``tokens``, ``segment_ids``, ``positions``, ``loss_mask``, all ``[B, T]``.
      rng: dropout and the choice of slots; None: neither (evaluation).

    Returns:
      The loss, and metrics by depth ``[K]``: ``depth_loss``; ``top1`` and ``top5`` (is the target's
      most likely token the drafter's first, among its first five); ``overlap = sum_v min(p, q)``.
      Also ``tokens_per_step = 1 + sum_k prod_{i<=k} top1_i`` (``tau_sim``), the mean length of a
      chain were the depths independent, and ``weight``, the number of labelled slots of depth 1.
    """
    total, by_depth, weight = 0.0, {"depth_loss": [], "top1": [], "top5": [], "overlap": []}, None
    for item in self._depths(params, target, output, batch, rng):
      depth, logits, labels, teacher, weights, best, mass = item
      if self.objective == "soft":
        losses = soft_cross_entropy(logits, jax.lax.stop_gradient(teacher))
      else:
        losses = cross_entropy(logits, labels)
      mean = masked_mean(losses, weights)
      total = total + self.depth_decay**depth * mean
      logits = jax.lax.stop_gradient(logits)
      rank = label_rank(logits, best)
      every = slice(None, None, OVERLAP_STRIDE)
      shared = (
        overlap(logits[:, every], teacher[:, every])
        if mass is None
        else overlap(logits[:, every], teacher[:, every], mass[:, every])
      )
      by_depth["depth_loss"].append(jax.lax.stop_gradient(mean))
      by_depth["top1"].append(masked_mean(rank == 0, weights))
      by_depth["top5"].append(masked_mean(rank < 5, weights))
      by_depth["overlap"].append(masked_mean(shared, weights[:, every]))
      weight = jnp.sum(weights) if weight is None else weight
    metrics = {name: jnp.stack(values) for name, values in by_depth.items()}
    metrics["tokens_per_step"] = 1 + jnp.sum(jnp.cumprod(metrics["top1"]))
    metrics["weight"] = weight
    return total, metrics

  def accuracy(
    self, params: Params, target: Target, output: TargetOutput, batch: Mapping[str, Array]
  ) -> tuple[Float[Array, "D R"], Float[Array, "D"]]:
    """How often the target's most likely token has each rank, by depth, and the number of slots.

    Columns are disjoint (their sum is the top-R accuracy): what ``greedy_tree`` reads.
    """
    table, counts = [], []
    for _, logits, _, _, weights, best, _ in self._depths(params, target, output, batch, None):
      hit = jax.nn.one_hot(label_rank(logits, best), NUM_RANKS) * weights[..., None]
      count = jnp.sum(weights)
      table.append(jnp.sum(hit, axis=(0, 1)) / jnp.maximum(count, 1.0))
      counts.append(count)
    return jnp.stack(table), jnp.stack(counts)

  def _depths(self, params, target, output, batch, rng):
    """Per depth: logits, labels, teacher logits, weights, the teacher's best token (all in the
    draft vocabulary and on the slots in use), the log-normaliser of the teacher's whole law."""
    tokens = batch["tokens"]
    if tokens.shape[1] < self.num_heads + 2:
      raise UserError(
        f"sequences of {tokens.shape[1]} tokens are too short to train {self.num_heads} draft "
        f"depths; use at least {self.num_heads + 2}"
      )
    if output.logits is None:
      raise UserError("training a drafter needs the target's logits at every position")
    dropout = slots_rng = None
    if rng is not None:
      dropout, slots_rng = jax.random.split(rng)
    best_everywhere = argmax(output.logits)
    for k, states in enumerate(self.teacher_forced(params, target, output, batch, dropout), 1):
      teacher = jax.lax.stop_gradient(output.logits[:, k:-1])
      labels, best = tokens[:, 1 + k :], best_everywhere[:, k:-1]
      weights = label_weights(batch, k, prefix=self.sequential)
      if self.loss_fraction < 1 and rng is not None:
        count = max(1, round(self.loss_fraction * labels.shape[1]))
        slots = jax.random.permutation(jax.random.fold_in(slots_rng, k), labels.shape[1])[:count]
        states, teacher, labels, weights, best = (
          x[:, slots] for x in (states, teacher, labels, weights, best)
        )
      logits = self.head(params, target, k, states)
      yield (k, logits, *self._restrict(labels, teacher, weights, best))

  def _restrict(self, labels, teacher, weights, best):
    """Maps labels and teacher to the draft vocabulary (None: nothing was cut off the law)."""
    return labels, teacher, weights, best, None


def label_weights(batch: Mapping[str, Array], depth: int, *, prefix: bool) -> Float[Array, "B _"]:
  """Which of the slots ``0..T-2-depth`` count at ``depth``, as 0.0 or 1.0.

  Slot t needs ``x_{t+1+depth}`` in its own document and in the loss mask; with ``prefix`` also
  every token between, which the drafter is fed.
  """
  segments, mask = batch["segment_ids"], batch["loss_mask"] > 0
  ok = (segments[:, : -1 - depth] == segments[:, 1 + depth :]) & (segments[:, : -1 - depth] > 0)
  length = ok.shape[1]
  for i in range(1 if prefix else 1 + depth, 2 + depth):
    ok = ok & mask[:, i : i + length]
  return ok.astype(jnp.float32)


def lm_head_kernel(target: Target) -> Float[Array, "D V"]:
  """The target's LM head as a kernel, float32."""
  params = target.params
  if target.model.config.tie_embeddings:
    table = params["embed"]
    table = table["embedding"] if isinstance(table, Mapping) else table
    return jnp.asarray(nn.unbox(table), jnp.float32).T
  return jnp.asarray(nn.unbox(params["head"]["kernel"]), jnp.float32)


def embed(target: Target, tokens: Int[Array, "B T"], dtype: str) -> Float[Array, "B T D"]:
  """The target's own (frozen) token embeddings."""
  return target.model.apply({"params": target.params}, tokens, method="embed").astype(dtype)


def soft_cap(logits: Float[Array, "... V"], cap: float | None) -> Float[Array, "... V"]:
  """``cap tanh(logits / cap)``."""
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def last_accepted(
  x: Float[Array, "B M ..."], path: Int[Array, "B P"], count: Int[Array, "B"]
) -> Array:
  """Row of ``x`` at the last node of the accepted path (row 0 of the path where count is 0)."""
  index = jnp.take_along_axis(path, jnp.maximum(count - 1, 0)[:, None], axis=1)
  return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)[:, 0]
