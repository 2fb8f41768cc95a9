# SPDX-License-Identifier: Apache-2.0
"""Threshold stopping for any distilled drafter that drafts a chain token by token.

Drafters with features of the target have no state that has read the draft but not yet the next
one, so the chance ``c_i`` that draft i is accepted is told from the law ``q_i`` it is drawn from:

  c_i = sigmoid(w [log q_(1), log q_(1) - log q_(2), H(q), i] + b)        q_(r): the r-th likeliest

fitted by logistic regression on what distillation sees. Drafting goes on while ``1 - prod c_i <=
h``, as in SpecDec++ (arXiv 2405.19715). ``q_i`` doesn't depend on the draft drawn from it, and the
draft is verified in any case, so the law of the text is kept (``jaxdec.drafting.stopping``). At
least one token is drafted. A pass that no row needs is skipped on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdec.drafting.base import Drafter, Params, Target, TargetOutput
from jaxdec.drafting.losses import overlap
from jaxdec.drafting.selection import argmax, top_k
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.stopping import verify_widths
from jaxdec.drafting.trained import TrainedDrafter
from jaxdec.drafting.tree import chain
from jaxdec.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopEarly(Drafter):
  """``drafter`` with early stopping; ``drafter_params = {"drafter": ..., "head": ...}``.

  ``save_drafter`` stores it whole, so that ``generate(drafter=folder)`` stops early too.

  Attributes:
    drafter: drafts a chain.
    threshold: h, the predicted chance of any rejection that ends a round; 1 never stops.
    widths: sizes of trees the target verifies, see ``jaxdec.drafting.stopping.verify_widths``.
  """

  drafter: TrainedDrafter
  threshold: float = 0.5
  widths: tuple[int, ...] = ()

  name: ClassVar[str] = "stop_early"
  trained: ClassVar[bool] = True

  def __post_init__(self):
    shape = self.drafter.shape
    if not isinstance(shape, StaticTree) or shape != StaticTree.chain(shape.max_depth):
      raise UserError(
        f"stop_early needs a drafter that drafts a chain, but {self.drafter.name} drafts a tree; "
        "give it tree=StaticTree.chain(length)"
      )
    if not 0 <= self.threshold <= 1:
      raise UserError(f"threshold is a probability, got {self.threshold}; use 0 to 1")
    if any(not 1 <= w <= self.num_nodes for w in self.widths):
      raise UserError(f"widths must lie in 1..{self.num_nodes}, got {self.widths}")

  @property
  def vocab_size(self) -> int:
    return self.drafter.vocab_size

  @property
  def num_nodes(self) -> int:
    return self.drafter.num_nodes

  @property
  def max_depth(self) -> int:
    return self.drafter.max_depth

  @property
  def capture(self):
    return self.drafter.capture

  @property
  def needs_prompt_hidden(self) -> bool:
    return self.drafter.needs_prompt_hidden

  def init_params(self, rng: jax.Array, target: Target | None = None) -> Params:
    head = {"kernel": jnp.zeros(4), "bias": jnp.zeros(())}
    return {"drafter": self.drafter.init_params(rng, target), "head": head}

  def init_state(self, batch: int, capacity: int):
    return self.drafter.init_state(batch, capacity)

  def start(self, params, state, prompt, output, target):
    return self.drafter.start(params["drafter"], state, prompt, output, target)

  def observe(self, params, state, tree, accepted, output, context):
    return self.drafter.observe(params["drafter"], state, tree, accepted, output, context)

  def verify(self, params, tree, context):
    return verify_widths(self.drafter.verify, params["drafter"], tree, context, self.widths)

  def propose(self, params, state, context, rng):
    drafter, depth = self.drafter, self.max_depth
    logits, carry = drafter.first(params["drafter"], state, context)
    step = drafter.step(params["drafter"], state, context)
    perturb, ids = drafter._noise(context), drafter.draft_ids
    scores = logits[:, None]
    live, survival = jnp.ones(logits.shape[0], bool), jnp.ones(logits.shape[0])
    tokens, made = [], []
    for level in range(depth):
      token = argmax(scores if perturb is None else perturb(scores, level))
      token = token if ids is None else ids[token]
      tokens.append(token[:, 0])
      made.append(live)
      chance = jax.nn.sigmoid(_logit(params["head"], law_features(scores, level + 1)))
      survival = survival * chance[:, 0]
      live = live & (1 - survival <= self.threshold)
      if level + 1 < depth:

        def feed(carry=carry, token=token, level=level):
          return step(carry, level + 1, token, np.zeros(1, np.int32))

        def skip(shapes):
          return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        shapes = jax.eval_shape(feed)
        scores, carry = jax.lax.cond(jnp.any(live), feed, lambda shapes=shapes: skip(shapes))
    return chain(context.root, jnp.stack(tokens, 1), jnp.stack(made, 1)), state


def law_features(logits: Float[Array, "*B V"], depth: int) -> Float[Array, "*B 4"]:
  """What the chance is told from: likeliest log-probability, lead over the next, entropy, depth."""
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  best = top_k(log_q, 2)[0]
  entropy = -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
  level = jnp.full(entropy.shape, float(depth))
  return jnp.stack([best[..., 0], best[..., 0] - best[..., 1], entropy, level], axis=-1)


def _logit(head: Params, features: Float[Array, "*B F"]) -> Float[Array, "*B"]:
  return features @ head["kernel"] + head["bias"]


def fit_stopping(
  drafter: TrainedDrafter,
  params: Params,
  target: Target,
  data: Iterable[tuple[Any, TargetOutput]],
  *,
  greedy: bool = True,
) -> Params:
  """The head of ``StopEarly`` for a trained drafter.

  Args:
    data: batches, each with what the target computes on it (``drafter.capture`` included).
    greedy: labels are whether the drafter's first token is the target's; else
      ``alpha = sum_v min(p_v, q_v)``.
  """

  @jax.jit
  def read(params, target_params, batch, output):
    teacher = Target(target.model, target_params, target.state)
    rows = []
    for example in drafter.examples(params, teacher, output, batch, None):
      if example.teacher is None:
        law = target.model.apply({"params": target_params}, example.hidden, method="unembed")
        example = example.replace(teacher=law)
      slots, best = drafter._slots(params, teacher, example)
      if greedy:
        label = (argmax(slots.logits) == best).astype(jnp.float32)
      else:
        label = overlap(slots.logits, slots.teacher, slots.mass)
      rows.append((law_features(slots.logits, example.depth), label, slots.weights))
    return rows

  features, labels, weights = [], [], []
  for batch, output in data:
    for x, y, w in jax.device_get(read(params, target.params, dict(batch), output)):
      features.append(x.reshape(-1, x.shape[-1]))
      labels.append(y.ravel())
      weights.append(w.ravel())
  kernel, bias = logistic(*map(np.concatenate, (features, labels, weights)))
  return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def logistic(
  features: Float[np.ndarray, "R F"],
  labels: Float[np.ndarray, "R"],
  weights: Float[np.ndarray, "R"],
  ridge: float = 1e-3,
) -> tuple[Float[np.ndarray, "F"], float]:
  """Logistic regression on soft labels by Newton's method: kernel and bias."""
  x = np.asarray(features, np.float64)
  mean, std = x.mean(0), np.maximum(x.std(0), 1e-6)
  x = np.concatenate([(x - mean) / std, np.ones((len(x), 1))], axis=1)
  beta, penalty = np.zeros(x.shape[1]), ridge * np.eye(x.shape[1])
  for _ in range(30):
    p = 1 / (1 + np.exp(-x @ beta))
    gradient = x.T @ (weights * (labels - p)) - penalty @ beta
    hessian = (x * (weights * np.maximum(p * (1 - p), 1e-6))[:, None]).T @ x + penalty
    step = np.linalg.solve(hessian, gradient)
    beta = beta + step * min(1.0, 4 / max(np.abs(step).max(), 1e-12))
  kernel = beta[:-1] / std
  return kernel, float(beta[-1] - kernel @ mean)
