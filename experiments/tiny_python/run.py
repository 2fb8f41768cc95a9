# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded model, or resumes: ``python -m experiments.tiny_python.run``."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np

import jaxdec
from experiments.tiny_python import config
from jaxdec.data import make_dataset, open_source, tokenize_documents
from jaxdec.io.tokenizers import load_tokenizer
from jaxdec.models import Decoder
from jaxdec.training import LanguageModel, Trainer

TOKENIZER = Path(jaxdec.__file__).parent / "assets" / "tiny_python"


def token_bytes(tokenizer, vocab_size: int) -> np.ndarray:
  """UTF-8 bytes behind every id of a byte-level tokenizer; 0 for special tokens."""
  sizes = np.zeros(vocab_size, np.int32)
  for text, index in tokenizer.backend.get_vocab(with_added_tokens=False).items():
    sizes[index] = len(text)  # one character of the byte alphabet a byte
  sizes[list(tokenizer.eos_ids)] = 0
  return sizes


def build(work_dir: str | None) -> Trainer:
  """The whole run: corpus, model, task and trainer."""
  tokenizer = load_tokenizer(TOKENIZER)
  train = tokenize_documents(open_source("python_stdlib", "train"), tokenizer)
  validation = tokenize_documents(open_source("python_stdlib", "validation"), tokenizer)
  shape = dict(batch_size=config.BATCH_SIZE, seq_len=config.SEQ_LEN)
  task = LanguageModel(
    Decoder(config.model_config()), token_bytes=token_bytes(tokenizer, config.VOCAB_SIZE)
  )
  return Trainer(
    task,
    config.trainer_config(work_dir),
    data=make_dataset(train, **shape),
    eval_data=lambda: itertools.islice(
      make_dataset(validation, shuffle=False, num_epochs=1, **shape), 16
    ),
    extra={"source": "python_stdlib", "tokens": len(train.tokens), **shape},
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--work-dir", default="runs/tiny_python")
  build(parser.parse_args().work_dir).train()


if __name__ == "__main__":
  main()
