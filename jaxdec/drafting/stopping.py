# SPDX-License-Identifier: Apache-2.0
"""When to stop drafting: predicted acceptance, thresholds, calibration, narrower verify passes.

A round drafts ``Y_1, Y_2, ...`` and stops once the predicted chance that at least one is rejected,
``1 - prod_i c_i``, exceeds a threshold h: the optimal policy of the underlying decision process
(SpecDec++, arXiv 2405.19715). Any ``c`` is safe under rule ``match``. Rule ``ratio`` needs more:
whether Y_i is verified must not depend on Y_i itself, or what is left is no sample of the law q it
is judged by. With p = (.5, .3, .2), q = (.2, .5, .3) and token 2 always dropped the text has the
law (.55, .15, .30). Hence a draft may end the round but is never taken back: c_i decides about
Y_{i+1}.

Shapes stay static. A row that stops leaves ``valid=False`` nodes behind; the loop over drafter
passes ends when all rows have stopped, which is what is saved. The target's pass still computes M
nodes unless ``verify_widths`` is given smaller trees to choose from, each compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxdec.drafting.base import Context, Params
from jaxdec.drafting.tree import Tree

Verify = Callable[[Params, Tree, Context], Any]


# The acceptance head.


def init_head(rng: jax.Array, dim: int, num_blocks: int) -> Params:
  """``s <- s + SiLU(W s + b)`` ``num_blocks`` times (weights of their own), then one number.

  One logit in place of the two of the released code: the same function, a sigmoid for a softmax.
  """
  keys = jax.random.split(rng, num_blocks + 1)

  def dense(key, columns):
    kernel = jax.random.normal(key, (dim, columns)) * dim**-0.5
    return {
      "kernel": nn.LogicallyPartitioned(kernel, ("embed", None)),
      "bias": nn.LogicallyPartitioned(jnp.zeros(columns), (None,)),
    }

  blocks = {f"block_{i}": dense(keys[i], dim) for i in range(num_blocks)}
  return {**blocks, "out": dense(keys[-1], 1)}


def acceptance_logit(head: Params, states: Float[Array, "*B D"]) -> Float[Array, "*B"]:
  """Log-odds that the token these states have just read is accepted; float32."""

  def affine(block, x):
    return x @ block["kernel"].astype(x.dtype) + block["bias"].astype(x.dtype)

  for i in range(len(head) - 1):
    states = states + jax.nn.silu(affine(head[f"block_{i}"], states))
  return affine(head["out"], states)[..., 0].astype(jnp.float32)


def acceptance_loss(
  logits: Float[Array, "*B"],
  accepted: Float[Array, "*B"],
  weights: Float[Array, "*B"],
  rejection_weight: float = 6.0,
) -> Float[Array, ""]:
  """``sum a CE(1) + w (1 - a) CE(0)`` over ``sum a + w (1 - a)``: soft labels a in [0, 1]; the rare
  rejections weigh w (SpecDec++, section 4)."""
  yes, no = weights * accepted, weights * rejection_weight * (1 - accepted)
  loss = yes * jax.nn.softplus(-logits) + no * jax.nn.softplus(logits)
  return jnp.sum(loss) / jnp.maximum(jnp.sum(yes + no), 1e-6)


# Calibration.


def calibration_error(
  predicted: Float[Array, "*B"],
  accepted: Float[Array, "*B"],
  weights: Float[Array, "*B"],
  bins: int = 10,
) -> Float[Array, ""]:
  """Expected calibration error: ``sum_bins share |mean predicted - mean accepted|``, equal bins."""
  index = jnp.clip((predicted * bins).astype(jnp.int32), 0, bins - 1)
  member = jax.nn.one_hot(index, bins) * weights[..., None]
  gap = jnp.sum(member * (predicted - accepted)[..., None], axis=tuple(range(predicted.ndim)))
  return jnp.sum(jnp.abs(gap)) / jnp.maximum(jnp.sum(weights), 1e-6)


def fit_temperature(logits, accepted, weights=None) -> float:
  """The T > 0 that minimises the cross-entropy of ``sigmoid(logits / T)`` (arXiv 1706.04599).

  Convex in 1/T: golden-section search over T in [1/32, 32]. Call it once per depth.
  """
  z, a = np.asarray(logits, np.float64).ravel(), np.asarray(accepted, np.float64).ravel()
  w = np.ones_like(z) if weights is None else np.asarray(weights, np.float64).ravel()

  def loss(inverse):
    return np.sum(w * (np.logaddexp(0, z * inverse) - a * z * inverse))

  low, high, ratio = 1 / 32, 32.0, (5**0.5 - 1) / 2
  for _ in range(80):
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    low, high = (low, right) if loss(left) <= loss(right) else (left, high)
  return float(2 / (low + high))


# Trees that end early.


def cut_tree(tree: Tree, keep: Bool[Array, "B M"]) -> Tree:
  """The tree without the nodes not kept, and all below them."""
  valid = tree.valid & keep.at[:, 0].set(True)
  for _ in range(tree.max_depth):
    valid = valid & jnp.take_along_axis(valid, tree.parent, axis=1)
  return tree.replace(valid=valid)


def verify_widths(
  verify: Verify, params: Params, tree: Tree, context: Context, widths: Sequence[int]
) -> Any:
  """``verify`` of the shortest prefix of the nodes that holds every valid one, of these sizes.

  The sizes are static, which of them runs is decided on the device by the batch's longest draft.
  Outputs of the nodes left out are zeros; nobody reads them.
  """
  nodes = tree.tokens.shape[1]
  widths = sorted({*widths, nodes})
  if len(widths) == 1:
    return verify(params, tree, context)

  def prefix(width):
    return Tree(
      tokens=tree.tokens[:, :width],
      parent=tree.parent[:, :width],
      depth=tree.depth[:, :width],
      valid=tree.valid[:, :width],
      max_depth=min(tree.max_depth, width - 1),
    )

  whole = jax.eval_shape(lambda: verify(params, tree, context))

  def run(width):
    def padded(x, like):
      return jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, like.shape)])

    return jax.tree.map(padded, verify(params, prefix(width), context), whole)

  last = jnp.max(jnp.where(tree.valid, jnp.arange(1, nodes + 1), 0))
  branch = jnp.searchsorted(jnp.asarray(widths), last)
  return jax.lax.switch(branch, [lambda w=w: run(w) for w in widths])
