# SPDX-License-Identifier: Apache-2.0
"""The embedded model: a 5.8M-parameter Llama-type decoder of Python code.

    python -m experiments.tiny_python.run --work-dir runs/tiny_python

trains it on the standard library's own sources; README.md beside this file says what to expect.
"""

from __future__ import annotations

from jaxdec.models import DecoderConfig, tiny_llama
from jaxdec.training import OptimizerConfig, TrainerConfig

VOCAB_SIZE = 4096
SEQ_LEN = 512
BATCH_SIZE = 12


def model_config() -> DecoderConfig:
  """Six layers of width 256, four heads of 64 over two key/value heads, tied embeddings."""
  return tiny_llama(vocab_size=VOCAB_SIZE, max_length=2048, eos_ids=(0,))


def trainer_config(work_dir: str | None) -> TrainerConfig:
  """Muon with a warm-up, a plateau and a linear fall over the last quarter."""
  return TrainerConfig(
    work_dir=work_dir,
    steps=1400,
    seed=0,
    optimizer=OptimizerConfig(
      name="muon",
      learning_rate=4e-3,
      schedule="wsd",
      warmup_steps=60,
      decay_fraction=0.25,
      final_ratio=0.02,
      weight_decay=0.05,
      clip_norm=1.0,
    ),
    log_every=20,
    eval_every=200,
    checkpoint_every=100,
  )
