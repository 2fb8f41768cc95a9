# SPDX-License-Identifier: Apache-2.0
"""Linear-Llama3: Llama blocks with one of five recurrent layers, all or three out of four.

    jaxdec train experiments/lasp2/config.py:tiny-gla-hybrid --mesh seq=4
    jaxdec plan experiments/lasp2/config.py:1b-gla-hybrid --topology v5p:2x2x2
    jaxdec plan experiments/lasp2/config.py:2m-gla-hybrid --topology v5p:4x8x8

A preset is SIZE-KIND or SIZE-KIND-hybrid, after the convergence study of LASP-2 (arXiv 2502.07563,
tables 2 and 3). README.md beside this file says what to expect.

SIZE:
  tiny  1.2M to 1.4M parameters on the standard library's sources: minutes on a CPU.
  1b    16 layers of width 2048, 16 heads, rows of 16K tokens, 8 devices.
  2m    the same model on rows of 2,097,152 tokens, 256 devices.
"""

from __future__ import annotations

import dataclasses

from jaxdec.errors import UserError, nearest
from jaxdec.mixers import AttentionConfig, GatedDeltaConfig, LinearAttentionConfig, RopeConfig
from jaxdec.models import DecoderConfig
from jaxdec.models.config import LayerConfig, MixerConfig, MLPConfig
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.training import MeshConfig, OptimizerConfig, Recipe, TrainerConfig

KINDS = ("basic", "lightning", "retention", "gla", "gdn", "softmax")
SIZES = ("tiny", "1b", "2m")
PRESETS = tuple(
  f"{size}-{kind}{suffix}"
  for size in SIZES
  for kind in KINDS
  for suffix in (("",) if kind == "softmax" else ("", "-hybrid"))
)


def mixer(kind: str, num_heads: int, head_dim: int) -> MixerConfig:
  """The layer of a kind. All have as many heads, and states of ``head_dim x head_dim`` a head."""
  heads = {"num_heads": num_heads, "head_dim": head_dim}
  if kind == "softmax":
    rope = RopeConfig(theta=500_000.0)
    return AttentionConfig(num_kv_heads=num_heads // 4, rope=rope, **heads)
  if kind == "gdn":
    return GatedDeltaConfig(**heads)
  # Basic linear attention is elu + 1 (arXiv 2006.16236) with a norm in place of the denominator.
  settings = {
    "basic": {"decay": "none", "feature_map": "elu", "output_gate": False},
    "lightning": {"decay": "fixed", "slopes": "lightning", "feature_map": "silu"},
    "retention": {
      "decay": "fixed", "slopes": "retention", "feature_map": "identity", "rope": RopeConfig(),
    },
    "gla": {"decay": "channel", "feature_map": "identity"},
  }  # fmt: skip
  return LinearAttentionConfig(**settings[kind], **heads)


def decoder(
  kind: str, hybrid: bool, *, num_layers: int, num_heads: int, hidden_dim: int, **sizes
) -> DecoderConfig:
  """Blocks of one kind; ``hybrid``: every fourth is softmax attention (LLLN, "1/4 hybrid")."""
  head_dim = sizes["dim"] // num_heads
  linear, softmax = (
    LayerConfig(mixer(k, num_heads, head_dim), MLPConfig(hidden_dim)) for k in (kind, "softmax")
  )
  period = (linear, linear, linear, softmax) if hybrid else (linear,)
  layers = period * (num_layers // len(period))
  return DecoderConfig(layers=layers, tie_embeddings=True, eos_ids=(0,), **sizes)


def get_config(preset: str = "tiny-gla-hybrid") -> Recipe:
  """The run of a preset.

  Raises:
    UserError: unknown preset.
  """
  if preset not in PRESETS:
    raise UserError(
      f"preset {preset!r}{nearest(preset, PRESETS)} is not SIZE-KIND or SIZE-KIND-hybrid; sizes: "
      f"{', '.join(SIZES)}; kinds: {', '.join(KINDS)} (softmax has no hybrid)"
    )
  size, kind, *hybrid = preset.split("-")
  return (tiny if size == "tiny" else one_billion)(kind, bool(hybrid), long=size == "2m")


def tiny(kind: str, hybrid: bool, *, long: bool = False) -> Recipe:
  """Four layers of width 128, 2,048 tokens a step, float32, sequences over four devices."""
  del long
  model = decoder(
    kind, hybrid, vocab_size=4096, dim=128, num_layers=4, num_heads=4, hidden_dim=352,
    max_length=512,
  )  # fmt: skip
  trainer = TrainerConfig(
    steps=80,
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=10),
    log_every=1,
    mesh=MeshConfig(seq=4),
  )
  return Recipe(
    model=model, trainer=trainer, batch_size=4, seq_len=512, eval_batches=8, dtype="float32",
    sequence=SequenceConfig(),
  )  # fmt: skip


def one_billion(kind: str, hybrid: bool, *, long: bool) -> Recipe:
  """Llama3's vocabulary and block at 1B parameters; AdamW 0.9/0.95, 0.1, clip 1.0, cosine."""
  seq_len = 2**21 if long else 2**14
  model = decoder(
    kind, hybrid, vocab_size=128_256, dim=2048, num_layers=16, num_heads=16, hidden_dim=8192,
    max_length=seq_len,
  )  # fmt: skip
  mesh = MeshConfig(fsdp=4, seq=64) if long else MeshConfig(fsdp=2, seq=4)
  trainer = TrainerConfig(
    steps=100_000,
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000, final_ratio=1e-6 / 3e-4),
    mesh=mesh,
  )
  return Recipe(
    model=dataclasses.replace(model, eos_ids=(128_001,)),
    trainer=trainer,
    batch_size=4 if long else 8,
    seq_len=seq_len,
    data="runs/slimpajama",
    tokenizer="runs/llama3",
    sequence=SequenceConfig(),
    remat="full",
    loss_chunk=2048,
  )
