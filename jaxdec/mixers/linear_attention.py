# SPDX-License-Identifier: Apache-2.0
"""Linear attention with decay as a mixer: linear attention, RetNet, Lightning, SSD-like, GLA.

The arithmetic is ``pallas_kernels.linear_attention`` and, for trees, ``jaxdec.mixers.linear_tree``;
this module holds the parameters. The state of a row is one matrix a kv head, whatever the number of
tokens read.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdec.errors import UserError, nearest
from jaxdec.mixers.base import Packing, Topology, gather_nodes
from jaxdec.mixers.gates import init_a_log, init_dt_bias
from jaxdec.mixers.linear_tree import leave_out, tree_linear_attention, update_state
from jaxdec.mixers.norms import Dense, NormConfig, RMSNorm
from jaxdec.mixers.rope import RopeConfig, apply_rope
from jaxdec.parallel.sequence import SequenceConfig, sharded
from pallas_kernels.linear_attention import linear_attention

_CHOICES = {
  "decay": ("none", "fixed", "data", "channel"),
  "feature_map": ("identity", "silu", "elu"),
}
_LADDERS = ("retention", "lightning")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
  """Linear attention, ``S_t = exp(g_t) S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t`` per head.

  Attributes:
    num_heads: N. head_dim: H, the key width. value_dim: value width per head (None: H).
    num_kv_heads: K, keys, values and decays shared by N / K query heads (None: N); the state is per
      kv head.
    decay: ``none`` (g = 0); ``fixed`` (a constant per kv head, see ``slopes``); ``data``: a scalar
      per kv head and token, ``g = -exp(A_log) * softplus(a(x) + dt_bias)`` (Mamba-2, 2405.21060);
      ``channel``: one per kv head, token and key channel, through a bottleneck of ``gate_rank``,
      ``g = log sigmoid(x W1 W2 + b) / gate_normalizer`` (GLA, 2312.06635, section 4.4).
    slopes: what ``fixed`` uses: ``retention``, ``g_h = log(1 - 2^(-5-h))`` (2307.08621);
      ``lightning``, ``g_h = -2^(-8(h+1)/K)``, completed as in ALiBi where K is no power of two
      (2401.04658); or K numbers ``s_h >= 0`` for ``g_h = -s_h``.
    feature_map: applied to q and k: ``identity``, ``silu`` or ``elu`` (``elu(x) + 1``, positive).
    normalize: divide by ``q_t z_t``, ``z_t`` the decayed sum of keys (2006.16236).
    output_norm: RMSNorm per head on the output. output_gate: times ``silu(gate(x))``.
    rope: rotary embedding of q and k, after the feature map; None: none.
    scale: factor on q (None: ``H ** -0.5``).
    chunk_size: tokens per chunk of the parallel form, a power of two; changes speed and rounding
      only. None: chosen for the platform.
  """

  num_heads: int
  head_dim: int
  num_kv_heads: int | None = None
  value_dim: int | None = None
  decay: Literal["none", "fixed", "data", "channel"] = "data"
  slopes: Literal["retention", "lightning"] | tuple[float, ...] = "retention"
  gate_rank: int = 16
  gate_normalizer: float = 16.0
  feature_map: Literal["identity", "silu", "elu"] = "silu"
  normalize: bool = False
  output_norm: bool = True
  output_gate: bool = True
  rope: RopeConfig | None = None
  scale: float | None = None
  chunk_size: int | None = None

  def __post_init__(self):
    def fail(message):
      raise UserError(f"LinearAttentionConfig: {message}.")

    for field, known in _CHOICES.items():
      value = getattr(self, field)
      if value not in known:
        fail(f"{field}={value!r}{nearest(str(value), known)} is not one of {', '.join(known)}")
    for field in ("num_heads", "head_dim", "kv_heads", "value_width", "gate_rank"):
      if getattr(self, field) < 1:
        fail(
          f"{field.replace('kv_heads', 'num_kv_heads')} must be at least 1, "
          f"got {getattr(self, field)}"
        )
    if not self.gate_normalizer > 0:
      fail(f"gate_normalizer must be positive, got {self.gate_normalizer}")
    size = self.chunk_size
    if size is not None and (size < 1 or size & (size - 1)):
      fail(f"chunk_size must be a power of two such as 64, or None, got {size}")
    if self.num_heads % self.kv_heads:
      fail(
        f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}; "
        "choose a divisor"
      )
    if isinstance(self.slopes, str):
      if self.slopes not in _LADDERS:
        fail(
          f"slopes={self.slopes!r}{nearest(self.slopes, _LADDERS)} is neither one of "
          f"{', '.join(_LADDERS)} nor a tuple of numbers"
        )
    elif len(self.slopes) != self.kv_heads or min(self.slopes) < 0:
      fail(f"slopes must be {self.kv_heads} numbers >= 0, one a kv head, got {self.slopes}")
    if self.normalize and (self.feature_map != "elu" or self.rope is not None):
      fail(
        "normalize=True divides by q.z, which is safe for positive features only; use "
        "feature_map='elu' and rope=None, or normalize=False"
      )

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def value_width(self) -> int:
    return self.head_dim if self.value_dim is None else self.value_dim


@struct.dataclass
class LinearState:
  """Decayed sum of key-value outer products; with ``normalize`` a last column sums the keys."""

  kv: Float[Array, "B K H V"]
  length: Int[Array, "B"]


@struct.dataclass
class LinearPending:
  """Keys, values and log-decays (None: no decay) of tree nodes."""

  k: Float[Array, "B M K H"]
  v: Float[Array, "B M K V"]
  log_decay: Float[Array, "B M K"] | Float[Array, "B M K H"] | None


def fixed_log_decay(config: LinearAttentionConfig) -> np.ndarray:
  """The constants ``g [K]`` of ``decay="fixed"``."""
  heads = config.kv_heads
  if config.slopes == "retention":
    return np.log1p(-(2.0 ** (-5.0 - np.arange(heads)))).astype(np.float32)
  if config.slopes == "lightning":
    return -np.asarray(_alibi_slopes(heads), np.float32)
  return -np.asarray(config.slopes, np.float32)


def _alibi_slopes(heads: int) -> list[float]:
  """``2^(-8(h+1)/n)``; between powers of two, every second slope of the next one fills up."""
  lower = 2 ** int(math.log2(heads))
  slopes = [2.0 ** (-8.0 * (h + 1) / lower) for h in range(lower)]
  if lower < heads:
    slopes += _alibi_slopes(2 * lower)[::2][: heads - lower]
  return slopes


class LinearAttention(nn.Module):
  """The mixer: projections around the recurrence; see ``jaxdec.mixers.base`` for the four calls."""

  config: LinearAttentionConfig
  dim: int
  norm: NormConfig = NormConfig()
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  sequence: SequenceConfig | None = None

  def setup(self):
    c = self.config

    def dense(features, axes):
      return Dense(features, axes, False, self.dtype, self.param_dtype)

    self.q = dense(c.num_heads * c.head_dim, ("embed", "heads"))
    self.k = dense(c.kv_heads * c.head_dim, ("embed", "kv_heads"))
    self.v = dense(c.kv_heads * c.value_width, ("embed", "kv_heads"))
    self.o = dense(self.dim, ("heads", "embed"))
    if c.output_gate:
      self.gate = dense(c.num_heads * c.value_width, ("embed", "heads"))
    if c.output_norm:
      self.o_norm = RMSNorm(self.norm, self.param_dtype)
    if c.decay == "data":
      # One scalar a head: kept whole and in float32, as rounding it would change the memory's span.
      self.a = Dense(c.kv_heads, ("embed", None), False, jnp.float32, self.param_dtype)
      for name, init in (("A_log", init_a_log), ("dt_bias", init_dt_bias)):
        init = nn.with_logical_partitioning(init, (None,))
        setattr(self, name, self.param(name, init, (c.kv_heads,), jnp.float32))
    elif c.decay == "channel":
      dtypes = (jnp.float32, self.param_dtype)  # float32: as above
      self.decay_down = Dense(c.gate_rank, ("embed", None), False, *dtypes)
      self.decay_up = Dense(c.kv_heads * c.head_dim, (None, "kv_heads"), True, *dtypes)

  def _project(self, x, positions):
    """``q, k, v, g``; with ``normalize`` v gets a column of ones, so that S also sums the keys."""
    c, (b, t, _) = self.config, x.shape
    q = self._features(self.q(x).reshape(b, t, c.num_heads, c.head_dim))
    k = self._features(self.k(x).reshape(b, t, c.kv_heads, c.head_dim))
    v = self.v(x).reshape(b, t, c.kv_heads, c.value_width)
    if c.rope is not None:
      q, k = apply_rope(q, positions, c.rope), apply_rope(k, positions, c.rope)
    if c.normalize:
      v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    return q, k, v, self._log_decay(x)

  def _features(self, x):
    if self.config.feature_map == "silu":
      return jax.nn.silu(x)
    return jax.nn.elu(x) + 1 if self.config.feature_map == "elu" else x

  def _log_decay(self, x):
    c = self.config
    if c.decay == "none":
      return None
    shape = (*x.shape[:2], c.kv_heads)
    if c.decay == "fixed":
      return jnp.broadcast_to(jnp.asarray(fixed_log_decay(c))[None, None], shape)
    if c.decay == "channel":
      gate = self.decay_up(self.decay_down(x.astype(jnp.float32)))
      return jax.nn.log_sigmoid(gate).reshape(*shape, c.head_dim) / c.gate_normalizer
    step = jax.nn.softplus(self.a(x.astype(jnp.float32)) + self.dt_bias[None, None])
    return -jnp.exp(self.A_log)[None, None] * step

  def _output(self, out, x):
    c = self.config
    if c.normalize:
      out = out[..., :-1] / (out[..., -1:] + 1e-6)
    if c.output_norm:
      out = self.o_norm(out)
    out = out.astype(self.dtype).reshape(*x.shape[:2], -1)
    if c.output_gate:
      out = out * jax.nn.silu(self.gate(x))
    return self.o(out)

  def _recurrence(self, q, k, v, g, **kwargs):
    """The op, which keeps a state for every query head: those of a group are equal."""
    c, group = self.config, self.config.num_heads // self.config.kv_heads
    if g is not None:
      g = jnp.repeat(g, group, axis=2)
    out, state = linear_attention(
      q, k, v, log_decay=g, scale=c.scale, chunk_size=c.chunk_size, **kwargs
    )
    return out, state[:, ::group]

  def __call__(self, x, positions, segment_ids=None):
    c = self.config
    q, k, v, g = self._project(x, positions)
    if sharded.ways(self.sequence) > 1:
      out = sharded.recurrence(
        q, k, v,
        log_decay=g, segment_ids=segment_ids, scale=c.scale, chunk_size=c.chunk_size,
        config=self.sequence,
      )  # fmt: skip
    else:
      out, _ = self._recurrence(q, k, v, g, segment_ids=segment_ids)
    return self._output(out, x)

  def init_state(self, batch, capacity, dtype=None):
    """The state is float32 whatever ``dtype``: it is a sum over the whole past."""
    del capacity, dtype
    c = self.config
    shape = (batch, c.kv_heads, c.head_dim, c.value_width + c.normalize)
    return LinearState(jnp.zeros(shape, jnp.float32), jnp.zeros(batch, jnp.int32))

  def extend(self, x, state, positions):
    q, k, v, g = self._project(x, positions)
    valid = positions >= 0
    k, v, g = leave_out(k, v, g, valid)
    out, kv = self._recurrence(q, k, v, g, initial_state=state.kv)
    return self._output(out, x), LinearState(kv, state.length + valid.sum(1, dtype=jnp.int32))

  def read_packed(self, x, state, packing: Packing):
    q, k, v, g = jax.tree.map(packing.unpack, self._project(x, packing.positions))
    k, v, g = leave_out(k, v, g, packing.valid)
    out, kv = self._recurrence(q, k, v, g, initial_state=state.kv)
    return self._output(packing.pack(out), x), LinearState(kv, state.length + packing.length)

  def verify(self, x, state, topology: Topology):
    q, k, v, g = self._project(x, state.length[:, None] + topology.depth)
    out = tree_linear_attention(q, k, v, g, state.kv, topology, scale=self.config.scale)
    return self._output(out, x), LinearPending(k, v, g)

  def commit(self, state, pending, path, count):
    """Replays the accepted path, at most P steps, as one masked sum."""
    kept = jax.tree.map(lambda x: gather_nodes(x, path), pending)
    valid = jnp.arange(path.shape[1])[None] < count[:, None]
    kv = update_state(state.kv, kept.k, kept.v, log_decay=kept.log_decay, valid=valid)
    return LinearState(kv, state.length + count.astype(jnp.int32))
