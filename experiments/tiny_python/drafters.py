# SPDX-License-Identifier: Apache-2.0
"""The drafters that ship with the embedded model.

    python -m experiments.tiny_python.drafters medusa hydra eagle3 --work-dir runs/tiny_drafters

distills them for ``jaxdec.tiny()``; a finished run's ``drafter.json`` and ``drafter.safetensors``
are what lies in ``jaxdec/assets/tiny_python/drafters``. Medusa and Hydra are trained as in
``experiments/bench``, whose finished runs (``--work-dir runs/bench``) are taken as they are.
Expected: README.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

import jaxdec
from experiments.bench import run as bench
from jaxdec.distillation import Corpora, DistillConfig, distill, load_corpora
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.training import OptimizerConfig, TrainerConfig

DRAFT_VOCABULARY = 2048
NODES = 6  # as many as a CPU verifies at about twice the price of one


def eagle3(corpora: Corpora, vocab_size: int, work_dir: Path) -> DistillConfig:
  """One layer, a draft vocabulary of the most frequent half, four steps of training-time test."""
  counts = np.bincount(np.asarray(corpora.train.tokens), minlength=vocab_size)
  return DistillConfig(
    drafter="eagle3",
    options={
      "num_heads": 4,
      "loss_fraction": 0.5,
      "vocabulary": DraftVocabulary.most_frequent(counts, DRAFT_VOCABULARY),
    },
    batch_size=8,
    seq_len=256,
    trainer=TrainerConfig(
      work_dir=str(work_dir / "eagle3"),
      steps=500,
      checkpoint_every=100,
      optimizer=OptimizerConfig(
        name="muon", learning_rate=4e-3, schedule="wsd", warmup_steps=20, decay_fraction=0.4,
        final_ratio=0.02, weight_decay=0.0,
      ),
    ),
  )  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("kinds", nargs="+", choices=("medusa", "hydra", "eagle3"))
  parser.add_argument("--work-dir", type=Path, default=Path("runs/tiny_drafters"))
  arguments = parser.parse_args()
  lm = jaxdec.tiny()
  corpora = load_corpora("python_stdlib", lm.tokenizer)
  for kind in arguments.kinds:
    if kind == "eagle3":
      job = eagle3(corpora, lm.config.vocab_size, arguments.work_dir)
    else:
      job = bench.job(kind, bench.Config(), arguments.work_dir)
    job = dataclasses.replace(job, num_nodes=NODES)
    done = distill(lm.model, lm.params, lm.tokenizer, job, corpora)
    if done.drafter is None:
      return
    print(f"{kind}: {job.trainer.work_dir}, {done.result.metrics}")


if __name__ == "__main__":
  main()
