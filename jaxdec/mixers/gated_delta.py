# SPDX-License-Identifier: Apache-2.0
"""The delta rule as a mixer: DeltaNet, Gated DeltaNet (Qwen3-Next's layer), Kimi Delta Attention.

  q, k, v = silu(conv(W x)),  q and k of norm 1     a convolution over the last few tokens
  S <- exp(g) S;  S <- S + beta k^T (v - k S)       forget, then replace what k reads by v
  o = W_o (RMSNorm(q S / sqrt(H)) * silu(W_z x))

The arithmetic is ``pallas_kernels.delta_rule`` and, for trees, ``jaxdec.mixers.delta_tree``; this
module holds the parameters. The state of a row is one matrix a value head and the last inputs of
the convolution, whatever the number of tokens read.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdec.errors import UserError, nearest
from jaxdec.mixers.base import Packing, Topology, gather_nodes
from jaxdec.mixers.delta_tree import tree_delta_rule, tree_short_convolution
from jaxdec.mixers.gates import init_a_log, init_dt_bias
from jaxdec.mixers.norms import Dense, NormConfig, RMSNorm
from jaxdec.parallel.sequence import SequenceConfig, sharded
from jaxdec.parallel.sequence.halo import short_convolution
from pallas_kernels.delta_rule import CHUNKS, delta_rule

_GATES = ("scalar", "channel", "none")
_OUTPUTS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig:
  """Gated DeltaNet, ``S_t = (I - beta_t k_t^T k_t) exp(g_t) S_{t-1} + beta_t k_t^T v_t`` per head.

  Attributes:
    num_heads: K, heads of queries and keys. head_dim: H, their width.
    num_v_heads: N, heads of values, states, gates and outputs, a multiple of K (None: K); each
      query and key serves N / K of them. value_dim: V, their width (None: H).
    gate: ``scalar``: one log-decay a value head and token, ``g = -exp(A_log) softplus(a(x) +
      dt_bias)`` (Gated DeltaNet, 2412.06464); ``channel``: one per key channel too, ``a`` through a
      bottleneck of ``gate_rank`` (Kimi Delta Attention, 2510.26692); ``none``: g = 0 (DeltaNet,
      2406.06484).
    gate_rank: None: H.
    conv_width: tokens under the causal depthwise convolution of q, k and v.
    output_gate: the function of ``z(x)`` that the normalised output is multiplied by (Kimi Linear:
      ``sigmoid``); None: no gate (DeltaNet).
    negative_eigenvalues: beta reaches from 0 to 2 in place of 1 (2411.12537).
    chunk_size: tokens per chunk of the parallel form; changes speed and rounding only. None: chosen
      for the platform.
  """

  num_heads: int
  head_dim: int
  num_v_heads: int | None = None
  value_dim: int | None = None
  gate: Literal["scalar", "channel", "none"] = "scalar"
  gate_rank: int | None = None
  conv_width: int = 4
  output_gate: Literal["silu", "sigmoid"] | None = "silu"
  negative_eigenvalues: bool = False
  chunk_size: int | None = None

  def __post_init__(self):
    def fail(message):
      raise UserError(f"GatedDeltaConfig: {message}.")

    for field, known in (("gate", _GATES), ("output_gate", (*_OUTPUTS, None))):
      value = getattr(self, field)
      if value not in known:
        names = ", ".join(map(str, known))
        fail(f"{field}={value!r}{nearest(str(value), map(str, known))} is not one of {names}")
    for field in ("num_heads", "head_dim", "num_v_heads", "value_dim", "gate_rank", "conv_width"):
      if getattr(self, field) is not None and getattr(self, field) < 1:
        fail(f"{field} must be at least 1, got {getattr(self, field)}")
    if self.v_heads % self.num_heads:
      fail(
        f"num_v_heads={self.num_v_heads} is not a multiple of num_heads={self.num_heads}; "
        "choose a multiple, or None for as many"
      )
    if self.chunk_size not in (None, *CHUNKS):
      fail(f"chunk_size must be one of {CHUNKS} or None, got {self.chunk_size}")

  @property
  def v_heads(self) -> int:
    return self.num_heads if self.num_v_heads is None else self.num_v_heads

  @property
  def value_width(self) -> int:
    return self.head_dim if self.value_dim is None else self.value_dim

  @property
  def channels(self) -> int:
    """C, all channels of q, k and v together: what the convolution runs over."""
    return 2 * self.num_heads * self.head_dim + self.v_heads * self.value_width


@struct.dataclass
class DeltaState:
  """What keys hold, and the convolution's last inputs (zeros before the first token)."""

  kv: Float[Array, "B N H V"]
  tail: Float[Array, "B w-1 C"]
  length: Int[Array, "B"]


@struct.dataclass
class DeltaPending:
  """Of tree nodes: inputs of the convolution, keys, values, betas and log-decays (None: none)."""

  inputs: Float[Array, "B M C"]
  k: Float[Array, "B M K H"]
  v: Float[Array, "B M N V"]
  beta: Float[Array, "B M N"]
  log_decay: Float[Array, "B M N"] | Float[Array, "B M N H"] | None


def unit_norm(x: Float[Array, "... H"], eps: float = 1e-6) -> Float[Array, "... H"]:
  """``x / sqrt(sum(x^2) + eps)``."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)


def _init_taps(key, shape, dtype):
  """Uniform in +-1/sqrt(w): the fan-in of a depthwise convolution is its width."""
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class GatedDelta(nn.Module):
  """The mixer: projections around the recurrence; see ``jaxdec.mixers.base`` for the four calls."""

  config: GatedDeltaConfig
  dim: int
  norm: NormConfig = NormConfig()
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  sequence: SequenceConfig | None = None

  def setup(self):
    c, named = self.config, nn.with_logical_partitioning

    def dense(features, axes):
      return Dense(features, axes, False, self.dtype, self.param_dtype)

    def gate(features):  # float32: rounding decays and betas would change the memory's span
      return Dense(features, ("embed", None), False, jnp.float32, self.param_dtype)

    # Channels lie by key head (its q, its k, the values it serves), so that a shard of them holds
    # whole heads, and one convolution with one halo serves all three.
    self.qkv = dense(c.channels, ("embed", "heads"))
    self.taps = self.param(
      "taps", named(_init_taps, (None, "heads")), (c.conv_width, c.channels), self.param_dtype
    )
    self.b = gate(c.v_heads)
    if c.gate != "none":
      self.A_log = self.param("A_log", named(init_a_log, (None,)), (c.v_heads,), jnp.float32)
      width = c.v_heads * (c.head_dim if c.gate == "channel" else 1)
      self.dt_bias = self.param("dt_bias", named(init_dt_bias, (None,)), (width,), jnp.float32)
      if c.gate == "channel":
        self.a_down = gate(c.head_dim if c.gate_rank is None else c.gate_rank)
        self.a_up = Dense(width, (None, "heads"), False, jnp.float32, self.param_dtype)
      else:
        self.a = gate(width)
    self.o_norm = RMSNorm(self.norm, self.param_dtype)
    if c.output_gate is not None:
      self.z = dense(c.v_heads * c.value_width, ("embed", "heads"))
    self.o = dense(self.dim, ("heads", "embed"))

  def _heads(self, y):
    """Of the convolution's output: ``q, k [B,T,K,H]`` of norm 1, ``v [B,T,N,V]``."""
    c = self.config
    y = jax.nn.silu(y.astype(jnp.float32)).reshape(*y.shape[:2], c.num_heads, -1)
    q, k, v = jnp.split(y, [c.head_dim, 2 * c.head_dim], axis=-1)
    v = v.reshape(*v.shape[:2], c.v_heads, c.value_width)
    return tuple(x.astype(self.dtype) for x in (unit_norm(q), unit_norm(k), v))

  def _gates(self, x):
    """``beta [B,T,N]`` and the log-decay ``[B,T,N]`` or ``[B,T,N,H]`` (None: none)."""
    c, x = self.config, x.astype(jnp.float32)
    beta = jax.nn.sigmoid(self.b(x)) * (2.0 if c.negative_eigenvalues else 1.0)
    if c.gate == "none":
      return beta, None
    a = self.a_up(self.a_down(x)) if c.gate == "channel" else self.a(x)
    step = jax.nn.softplus(a + self.dt_bias[None, None])
    rate = jnp.exp(self.A_log)[None, None]
    if c.gate == "channel":
      step, rate = step.reshape(*beta.shape, c.head_dim), rate[..., None]
    return beta, -rate * step

  def _output(self, out, x):
    c = self.config
    out = self.o_norm(out).astype(self.dtype).reshape(*x.shape[:2], -1)
    if c.output_gate is not None:
      out = out * _OUTPUTS[c.output_gate](self.z(x))
    return self.o(out)

  def __call__(self, x, positions, segment_ids=None):
    c = self.config
    mixed = sharded.short_convolution(
      self.qkv(x), self.taps, segment_ids=segment_ids, config=self.sequence
    )
    q, k, v = self._heads(mixed)
    beta, g = self._gates(x)
    options = {"log_decay": g, "segment_ids": segment_ids, "chunk_size": c.chunk_size}
    if sharded.ways(self.sequence) > 1:
      out = sharded.recurrence(q, k, v, beta=beta, config=self.sequence, **options)
    else:
      out, _ = delta_rule(q, k, v, beta, **options)
    return self._output(out, x)

  def init_state(self, batch, capacity, dtype=None):
    """The matrices are float32 whatever ``dtype``: they are sums over the whole past."""
    del capacity
    c = self.config
    kv = jnp.zeros((batch, c.v_heads, c.head_dim, c.value_width), jnp.float32)
    tail = jnp.zeros((batch, c.conv_width - 1, c.channels), dtype or self.dtype)
    return DeltaState(kv, tail, jnp.zeros(batch, jnp.int32))

  def _advance(self, state, inputs, q, k, v, beta, g, count):
    """Outputs of the next T tokens, and the state after the first ``count [B]`` of them."""
    valid = (jnp.arange(inputs.shape[1])[None] < count[:, None])[..., None]
    if g is not None:
      g = jnp.where(valid if g.ndim == 3 else valid[..., None], g, 0)
    # beta = g = 0: the token leaves the state unchanged, whatever its key.
    out, kv = delta_rule(
      q, k, v, jnp.where(valid, beta, 0),
      log_decay=g, initial_state=state.kv, chunk_size=self.config.chunk_size,
    )  # fmt: skip
    rows = jnp.concatenate([state.tail, inputs.astype(state.tail.dtype)], axis=1)
    tail = gather_nodes(rows, count[:, None] + jnp.arange(state.tail.shape[1])[None])
    return out, DeltaState(kv, tail, state.length + count)

  def extend(self, x, state, positions):
    inputs = self.qkv(x)
    q, k, v = self._heads(short_convolution(inputs, self.taps, initial=state.tail))
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    out, state = self._advance(state, inputs, q, k, v, *self._gates(x), count)
    return self._output(out, x), state

  def read_packed(self, x, state, packing: Packing):
    inputs, *gates = jax.tree.map(packing.unpack, (self.qkv(x), *self._gates(x)))
    q, k, v = self._heads(short_convolution(inputs, self.taps, initial=state.tail))
    out, state = self._advance(state, inputs, q, k, v, *gates, packing.length)
    return self._output(packing.pack(out), x), state

  def verify(self, x, state, topology: Topology):
    inputs = self.qkv(x)
    q, k, v = self._heads(tree_short_convolution(inputs, self.taps, state.tail, topology))
    beta, g = self._gates(x)
    out = tree_delta_rule(q, k, v, beta, g, state.kv, topology)
    return self._output(out, x), DeltaPending(inputs, k, v, beta, g)

  def commit(self, state, pending, path, count):
    """Replays the accepted path."""
    kept = jax.tree.map(lambda x: gather_nodes(x, path), pending)
    _, state = self._advance(
      state, kept.inputs, kept.k, kept.k, kept.v, kept.beta, kept.log_decay, count.astype(jnp.int32)
    )
    return state
