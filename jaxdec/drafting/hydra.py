# SPDX-License-Identifier: Apache-2.0
"""Hydra and Hydra++ (arXiv 2402.05109): Medusa heads that also read the tokens already drafted.

Head k = 1..K at slot t reads ``x = [z_t ; E[x_{t+1}] ; ... ; E[x_{t+k}]]``, guesses ``x_{t+1+k}``:

  u = R x + r + SiLU(A x + b)              R [(k+1)D, D] learned, A zero at the start
  u <- u + SiLU(A' u + b')                 num_blocks - 1 times, zero at the start
  logits = u W_k + w_k                     W_k starts as the LM head

Hydra: ``z_t = h_t``, the target's post-norm state. Hydra++: ``z = PrefixLayer(h)``, one more
decoder layer over the target's states with its own cache, deeper heads, and the target's
distributions as labels.
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
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.drafting.medusa import own_head
from jaxdec.drafting.objectives import Objective
from jaxdec.drafting.trained import TrainedDrafter, embed, last_accepted, lm_head_kernel
from jaxdec.mixers import AttentionConfig, NormConfig, build_mixer
from jaxdec.mixers.base import gather_nodes
from jaxdec.mixers.norms import RMSNorm
from jaxdec.models.config import DecoderConfig, LayerConfig, MLPConfig
from jaxdec.models.decoder import Block


@struct.dataclass
class HydraState:
  """``z`` at the token before the root."""

  hidden: Float[Array, "B D"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hydra(TrainedDrafter):
  """Hydra heads.

  Attributes:
    num_blocks: n, MLP blocks per head, the dimension-reducing one included.
    share_head: all heads read the target's own LM head (frozen); see ``Medusa``.
    init: ``identity`` starts ``R`` as ``[I | 0]``, so that every head starts as the LM head on
      ``z`` (a Medusa head); ``fan_in`` draws it from ``U(+-1/sqrt(fan-in))`` as the paper's code
      does, and needs many more steps.
    dropout: before each block and before the LM head, in training.
  """

  name: ClassVar[str] = "hydra"
  sequential: ClassVar[bool] = True

  num_blocks: int = 1
  share_head: bool = False
  init: Literal["identity", "fan_in"] = "identity"
  dropout: float = 0.0

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    keys = jax.random.split(rng, self.num_heads)
    return {f"head_{k}": self._init_head(keys[k], k, target) for k in range(self.num_heads)}

  def _init_head(self, rng, k, target):
    width = (k + 2) * self.dim
    if self.init == "identity":
      reduce = {"kernel": jnp.eye(width, self.dim), "bias": jnp.zeros(self.dim)}
    else:
      bound, (kernel_rng, bias_rng) = width**-0.5, jax.random.split(rng)
      reduce = {
        "kernel": jax.random.uniform(kernel_rng, (width, self.dim), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_rng, (self.dim,), minval=-bound, maxval=bound),
      }
    params = {"reduce": reduce}
    for i in range(self.num_blocks):
      rows = width if i == 0 else self.dim
      params[f"block_{i}"] = {"kernel": jnp.zeros((rows, self.dim)), "bias": jnp.zeros(self.dim)}
    params = jax.tree.map(
      lambda x: nn.LogicallyPartitioned(x, ("embed", None) if x.ndim == 2 else (None,)), params
    )
    if not self.share_head:
      kernel = lm_head_kernel(target)
      params["lm_head"] = {
        "kernel": nn.LogicallyPartitioned(kernel, ("embed", "vocab")),
        "bias": nn.LogicallyPartitioned(jnp.zeros(kernel.shape[1]), ("vocab",)),
      }
    return params

  def _mlp(self, params, depth, x, rng=None):
    """``[..., (depth+1) D] -> [..., D]``, the blocks of head ``depth``."""
    head = params[f"head_{depth - 1}"]

    def affine(name, y):
      return y @ head[name]["kernel"].astype(y.dtype) + head[name]["bias"].astype(y.dtype)

    keys = (
      [None] * (self.num_blocks + 1)
      if rng is None
      else jax.random.split(jax.random.fold_in(rng, depth), self.num_blocks + 1)
    )
    x = _dropout(x, self.dropout, keys[0])
    x = affine("reduce", x) + jax.nn.silu(affine("block_0", x))
    for i in range(1, self.num_blocks):
      x = _dropout(x, self.dropout, keys[i])
      x = x + jax.nn.silu(affine(f"block_{i}", x))
    return _dropout(x, self.dropout, keys[-1])

  def head(self, params, target, depth, states):
    if self.share_head:
      return target.model.apply({"params": target.params}, states, method="unembed")
    return own_head(params[f"head_{depth - 1}"]["lm_head"], states, self.logit_cap)

  def teacher_forced(self, params, target, output, batch, rng=None):
    z = self._prefix(params, jax.lax.stop_gradient(output.hidden).astype(self.dtype), batch)
    tokens = jax.lax.stop_gradient(embed(target, batch["tokens"], self.dtype))
    states = []
    for k in range(1, self.num_heads + 1):
      slots = tokens.shape[1] - 1 - k
      read = [z[:, :slots], *(tokens[:, i : i + slots] for i in range(1, k + 1))]
      states.append(self._mlp(params, k, jnp.concatenate(read, axis=-1), rng))
    return states

  def _prefix(self, params, hidden, batch):
    """``h -> z`` over whole sequences."""
    return hidden

  def init_state(self, batch: int, capacity: int) -> Any:
    return HydraState(jnp.zeros((batch, self.dim), self.dtype))

  def start(self, params, state, prompt, output, target):
    return HydraState(output.hidden[:, 0].astype(self.dtype))

  def observe(self, params, state, tree, accepted, output, context):
    hidden = last_accepted(output.hidden, accepted.path, accepted.count).astype(self.dtype)
    return HydraState(jnp.where(accepted.count[:, None] > 0, hidden, state.hidden))

  def first(self, params, state, context: Context):
    root = embed(context.target, context.root[:, None], self.dtype)
    read = jnp.concatenate([state.hidden[:, None], root], axis=-1)  # [B, 1, 2D]
    logits = self.head(params, context.target, 1, self._mlp(params, 1, read))
    return logits[:, 0], read

  def step(self, params, state, context: Context):
    def feed(read, level, tokens, parents):
      # ``read [B,n,(level+1)D]``: what the parents' head read; append the drafted tokens to it.
      drafted = embed(context.target, tokens, self.dtype)
      read = jnp.concatenate([take_nodes(read, parents), drafted], axis=-1)
      depth = level + 1
      return self.head(params, context.target, depth, self._mlp(params, depth, read)), read

    return feed


class PrefixLayer(nn.Module):
  """A one-layer Llama over the target's post-norm states: block and final RMSNorm."""

  config: LayerConfig
  dim: int
  norm: NormConfig
  dtype: jnp.dtype

  def setup(self):
    self.block = Block(self.config, self.dim, self.norm, self.dtype)
    self.final_norm = RMSNorm(self.norm)

  def __call__(self, hidden, positions, segment_ids=None):
    return self.final_norm(self.block(hidden, positions, segment_ids))

  def extend(self, hidden, state, positions):
    x, state = self.block.extend(hidden, state, positions)
    return self.final_norm(x), state


@struct.dataclass
class PrefixState:
  """``z`` at the token before the root, and the prefix layer's cache (committed tokens only)."""

  hidden: Float[Array, "B D"]
  cache: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class HydraPlusPlus(Hydra):
  """Hydra++. ``attention`` and ``hidden_dim`` shape the prefix layer.

  The prefix layer's two output projections start at zero, so that ``z`` starts as ``RMSNorm(h)``
  (the released code starts them at random).
  """

  name: ClassVar[str] = "hydra++"
  needs_prompt_hidden: ClassVar[bool] = True

  num_blocks: int = 4
  objective: Objective = "soft"
  dropout: float = 0.2
  attention: AttentionConfig
  hidden_dim: int
  eps: float = 1e-6

  @classmethod
  def for_target(cls, config: DecoderConfig, **options) -> HydraPlusPlus:
    options.setdefault("attention", draft_attention(config))
    options.setdefault("hidden_dim", config.layers[0].mlp.hidden_dim)
    options.setdefault("eps", config.norm.eps)
    return super().for_target(config, **options)

  @property
  def _layer(self) -> PrefixLayer:
    config = LayerConfig(self.attention, MLPConfig(self.hidden_dim))
    return PrefixLayer(config, self.dim, NormConfig(self.eps), jnp.dtype(self.dtype))

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    x, positions = jnp.zeros((1, 2, self.dim), self.dtype), jnp.zeros((1, 2), jnp.int32)
    layer = self._layer.init(jax.random.fold_in(rng, self.num_heads), x, positions)["params"]
    for branch, name in (("mixer", "o"), ("mlp", "down")):
      layer["block"][branch][name] = jax.tree.map(jnp.zeros_like, layer["block"][branch][name])
    return {**super().init_boxed(rng, target), "prefix": layer}

  def _prefix(self, params, hidden, batch):
    return self._layer.apply(
      {"params": params["prefix"]}, hidden, batch["positions"], batch["segment_ids"]
    )

  def init_state(self, batch: int, capacity: int) -> PrefixState:
    mixer = build_mixer(self.attention, self.dim, parent=None)
    cache = mixer.init_state(batch, capacity, jnp.dtype(self.dtype))
    return PrefixState(jnp.zeros((batch, self.dim), self.dtype), cache)

  def _read(self, params, state, hidden, count):
    """Reads the first ``count [B]`` of the new states ``hidden [B,P,D]`` into the cache."""
    index = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(index < count[:, None], state.cache.length[:, None] + index, -1)
    z, cache = self._layer.apply(
      {"params": params["prefix"]},
      hidden.astype(self.dtype),
      state.cache,
      positions,
      method="extend",
    )
    last = jnp.take_along_axis(z, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return PrefixState(jnp.where(count[:, None] > 0, last, state.hidden), cache)

  def start(self, params, state, prompt, output, target):
    return self._read(params, state, output.hidden, prompt.lengths)

  def observe(self, params, state, tree, accepted, output, context):
    return self._read(params, state, gather_nodes(output.hidden, accepted.path), accepted.count)


def draft_attention(config: DecoderConfig) -> AttentionConfig:
  """Attention for a drafter's own layer: the target's head shape, full causal, plain."""
  for layer in config.layers:
    if isinstance(layer.mixer, AttentionConfig):
      m = layer.mixer
      return AttentionConfig(
        m.num_heads, m.num_kv_heads, m.head_dim, **({} if m.rope is None else {"rope": m.rope})
      )
  head_dim = min(64, config.dim)
  heads = max(1, config.dim // head_dim)
  return AttentionConfig(heads, heads, head_dim)


def _dropout(x, rate, rng):
  if rng is None or rate == 0:
    return x
  keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
