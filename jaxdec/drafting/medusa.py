# SPDX-License-Identifier: Apache-2.0
"""Medusa-1 (arXiv 2401.10774): K residual heads on the frozen target's last hidden state.

  u_k = h_t + SiLU(A_k h_t + b_k)          A_k, b_k zero at the start, so u_k = h_t
  logits_k = u_k W_k                       W_k starts as the LM head

Head k = 1..K at slot t guesses ``x_{t+1+k}``; the LM head itself gives the root ``x_{t+1}``. No
head sees another's guess, so all run at once and a tree of candidates is a choice of ranks per
head.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxdec.drafting.base import Context, Params, Target
from jaxdec.drafting.trained import TrainedDrafter, last_accepted, lm_head_kernel, soft_cap


@struct.dataclass
class MedusaState:
  """The target's post-norm state at the token before the root."""

  hidden: Float[Array, "B D"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medusa(TrainedDrafter):
  """Medusa heads.

  Attributes:
    num_blocks: residual blocks per head, each with weights of its own (the reference code repeats
      one module by mistake).
    share_head: all heads read the target's own LM head (frozen) instead of a copy each. Saves
      ``K D V`` parameters and most of the drafting and training time of a small model, where one
      head matrix weighs as much as several layers.
    depth_decay: 0.8 in the paper; the released trainer weighs all heads alike.
  """

  name: ClassVar[str] = "medusa"

  depth_decay: float = 0.8
  num_blocks: int = 1
  share_head: bool = False

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    del rng  # every head starts as the LM head
    return {f"head_{k}": self._init_head(target) for k in range(self.num_heads)}

  def _init_head(self, target):
    block = {"kernel": jnp.zeros((self.dim, self.dim)), "bias": jnp.zeros(self.dim)}
    params = {f"block_{i}": _box(block) for i in range(self.num_blocks)}
    if not self.share_head:
      params["lm_head"] = {
        "kernel": nn.LogicallyPartitioned(lm_head_kernel(target), ("embed", "vocab"))
      }
    return params

  def _residual(self, params, depth, x):
    for i in range(self.num_blocks):
      block = params[f"head_{depth - 1}"][f"block_{i}"]
      x = x + jax.nn.silu(x @ block["kernel"].astype(x.dtype) + block["bias"].astype(x.dtype))
    return x

  def head(self, params, target, depth, states):
    if self.share_head:
      return target.model.apply({"params": target.params}, states, method="unembed")
    return own_head(params[f"head_{depth - 1}"]["lm_head"], states, self.logit_cap)

  def teacher_forced(self, params, target, output, batch, rng=None):
    hidden = output.hidden.astype(self.dtype)  # a target that is tuned too gets gradients
    return [self._residual(params, k, hidden[:, : -1 - k]) for k in range(1, self.num_heads + 1)]

  def init_state(self, batch: int, capacity: int) -> MedusaState:
    return MedusaState(jnp.zeros((batch, self.dim), self.dtype))

  def start(self, params, state, prompt, output, target):
    return MedusaState(output.hidden[:, 0].astype(self.dtype))

  def observe(self, params, state, tree, accepted, output, context):
    hidden = last_accepted(output.hidden, accepted.path, accepted.count).astype(self.dtype)
    return MedusaState(jnp.where(accepted.count[:, None] > 0, hidden, state.hidden))

  def first(self, params, state, context: Context):
    depths = range(1, self.max_depth + 1)
    states = [self._residual(params, k, state.hidden) for k in depths]
    if self.share_head:  # one product for all heads
      logits = list(jnp.unstack(self.head(params, context.target, 1, jnp.stack(states, 1)), axis=1))
    else:
      logits = [self.head(params, context.target, k, x) for k, x in zip(depths, states)]
    return logits[0], logits

  def step(self, params, state, context: Context):
    # A head's guess doesn't depend on the path: the next head's logits serve the whole level.
    return lambda logits, level, tokens, parents: (logits[level][:, None], logits)


def own_head(
  params: Params, states: Float[Array, "... D"], logit_cap: float | None
) -> Float[Array, "... V"]:
  """Logits of a drafter's own LM head, soft-capped as the target's, float32."""
  kernel = params["kernel"].astype(states.dtype)
  logits = jnp.matmul(states, kernel, preferred_element_type=jnp.float32)
  if "bias" in params:
    logits = logits + params["bias"]
  return soft_cap(logits, logit_cap)


def _box(block):
  return {
    "kernel": nn.LogicallyPartitioned(block["kernel"], ("embed", None)),
    "bias": nn.LogicallyPartitioned(block["bias"], (None,)),
  }
