# SPDX-License-Identifier: Apache-2.0
"""BlockFFN (arXiv 2507.08771): an MLP of small experts that consecutive tokens share.

  z = W_g x,   a = RMSNorm(ReLU(z)),   out = sum_e a_e W_out,e SiLU(W_in,e x)

The ReLU makes routing differentiable and lets the number of active experts differ from token to
token; the norm keeps the scale. Two losses make *chunks* of tokens sparse, so that a tree of draft
tokens reads few experts (z_t: router logits of token t, s = ReLU(z) / sum ReLU(z)):

  activation locality    BCE(sigmoid(alpha z_{t-1}), sigmoid(alpha z_t)), gradient on both sides
  chunk sparsification   1 - mean_{chunk,e} prod_{t in chunk} (1 - s_{t,e})

All experts are computed as one up- and one down-projection. While decoding,
``BlockFFNConfig.union`` gathers the experts that any token at hand needs instead: all nodes of a
tree, not the path that turns out accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.errors import UserError
from jaxdec.mixers.norms import Dense, NormConfig, RMSNorm
from jaxdec.models.config import BlockFFNConfig

ROUTER = "router_logits"  # the name they are sown under, in the collection "intermediates"
_EPS = 1e-5


class BlockFFN(nn.Module):
  """The MLP. Parameters: ``router``, ``router_norm``, ``up [D, E F]``, ``down [E F, D]``."""

  config: BlockFFNConfig
  dim: int
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  def setup(self):
    c = self.config

    def dense(features, axes):
      return Dense(features, axes, False, self.dtype, self.param_dtype)

    self.router = dense(c.num_experts, ("embed", None))
    self.router_norm = RMSNorm(NormConfig(c.eps), self.param_dtype)
    self.up = dense(c.hidden_dim, ("embed", "mlp"))
    self.down = dense(self.dim, ("mlp", "embed"))

  def _route(self, x) -> Float[Array, "... E"]:
    logits = self.router(x)
    self.sow("intermediates", ROUTER, logits.astype(jnp.float32))
    return self.router_norm(jax.nn.relu(logits))

  def _weighted(self, up, weights):
    """Hidden units of each expert times its weight, ``[..., experts F]``."""
    units = jax.nn.silu(up).reshape(*weights.shape, self.config.expert_dim)
    return (units * weights[..., None]).reshape(up.shape)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return self.down(self._weighted(self.up(x), self._route(x)))

  def union(self, x: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
    """The same from the experts that some of the ``B M`` tokens need, if they are few enough."""
    c, weights = self.config, self._route(x)
    up, down = (nn.unbox(m.variables["params"]["kernel"]) for m in (self.up, self.down))
    needed = jnp.any(weights != 0, axis=(0, 1))
    chosen = jnp.argsort(~needed, stable=True)[: c.union]

    def apply(up, down, weights):
      return self._weighted(x @ up.astype(self.dtype), weights) @ down.astype(self.dtype)

    def few(weights):
      columns = up.reshape(self.dim, c.num_experts, c.expert_dim)[:, chosen]
      rows = down.reshape(c.num_experts, c.expert_dim, self.dim)[chosen]
      return apply(columns.reshape(self.dim, -1), rows.reshape(-1, self.dim), weights[..., chosen])

    fits = jnp.sum(needed) <= c.union
    return jax.lax.cond(fits, few, lambda weights: apply(up, down, weights), weights)


@struct.dataclass
class FactorState:
  """Where ``ChunkFactor`` is: all scalars, on the device and in a run's checkpoints.

  Attributes:
    now: the factor of the next step, on the way from ``before`` to ``after``.
    step: losses seen. earlier, recent: their sums over the last whole period and over this one.
  """

  now: Float[Array, ""]
  before: Float[Array, ""]
  after: Float[Array, ""]
  step: Int[Array, ""]
  earlier: Float[Array, ""]
  recent: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class ChunkFactor:
  """The weight of the chunk loss over training, by what the loss does.

  Constant for ``warmup`` steps; then every ``period`` steps rho = mean loss of the last period over
  that of the one before; above 1 at least 1.025, and at most ``4 F_0 / F``; the factor moves to
  ``rho F`` in equal steps over the next period. It shrinks as long as the loss falls.

  Attributes:
    factor: F_0. warmup, period: in steps.
  """

  factor: float = 5e-2
  warmup: int = 1000
  period: int = 100

  def __post_init__(self):
    if self.factor <= 0 or self.warmup < 0 or self.period < 1:
      raise UserError(
        "ChunkFactor needs a positive factor, warmup of at least 0 and period of at least 1, got "
        f"{self.factor}, {self.warmup} and {self.period}"
      )

  def begin(self) -> FactorState:
    """Before the first step."""
    factor, zero = jnp.float32(self.factor), jnp.float32(0)
    return FactorState(factor, factor, factor, jnp.int32(0), zero, zero)

  def follow(self, state: FactorState, loss: Float[Array, ""]) -> FactorState:
    """After a step whose chunk loss was ``loss``."""
    step, recent = state.step + 1, state.recent + loss
    since = step - self.warmup
    whole = since % self.period == 0
    rho = recent / jnp.maximum(state.earlier, 1e-12)
    rho = jnp.where(rho > 1, jnp.maximum(rho, 1.025), rho)
    aim = state.now * jnp.minimum(rho, 4 * self.factor / state.now)
    turns = whole & (since >= 0) & (step >= 2 * self.period)  # two whole periods to compare
    before, after = jnp.where(turns, state.now, state.before), jnp.where(turns, aim, state.after)
    share = jnp.where(since >= 0, (since % self.period + 1) / self.period, 0.0)
    return FactorState(
      now=before + (after - before) * share,
      before=before,
      after=after,
      step=step,
      earlier=jnp.where(whole, recent, state.earlier),
      recent=jnp.where(whole, 0.0, recent),
    )


@dataclasses.dataclass(frozen=True)
class SparsityLosses:
  """What a language model of BlockFFN layers is trained for besides its tokens.

  Attributes:
    locality: weight of the locality loss (paper: 2e-3 up to 1.2B, 1e-3 at 0.8B).
    chunk: weight of the chunk loss: a constant, or one that training follows (the paper's way;
      outside of training its first value counts).
    chunk_length: C. sharpness: alpha.
  """

  locality: float = 2e-3
  chunk: float | ChunkFactor = ChunkFactor()
  chunk_length: int = 64
  sharpness: float = 100.0

  @property
  def schedule(self) -> ChunkFactor | None:
    """How the chunk loss's weight changes; None: it doesn't."""
    return self.chunk if isinstance(self.chunk, ChunkFactor) else None

  def __call__(
    self,
    logits: list[Float[Array, "B T E"]],
    segment_ids: Int[Array, "B T"],
    chunk_factor: Any = None,
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The weighted sum over layers' router logits, and metrics: both losses, ``tls``, ``cls_8``;
    also ``chunk_factor``, where it is given."""
    real = segment_ids > 0
    mean = lambda f: jnp.mean(jnp.stack([f(z) for z in logits]))  # noqa: E731
    locality = mean(lambda z: activation_locality(z, segment_ids, self.sharpness))
    chunk = mean(lambda z: chunk_activation(z, real, self.chunk_length))
    first = self.chunk if self.schedule is None else self.schedule.factor
    factor = first if chunk_factor is None else chunk_factor
    metrics = {
      "locality_loss": locality,
      "chunk_loss": chunk,
      "tls": mean(lambda z: chunk_sparsity(z, segment_ids, 1)),
      "cls_8": mean(lambda z: chunk_sparsity(z, segment_ids, 8)),
    }
    if chunk_factor is not None:
      metrics["chunk_factor"] = jnp.asarray(factor, jnp.float32)
    return self.locality * locality + factor * chunk, metrics


def router_logits(variables: Mapping[str, Any]) -> list[Float[Array, "B T E"]]:
  """Every layer's router logits out of what ``apply(..., mutable=["intermediates"])`` returns.

  Raises:
    UserError: the model has no BlockFFN layer.
  """
  found = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(variables.get("intermediates", {}))[0]:
    if any(getattr(key, "key", None) == ROUTER for key in path):
      found += list(leaf) if leaf.ndim == 4 else [leaf]  # layers stacked by a scan come apart
  if not found:
    raise UserError("sparsity losses need a model with BlockFFN layers (LayerConfig.mlp)")
  return found


def shares(logits: Float[Array, "... E"]) -> Float[Array, "... E"]:
  """``s_e = ReLU(z_e) / sum ReLU(z)``; 0 for a token with no active expert. The norm cancels."""
  r = jax.nn.relu(logits.astype(jnp.float32))
  return r / (jnp.sum(r, axis=-1, keepdims=True) + _EPS)


def activation_locality(
  logits: Float[Array, "B T E"], segment_ids: Int[Array, "B T"], sharpness: float = 100.0
) -> Float[Array, ""]:
  """Mean over neighbours of one document, and over experts, of ``BCE_with_logits(alpha z_{t-1},
  sigmoid(alpha z_t))``; neither side is detached."""
  z = sharpness * logits.astype(jnp.float32)
  before, after = z[:, :-1], z[:, 1:]
  loss = jax.nn.softplus(before) - jax.nn.sigmoid(after) * before
  pair = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
  return jnp.sum(jnp.mean(loss, axis=-1) * pair) / jnp.maximum(jnp.sum(pair), 1)


def chunk_activation(
  logits: Float[Array, "B T E"], real: Bool[Array, "B T"], length: int = 64
) -> Float[Array, ""]:
  """``1 - mean_{chunk,e} prod_{t in chunk} (1 - s_{t,e})``: how likely a chunk touches an expert,
  were shares probabilities. Chunks begin at the row's first token; padding has s = 0."""
  s = jnp.where(real[..., None], shares(logits), 0.0)
  b, t, e = s.shape
  length = min(length, t)
  s = jnp.pad(s, ((0, 0), (0, -t % length), (0, 0))).reshape(b, -1, length, e)
  # log1p, not log(1 - s + eps): a chunk without active experts must give 0.
  untouched = jnp.exp(jnp.sum(jnp.log1p(-jnp.minimum(s, 1 - _EPS)), axis=2))
  counted = jnp.any(jnp.pad(real, ((0, 0), (0, -t % length))).reshape(b, -1, length), axis=2)
  return 1 - jnp.sum(jnp.mean(untouched, -1) * counted) / jnp.maximum(jnp.sum(counted), 1)


def chunk_sparsity(
  logits: Float[Array, "B T E"], segment_ids: Int[Array, "B T"], length: int
) -> Float[Array, ""]:
  """CLS_n: mean share of experts that n consecutive tokens of one document all leave idle; n = 1 is
  the token-level sparsity TLS. Over all windows of n tokens."""
  idle, segments = logits <= 0, segment_ids
  length = min(length, logits.shape[1])
  count = logits.shape[1] - length + 1
  windows = [idle[:, i : i + count] for i in range(length)]
  same = (segments[:, :count] == segments[:, length - 1 :]) & (segments[:, :count] > 0)
  fraction = jnp.mean(jnp.all(jnp.stack(windows), axis=0), axis=-1)
  return jnp.sum(fraction * same) / jnp.maximum(jnp.sum(same), 1)
