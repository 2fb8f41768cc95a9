# SPDX-License-Identifier: Apache-2.0
"""A copy of the embedded model that does the copying and editing tasks, by our trainer.

Command:   python -m experiments.spec_bench.finetune --work-dir runs/editor   (not run in full yet)
           python -m experiments.spec_bench.run --model runs/editor/model --tasks edit rewriting
Expected:  README.md beside this file. The weights are not shipped.

The embedded model knows Python but no task; a draft taken from the prompt is worth little until the
model copies. Tasks and answers come from training files; each is one document.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jaxdec
from experiments.spec_bench import tasks
from jaxdec.data import make_dataset, open_source
from jaxdec.data.documents import Document
from jaxdec.errors import UserError
from jaxdec.training import OptimizerConfig, Trainer, TrainerConfig
from jaxdec.training.tasks.heal import Heal


def documents(split: str) -> list[Document]:
  """Every task of a split with its answers, as texts."""
  found = tasks.examples(open_source("python_stdlib", split))
  return [
    Document(f"{example.kind}/{i}", example.text)
    for i, example in enumerate(found)
    if example.kind != "completion"  # what the model does already
  ]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--work-dir", type=Path, default=Path("runs/editor"))
  parser.add_argument("--steps", type=int, default=1200)
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--seq-len", type=int, default=512)
  parser.add_argument("--learning-rate", type=float, default=2e-3)
  options = parser.parse_args()
  lm = jaxdec.tiny()
  folder = options.work_dir / "model"
  if folder.exists():
    raise UserError(f"{folder} exists; give another --work-dir, or remove it")
  data = make_dataset(
    documents("train"), lm.tokenizer, batch_size=options.batch_size, seq_len=options.seq_len
  )
  config = TrainerConfig(
    work_dir=str(options.work_dir),
    steps=options.steps,
    optimizer=OptimizerConfig(
      name="muon", learning_rate=options.learning_rate, schedule="wsd",
      warmup_steps=min(50, options.steps // 5), decay_fraction=0.4, weight_decay=0.0,
    ),
  )  # fmt: skip
  result = Trainer(Heal(lm.model, weights=lm.params), config, data=data).train()
  if result.interrupted:
    return 130
  jaxdec.lm.LM(lm.model, result.params, lm.tokenizer).save(folder)
  print(f"the model is in {folder}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
