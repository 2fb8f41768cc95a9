# SPDX-License-Identifier: Apache-2.0
"""Linear attention with scalar decay as a sequence mixer (linear attention, RetNet, Lightning, SSD-like).

The mixer's arithmetic is in ``jaxdec.mixers.linear_recurrence``; this module adds parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxdec.errors import UserError, nearest
from jaxdec.mixers.rope import RopeConfig

_CHOICES = {
  "decay": ("none", "fixed", "data"),
  "slopes": ("retention", "lightning"),
  "feature_map": ("identity", "silu", "elu"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
  """Linear attention, ``S_t = exp(g_t) S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t`` per head.

  Attributes:
    num_heads: N. head_dim: H, the key width. num_kv_heads: K, keys and values shared by N / K query
      heads (None: N); the state is per kv head.
    value_dim: value width per head (None: head_dim).
    decay: ``none`` (g = 0); ``fixed`` (one constant per kv head, see ``slopes``); ``data``
      (``g = -exp(A_log) * softplus(a(x) + dt_bias)``, one scalar per kv head and token, as in Mamba-2).
    slopes: the ``fixed`` ladder: ``retention`` ``log(1 - 2^(-5-h))`` or ``lightning``, minus the ALiBi
      slopes ``2^(-8(h+1)/K)``.
    feature_map: applied to q and k: ``identity``, ``silu`` or ``elu`` (``elu(x) + 1``, positive).
    normalize: divide by ``q_t z_t``, ``z_t`` the decayed sum of keys (needs ``feature_map="elu"``).
    output_norm: RMSNorm per head on the output. output_gate: times ``silu(gate(x))``.
    rope: rotary embedding of q and k, after the feature map; None: none.
    scale: factor on q (None: ``head_dim ** -0.5``).
    chunk_size: tokens per chunk of the parallel form; changes speed, not results.
  """

  num_heads: int
  head_dim: int
  num_kv_heads: int | None = None
  value_dim: int | None = None
  decay: Literal["none", "fixed", "data"] = "data"
  slopes: Literal["retention", "lightning"] = "retention"
  feature_map: Literal["identity", "silu", "elu"] = "silu"
  normalize: bool = False
  output_norm: bool = True
  output_gate: bool = True
  rope: RopeConfig | None = None
  scale: float | None = None
  chunk_size: int = 64

  def __post_init__(self):
    for field, known in _CHOICES.items():
      value = getattr(self, field)
      if value not in known:
        raise UserError(f"LinearAttentionConfig: {field}={value!r}{nearest(str(value), known)}; "
                        f"choose one of {', '.join(known)}.")
    for field in ("num_heads", "head_dim", "kv_heads", "value_width", "chunk_size"):
      if getattr(self, field) < 1:
        raise UserError(f"LinearAttentionConfig: {field} must be at least 1, got "
                        f"{getattr(self, field)}.")
    if self.num_heads % self.kv_heads:
      raise UserError(f"LinearAttentionConfig: num_heads={self.num_heads} is not a multiple of "
                      f"num_kv_heads={self.kv_heads}; make it one.")
    if self.normalize and (self.feature_map != "elu" or self.rope is not None):
      raise UserError("LinearAttentionConfig: normalize=True divides by q.z, which is only safe for "
                      "positive features; use feature_map='elu' and rope=None, or normalize=False.")

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def value_width(self) -> int:
    return self.head_dim if self.value_dim is None else self.value_dim
