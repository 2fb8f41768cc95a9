# SPDX-License-Identifier: Apache-2.0
"""How tokens see each other: sequence mixers behind one contract (``jaxdec.mixers.base``)."""

from jaxdec.mixers.attention import Attention, AttentionConfig
from jaxdec.mixers.base import Mixer, Topology, ancestors_from_parents
from jaxdec.mixers import linear_attention as _linear
from jaxdec.mixers.linear_attention import LinearAttentionConfig
from jaxdec.mixers.norms import NormConfig
from jaxdec.mixers.rope import RopeConfig

_MODULES = {AttentionConfig: Attention, LinearAttentionConfig: getattr(_linear, 'LinearAttention', None)}


def build_mixer(config, dim, norm=NormConfig(), dtype=None, param_dtype=None, **kwargs) -> Mixer:
  """The module of a mixer configuration; ``dim`` is the model width D."""
  dtypes = {k: v for k, v in {"dtype": dtype, "param_dtype": param_dtype}.items() if v is not None}
  return _MODULES[type(config)](config, dim, norm, **dtypes, **kwargs)


__all__ = [
  "Attention",
  "AttentionConfig",
  "LinearAttentionConfig",
  "Mixer",
  "NormConfig",
  "RopeConfig",
  "Topology",
  "ancestors_from_parents",
  "build_mixer",
]
