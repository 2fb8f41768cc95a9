# SPDX-License-Identifier: Apache-2.0
"""A 1B-parameter hybrid for very long sequences, to be planned or trained.

  jaxdec plan experiments/plan/config.py:2m --topology v5p:4x8x8
  jaxdec plan experiments/plan/config.py:1m --topology v5p:4x4x4 --price 4.2

The sizes are those of Linear-Llama3-1B (LASP-2, arXiv 2502.07563): 16 layers, width 2048, 16 heads,
Llama 3's vocabulary; three Lightning-type layers (fixed decay), then one of softmax, four times.
"""

from __future__ import annotations

from jaxdec.errors import UserError, nearest
from jaxdec.mixers.attention import AttentionConfig
from jaxdec.mixers.linear_attention import LinearAttentionConfig
from jaxdec.models.config import DecoderConfig, LayerConfig, MLPConfig
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.training import MeshConfig, Recipe, TrainerConfig

MLP = MLPConfig(5504)
LINEAR = LayerConfig(
  LinearAttentionConfig(num_heads=16, head_dim=128, decay="fixed", slopes="lightning"), MLP
)
SOFTMAX = LayerConfig(AttentionConfig(num_heads=16, num_kv_heads=4, head_dim=128), MLP)

# tokens, then devices along the axes.
PRESETS = {
  "2m": (2**21, MeshConfig(seq=256)),
  "1m": (2**20, MeshConfig(seq=64)),
  "tiny": (2**14, MeshConfig(seq=4)),
}


def model(max_length: int = 2**21, tiny: bool = False) -> DecoderConfig:
  """1.2B parameters, or the same pattern small."""
  if tiny:
    linear = LayerConfig(LinearAttentionConfig(num_heads=2, head_dim=128), MLPConfig(512))
    softmax = LayerConfig(
      AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=128), MLPConfig(512)
    )
    layers, width, vocabulary = (linear, softmax), 256, 4096
  else:
    layers, width, vocabulary = (LINEAR, LINEAR, LINEAR, SOFTMAX) * 4, 2048, 128256
  return DecoderConfig(
    vocab_size=vocabulary, dim=width, layers=layers, tie_embeddings=True, max_length=max_length
  )


def get_config(preset: str) -> Recipe:
  if preset not in PRESETS:
    raise UserError(
      f"no preset {preset!r}{nearest(preset, PRESETS)}; presets are {', '.join(PRESETS)}"
    )
  tokens, mesh = PRESETS[preset]
  return Recipe(
    model=model(tokens, tiny=preset == "tiny"),
    trainer=TrainerConfig(mesh=mesh, steps=1000),
    batch_size=1,
    seq_len=tokens,
    sequence=SequenceConfig(),
    remat="full",
  )
