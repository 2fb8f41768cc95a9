# SPDX-License-Identifier: Apache-2.0
"""Clover-2 (arXiv 2408.00264): a small state carried from draft to draft, fed by drafted tokens.

With ``g_t`` the target's stream before its final norm and ``e(x)`` the LM head's row of token x
(frozen), the attention block of one key

  AD(s, e) = s + concat_h(cos(q_h, k_h) v_h),   q = Q RMS(s) + b,  k = K e + b,  v = V e + b

takes a token in (no softmax, no RoPE, no output projection):

  s_1 = RMS(layers(AD_1(g_t, e(x_{t+1}))))     two decoder layers, causal over t, cached
  y_1 = RMS_h(M_1 s_1)
  s_k = AD_2(s_{k-1}, e(x_{t+k})),   y_k = RMS_h(M_2 [s_k ; e(x_{t+k})])         k = 2, 3, ...

``W y_k``, W the target's LM head, guesses ``x_{t+1+k}``, and ``y_k`` the state ``h_{t+k}``. AD_2,
M_2 and RMS_h serve every depth, so depth is free at inference. Start: Q, K, M near the identity, V
near zero, layers and norms as the target's last ones where shapes agree.

The released code starts Q, K, V, M with ``U(0, 0.01)``, which shifts every state by a multiple of
the sum of its entries; here the noise is ``U(-0.01, 0.01)``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdec.drafting.base import Context, Params, Target
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.drafting.eagle import LayerDrafter, following
from jaxdec.drafting.hydra import PrefixState, draft_attention
from jaxdec.drafting.objectives import Objective, Term
from jaxdec.mixers import AttentionConfig, NormConfig
from jaxdec.mixers.base import gather_nodes
from jaxdec.mixers.norms import Dense, RMSNorm
from jaxdec.models.config import DecoderConfig, LayerConfig, MLPConfig
from jaxdec.models.decoder import Block, pattern


class TokenAttention(nn.Module):
  """``AD(s, e)``: adds to the state, head by head, what one token says."""

  num_heads: int
  norm: NormConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, s: Float[Array, "B T D"], e: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    dim, heads = s.shape[-1], (*s.shape[:-1], self.num_heads, -1)

    def project(name, x):
      return Dense(dim, ("embed", None), True, self.dtype, name=name)(x).reshape(heads)

    q, k, v = project("q", RMSNorm(self.norm, name="norm")(s)), project("k", e), project("v", e)
    squares = jnp.sum(q * q, -1, keepdims=True) * jnp.sum(k * k, -1, keepdims=True)
    cosine = jnp.sum(q * k, -1, keepdims=True) * jax.lax.rsqrt(squares + self.norm.eps**2)
    return s + (cosine * v).reshape(s.shape)


class Clover2Module(nn.Module):
  """Parameters, and the ways through them."""

  layer: LayerConfig
  num_layers: int
  num_heads: int
  dim: int
  norm: NormConfig
  dtype: jnp.dtype

  def setup(self):
    self.attend_first, self.attend_next = (
      TokenAttention(self.num_heads, self.norm, self.dtype) for _ in range(2)
    )
    self.blocks = [
      Block(self.layer, self.dim, self.norm, self.dtype) for _ in range(self.num_layers)
    ]
    self.state_norm, self.head_norm = RMSNorm(self.norm), RMSNorm(self.norm)
    self.mix_first, self.mix_next = (
      Dense(self.dim, ("embed", None), True, self.dtype) for _ in range(2)
    )

  def begin(self, g, e, positions, segment_ids=None) -> Float[Array, "B T D"]:
    """``s_1`` over whole sequences of (state t, token t + 1)."""
    x = self.attend_first(g, e)
    for block in self.blocks:
      x = block(x, positions, segment_ids)
    return self.state_norm(x)

  def read(self, g, e, caches, positions):
    """``s_1`` of the next slots, and the caches that hold them (position -1: padding)."""
    x, new = self.attend_first(g, e), []
    for block, cache in zip(self.blocks, caches):
      x, cache = block.extend(x, cache, positions)
      new.append(cache)
    return self.state_norm(x), tuple(new)

  def first(self, s) -> Float[Array, "... D"]:
    """``y_1``."""
    return self.head_norm(self.mix_first(s))

  def next(self, s, e, depth: int):
    """``s_k, y_k`` from ``s_{k-1}`` and the token drafted last."""
    del depth  # the same weights at every depth
    s = self.attend_next(s, e)
    return s, self.head_norm(self.mix_next(jnp.concatenate([s, e], axis=-1)))

  def __call__(self, g, e, positions):
    """Touches every parameter (for ``init``)."""
    s = self.begin(g, e, positions)
    return self.first(s), self.next(s, e, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clover2(LayerDrafter):
  """Clover-2.

  Attributes:
    target_layers: the target's last stream, before the final norm, is what is read.
    attention, hidden_dim, eps, num_layers: shape of the augmenting layers, and how many.
    num_splits: heads of the cosine attention, a divisor of D; the target's number of heads.
    init_noise: bound of the uniform noise around identity and zero at the start.
    depth_decay: 0.7 in the released trainer, for five depths.
  """

  name: ClassVar[str] = "clover2"

  target_layers: int
  num_splits: int
  num_layers: int = 2
  init_noise: float = 0.01
  num_heads: int = 5
  objective: Objective = (Term("smooth_l1", 10.0), Term("soft", 1.0))
  depth_decay: float = 0.7

  @classmethod
  def for_target(cls, config: DecoderConfig, **options) -> Clover2:
    mixer = config.layers[-1].mixer
    own = mixer if isinstance(mixer, AttentionConfig) else draft_attention(config)
    attention = options.setdefault("attention", own)
    options.setdefault("target_layers", config.num_layers)
    options.setdefault("hidden_dim", config.layers[-1].mlp.hidden_dim)
    options.setdefault("num_splits", math.gcd(attention.num_heads, config.dim))
    return super().for_target(config, **options)

  @property
  def capture(self) -> tuple[int, ...]:
    return (self.target_layers,)

  @property
  def depth_limit(self) -> int:
    return 1 << 10  # recurrent: no trained limit

  @property
  def module(self) -> nn.Module:
    return Clover2Module(
      LayerConfig(self.attention, MLPConfig(self.hidden_dim)),
      self.num_layers,
      self.num_splits,
      self.dim,
      NormConfig(self.eps),
      jnp.dtype(self.dtype),
    )

  def _init_module(self, rng: jax.Array) -> Params:
    x, positions = jnp.zeros((1, 2, self.dim), self.dtype), jnp.zeros((1, 2), jnp.int32)
    return self.module.init(rng, x, x, positions)["params"]

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    params = self._init_module(rng)
    norm = final_norm_scale(target)
    for name in ("state_norm", "head_norm"):
      params[name]["scale"] = params[name]["scale"].replace_boxed(norm)
    for i in range(self.num_layers):
      params[f"blocks_{i}"] = like_last_layer(params[f"blocks_{i}"], target)
    return near_identity(params, jax.random.fold_in(rng, 1), self.init_noise)

  def _apply(self, params, *args, method):
    return self.module.apply({"params": params}, *args, method=method)

  def _features(self, output):
    return output.features[0].astype(self.dtype)

  def _embed(self, target, tokens):
    return head_rows(target, tokens).astype(self.dtype)

  def head(self, params, target, depth, states):
    return self._unembed(target, states)

  def teacher_forced(self, params, target, output, batch, rng=None):
    g = jax.lax.stop_gradient(self._features(output))[:, :-1]
    e = jax.lax.stop_gradient(self._embed(target, batch["tokens"]))
    positions, segments = batch["positions"][:, :-1], batch["segment_ids"][:, :-1]
    s = self._apply(params, g, e[:, 1:], positions, segments, method="begin")[:, :-1]
    states = [self._apply(params, s, method="first")]
    for k in range(2, self.num_heads + 1):
      slots = e.shape[1] - 1 - k
      s, y = self._apply(params, s[:, :slots], e[:, k : k + slots], k, method="next")
      states.append(y)
    return states

  # Inference. Slot t holds (state of t, token t + 1); the last slot holds the root.

  def init_state(self, batch: int, capacity: int) -> PrefixState:
    hidden = jnp.zeros((batch, self.dim), self.dtype)
    return PrefixState(hidden, self._caches(batch, capacity, self.num_layers))

  def _read(self, params, state, features, next_tokens, count, target):
    """Reads the first ``count [B]`` of the new slots."""
    index = jnp.arange(next_tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(index < count[:, None], state.cache[0].length[:, None] + index, -1)
    e = self._embed(target, next_tokens)
    s, caches = self._apply(params, features, e, state.cache, positions, method="read")
    last = jnp.take_along_axis(s, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return PrefixState(jnp.where(count[:, None] > 0, last, state.hidden), caches)

  def start(self, params, state, prompt, output, target):
    features = self._features(output)
    return self._read(params, state, features, following(prompt), prompt.lengths, target)

  def observe(self, params, state, tree, accepted, output, context):
    features = gather_nodes(self._features(output), accepted.path)
    return self._read(params, state, features, accepted.tokens, accepted.count, context.target)

  def first(self, params, state, context: Context):
    s = state.hidden[:, None]
    return self.head(params, context.target, 1, self._apply(params, s, method="first"))[:, 0], s

  def step(self, params, state, context: Context):
    def feed(s, level, tokens, parents):
      e = self._embed(context.target, tokens)
      s, y = self._apply(params, take_nodes(s, parents), e, level + 1, method="next")
      return self.head(params, context.target, level + 1, y), s

    return feed


def head_rows(target: Target, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
  """Tokens as the LM head knows them: ``e(x) = W[x]``."""
  params = nn.unbox(target.params)
  if target.model.config.tie_embeddings:
    return params["embed"][tokens]
  return jnp.moveaxis(jnp.take(params["head"]["kernel"], tokens, axis=1), 0, -1)


def final_norm_scale(target: Target) -> Float[Array, "D"]:
  """What the target's final norm multiplies by."""
  scale = nn.unbox(target.params)["final_norm"]["scale"].astype(jnp.float32)
  return scale + 1 if target.model.config.norm.unit_offset else scale


def like_last_layer(block: Params, target: Target) -> Params:
  """Boxed ``block`` with the weights of the target's last layer, where it is of the same kind."""
  params, config = nn.unbox(target.params), target.model.config
  if "stack" in params:
    period = len(pattern(config.layers))
    last = jax.tree.map(lambda x: x[-1], params["stack"][f"block_{period - 1}"])
  else:
    last = params[f"layers_{config.num_layers - 1}"]

  def shapes(tree):
    return jax.tree.map(jnp.shape, tree)

  same = shapes(nn.unbox(block)) == shapes(last) and not config.norm.unit_offset
  if not same:
    return block
  return jax.tree.map(
    lambda box, x: box.replace_boxed(x.astype(jnp.float32)),
    block,
    last,
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  )


def near_identity(params: Params, rng: jax.Array, noise: float) -> Params:
  """Kernels of the token attentions and mixing matrices: identity (V: zero) plus uniform noise."""

  def start(box, key, eye):
    shape = box.unbox().shape
    kernel = jax.random.uniform(key, shape, minval=-noise, maxval=noise)
    return box.replace_boxed(kernel + eye * jnp.eye(*shape))

  kernels = [
    (name, *((part,) if part else ()), "kernel")
    for name in params
    for part in (("q", "k", "v") if name.startswith("attend") else ("",))
    if name.startswith(("attend", "mix"))
  ]
  for key, path in zip(jax.random.split(rng, len(kernels)), kernels):
    node = params
    for part in path[:-1]:
      node = node[part]
    node["kernel"] = start(node["kernel"], key, 0.0 if path[-2] == "v" else 1.0)
  return params
