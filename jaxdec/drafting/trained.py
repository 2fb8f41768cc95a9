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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdec.drafting import objectives
from jaxdec.drafting.base import Context, Drafter, DraftState, Params, Target, TargetOutput
from jaxdec.drafting.dynamic_tree import DynamicTree, Step, expand_dynamic, expand_static
from jaxdec.drafting.losses import label_rank, masked_mean, overlap
from jaxdec.drafting.objectives import Objective, Slots
from jaxdec.drafting.pieces import Example, piecewise
from jaxdec.drafting.selection import argmax
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.tree import Tree
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.errors import UserError
from jaxdec.models.config import DecoderConfig

NUM_RANKS = 10  # ranks told apart by ``accuracy``: as many children as any static tree gives a node
OVERLAP_STRIDE = 8  # the overlap metric needs two more softmaxes: every 8th slot estimates it


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedDrafter(Drafter):
  """Base of all drafters that are distilled; subclasses say how states and logits are made.

  Attributes:
    dim, vocab_size: the target's D and V. logit_cap: its soft-cap on logits.
    num_heads: K, the depths trained.
    tree: topology drafted at inference; None: a chain of ``num_heads``.
    objective: what is minimised at every slot: the name of a term (``hard`` cross-entropy on the
      text, ``soft`` on the target's distributions, ...) or a tuple of ``Term``; see
      ``jaxdec.drafting.objectives``.
    depth_decay: depth k has the loss weight ``depth_decay ** k``.
    weighting: ``power`` as above; ``dpace`` weighs each slot by what hangs on it besides (for
      drafters whose depths share their slots).
    normalize: ``depth`` sums the means of the depths; ``global`` divides the weighted sum over all
      depths by the sum of the weights.
    vocabulary: optional draft vocabulary, for drafters with a head of their own. A slot whose most
      likely target token lies outside it is not trained on; such tokens are never drafted (the
      output doesn't change).
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
  objective: Objective = "hard"
  depth_decay: float = 1.0
  weighting: Literal["power", "dpace"] = "power"
  normalize: Literal["depth", "global"] = "depth"
  vocabulary: DraftVocabulary | None = None
  loss_fraction: float = 1.0
  coupled: bool = True
  dtype: str = "float32"

  def __post_init__(self):
    if self.num_heads < 1:
      raise UserError(f"num_heads must be at least 1, got {self.num_heads}")
    objectives.parse(self.objective)
    if self.weighting not in ("power", "dpace") or self.normalize not in ("depth", "global"):
      raise UserError(
        "weighting must be 'power' or 'dpace' and normalize 'depth' or 'global', got "
        f"{self.weighting!r} and {self.normalize!r}"
      )
    if self.vocabulary is not None and self.vocabulary.vocab_size != self.vocab_size:
      raise UserError(
        f"the draft vocabulary is a subset of {self.vocabulary.vocab_size} tokens, but "
        f"the target has {self.vocab_size}"
      )
    if self.vocabulary is not None and getattr(self, "share_head", False):
      raise UserError(
        f"a draft vocabulary needs heads of the drafter's own; set share_head=False in {self.name}"
      )
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

    ``rng`` turns dropout on. Drafters that learn at other slots override ``examples`` instead.
    """
    raise NotImplementedError

  def predicted(self, params: Params, states: Any) -> Float[Array, "... D"]:
    """The drafter's prediction of the target's post-norm state, for the terms that compare them."""
    return states

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
  def depths_trained(self) -> int:
    """Depths that a step of training computes."""
    return self.num_heads

  def multiplied(self, params: Params) -> float:
    """Parameters that each token is multiplied by in training, as often as they are used."""
    return float(sum(x.size for x in jax.tree.leaves(params)))

  @property
  def takes_trees(self) -> bool:
    """False where it drafts chains only."""
    return True

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
    return None if self.vocabulary is None else jnp.asarray(self.vocabulary.ids)

  @property
  def draft_size(self) -> int:
    """Tokens the drafter chooses from."""
    return self.vocab_size if self.vocabulary is None else len(self.vocabulary.ids)

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
    if not self.coupled or context.sampler is None or context.sampler.greedy:
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
    """The objective over all depths, ``sum_k depth_decay^k mean_t``, and metrics.

    Args:
      output: the target over ``batch["tokens"]``: hidden and features of every position. Logits are
        not needed: its law is computed from ``hidden`` (``jaxdec.drafting.pieces``).
      batch: ``tokens``, ``segment_ids``, ``positions``, ``loss_mask``, all ``[B, T]``.
      rng: dropout and the choice of slots; None: neither (evaluation).

    Returns:
      The loss, and metrics by depth ``[K]``: ``depth_loss``; ``top1`` and ``top5`` (is the target's
      most likely token the drafter's first, among its first five); ``overlap = sum_v min(p, q)``.
      Also ``tokens_per_step = 1 + sum_k prod_{i<=k} top1_i`` (``tau_sim``), the mean length of a
      chain were the depths independent, and ``weight``, the number of labelled slots of depth 1.
    """
    examples = list(self.examples(params, target, output, batch, rng))

    def measure(example):
      slots, best = self._slots(params, target, example)
      detached, w = jax.lax.stop_gradient(slots.logits), slots.weights
      rank = label_rank(detached, best)
      some = (slice(None), slice(None, None, OVERLAP_STRIDE))
      mass = None if slots.mass is None else slots.mass[some]
      shared = overlap(detached[some], slots.teacher[some], mass)
      sums = {
        "top1": (jnp.sum((rank == 0) * w), jnp.sum(w)),
        "top5": (jnp.sum((rank < 5) * w), jnp.sum(w)),
        "overlap": (jnp.sum(shared * w[some]), jnp.sum(w[some])),
      }
      label_prob = None
      if self.weighting == "dpace":
        picked = jnp.take_along_axis(detached, slots.labels[..., None], axis=-1)[..., 0]
        label_prob = jnp.exp(picked - jax.nn.logsumexp(detached, axis=-1))
      return (objectives.parts(self.objective, slots), w, label_prob), sums

    results = self._piecewise(measure, target, examples)
    weights = [w for (_, w, _), _ in results]
    values = [objectives.combine(self.objective, parts, w) for (parts, w, _), _ in results]
    metrics = {
      name: jnp.stack([total / jnp.maximum(count, 1.0) for total, count in rows])
      for name, rows in ((n, [sums[n] for _, sums in results]) for n in ("top1", "top5", "overlap"))
    }
    metrics["depth_loss"] = jax.lax.stop_gradient(
      jnp.stack([masked_mean(v, w) for v, w in zip(values, weights)])
    )
    metrics["tokens_per_step"] = 1 + jnp.sum(jnp.cumprod(metrics["top1"]))
    metrics["weight"] = jnp.sum(weights[0])
    if self.weighting == "dpace":
      weights = objectives.dpace_weights([p for (_, _, p), _ in results], weights)
    return self._total(values, weights, [e.depth for e in examples]), metrics

  def _piecewise(self, measure, target: Target, examples):
    def law(hidden):
      return jax.lax.stop_gradient(
        target.model.apply({"params": target.params}, hidden, method="unembed")
      )

    return piecewise(measure, examples, law, self.vocab_size)

  def _total(self, values, weights, depths):
    factors = [self.depth_decay**depth for depth in depths]
    if self.normalize == "depth":
      return sum(f * masked_mean(v, w) for f, v, w in zip(factors, values, weights))
    total = sum(f * jnp.sum(v * w) for f, v, w in zip(factors, values, weights))
    return total / jnp.maximum(sum(f * jnp.sum(w) for f, w in zip(factors, weights)), 1e-6)

  def accuracy(
    self, params: Params, target: Target, output: TargetOutput, batch: Mapping[str, Array]
  ) -> tuple[Float[Array, "D R"], Float[Array, "D"]]:
    """How often the target's most likely token has each rank, by depth, and the number of slots.

    Columns are disjoint (their sum is the top-R accuracy): what ``greedy_tree`` reads.
    """

    def measure(example):
      slots, best = self._slots(params, target, example)
      hit = jax.nn.one_hot(label_rank(slots.logits, best), NUM_RANKS) * slots.weights[..., None]
      return None, (jnp.sum(hit, axis=(0, 1)), jnp.sum(slots.weights))

    examples = self.examples(params, target, output, batch, None)
    sums = [x for _, x in self._piecewise(measure, target, examples)]
    counts = jnp.stack([count for _, count in sums])
    return jnp.stack([hits for hits, _ in sums]) / jnp.maximum(counts, 1.0)[:, None], counts

  def examples(
    self,
    params: Params,
    target: Target,
    output: TargetOutput,
    batch: Mapping[str, Array],
    rng: jax.Array | None = None,
  ) -> Iterator[Example]:
    """What is learned at each depth, depth 1 first: here the slots ``0..T-2-k`` of depth k."""
    tokens = batch["tokens"]
    if tokens.shape[1] < self.num_heads + 2:
      raise UserError(
        f"sequences of {tokens.shape[1]} tokens are too short to train {self.num_heads} draft "
        f"depths; use at least {self.num_heads + 2}"
      )
    dropout = slots_rng = None
    if rng is not None:
      dropout, slots_rng = jax.random.split(rng)
    for k, states in enumerate(self.teacher_forced(params, target, output, batch, dropout), 1):
      example = Example(
        k,
        states,
        tokens[:, 1 + k :],
        None if output.logits is None else output.logits[:, k:-1],
        output.hidden[:, k:-1],
        label_weights(batch, k, prefix=self.sequential),
        start=k,
      )
      if self.loss_fraction < 1 and rng is not None:
        width = example.labels.shape[1]
        count = max(1, round(self.loss_fraction * width))
        slots = jax.random.permutation(jax.random.fold_in(slots_rng, k), width)[:count]
        example = jax.tree.map(lambda x, slots=slots: x[:, slots], example.replace(start=None))
      yield example

  def _slots(self, params, target, example: Example) -> tuple[Slots, Int[Array, "B S"]]:
    """The example as the objective sees it, and the target's best token; both in the draft
    vocabulary."""
    logits = self.head(params, target, example.depth, example.states)
    labels, weights = example.labels, example.weights
    teacher = jax.lax.stop_gradient(example.teacher)
    best, mass = argmax(teacher), None
    if self.vocabulary is not None:
      inside = jnp.asarray(self.vocabulary.t2d)
      to_draft = jnp.asarray(np.cumsum(self.vocabulary.t2d) - 1, jnp.int32)
      # A hard label outside the draft vocabulary can't be learned either.
      hard = objectives.needs_labels(self.objective)
      weights = weights * (inside[best] & (inside[labels] if hard else True))
      labels = jnp.where(inside[labels], to_draft[labels], 0)
      best = jnp.where(inside[best], to_draft[best], 0)
      mass = jax.nn.logsumexp(teacher, axis=-1)
      teacher = teacher[..., self.draft_ids]
    predicted = self.predicted(params, example.states)
    hidden = jax.lax.stop_gradient(example.hidden)
    return Slots(logits, teacher, labels, weights, predicted, hidden, mass), best


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
