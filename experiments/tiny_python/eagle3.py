# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 drafter that ships with the embedded model.

    python -m experiments.tiny_python.eagle3 --work-dir runs/tiny_eagle3

distills it for ``jaxdec.tiny()``; a finished run's ``drafter.json`` and ``drafter.safetensors`` are
what lies in ``jaxdec/assets/tiny_python/drafters/eagle3``. Expected: README.md beside this file.
"""

from __future__ import annotations

import argparse

import numpy as np

import jaxdec
from jaxdec.distillation import DistillConfig, distill, load_corpora
from jaxdec.drafting.eagle3 import DraftVocabulary
from jaxdec.training import OptimizerConfig, TrainerConfig

DRAFT_VOCABULARY = 2048
STEPS = 500


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--work-dir", default="runs/tiny_eagle3")
  parser.add_argument("--steps", type=int, default=STEPS)
  arguments = parser.parse_args()
  lm = jaxdec.tiny()
  corpora = load_corpora("python_stdlib", lm.tokenizer)
  counts = np.bincount(np.asarray(corpora.train.tokens), minlength=lm.config.vocab_size)
  job = DistillConfig(
    drafter="eagle3",
    options={
      "num_heads": 4,
      "loss_fraction": 0.5,
      "vocabulary": DraftVocabulary.most_frequent(counts, DRAFT_VOCABULARY),
    },
    batch_size=8,
    seq_len=256,
    num_nodes=6,  # as many as a CPU verifies at about twice the price of one
    trainer=TrainerConfig(
      work_dir=arguments.work_dir,
      steps=arguments.steps,
      checkpoint_every=100,
      optimizer=OptimizerConfig(
        name="muon", learning_rate=4e-3, schedule="wsd", warmup_steps=20, decay_fraction=0.4,
        final_ratio=0.02, weight_decay=0.0,
      ),
    ),
  )  # fmt: skip
  done = distill(lm.model, lm.params, lm.tokenizer, job, corpora)
  if done.drafter is not None:
    print(f"trained in {done.seconds:.0f} s: {done.result.metrics}")


if __name__ == "__main__":
  main()
