# SPDX-License-Identifier: Apache-2.0
"""How tokens see each other: sequence mixers behind one contract (``jaxdec.mixers.base``)."""

from __future__ import annotations

from typing import Any

from jaxdec.mixers.attention import Attention, AttentionConfig
from jaxdec.mixers.base import Mixer, Topology, ancestors_from_parents
from jaxdec.mixers.delta_tree import tree_delta_rule
from jaxdec.mixers.gated_delta import GatedDelta, GatedDeltaConfig
from jaxdec.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from jaxdec.mixers.linear_tree import tree_linear_attention
from jaxdec.mixers.norms import NormConfig
from jaxdec.mixers.rope import RopeConfig

_DEFAULT_NORM = NormConfig()
_MODULES = {
  AttentionConfig: Attention,
  LinearAttentionConfig: LinearAttention,
  GatedDeltaConfig: GatedDelta,
}


def build_mixer(
  config: AttentionConfig | LinearAttentionConfig | GatedDeltaConfig,
  dim: int,
  norm: NormConfig = _DEFAULT_NORM,
  dtype: Any = None,
  param_dtype: Any = None,
  **kwargs,
) -> Mixer:
  """The module of a mixer configuration; ``dim`` is the model width D."""
  dtypes = {k: v for k, v in {"dtype": dtype, "param_dtype": param_dtype}.items() if v is not None}
  return _MODULES[type(config)](config, dim, norm, **dtypes, **kwargs)


__all__ = [
  "Attention",
  "AttentionConfig",
  "GatedDelta",
  "GatedDeltaConfig",
  "LinearAttention",
  "LinearAttentionConfig",
  "Mixer",
  "NormConfig",
  "RopeConfig",
  "Topology",
  "ancestors_from_parents",
  "build_mixer",
  "tree_delta_rule",
  "tree_linear_attention",
]
