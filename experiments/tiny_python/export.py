# SPDX-License-Identifier: Apache-2.0
"""Turns a finished run into the model that ships with the package, and measures it.

    python -m experiments.tiny_python.export --work-dir runs/tiny_python --folder tiny_python_model

writes a Hugging Face folder in bfloat16 with its tokenizer, measures bits per byte of what was
written (read back, computed in float32) on the validation and test splits, and writes the numbers
to ``metrics.json`` beside the weights.
"""

from __future__ import annotations

import argparse
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

import jaxdec
from experiments.tiny_python import config
from experiments.tiny_python.run import TOKENIZER
from jaxdec.data import make_dataset, open_source, tokenize_documents
from jaxdec.io.tokenizers import load_tokenizer
from jaxdec.models import Decoder
from jaxdec.training import load_params
from jaxdec.training.tasks.language_model import next_token_targets, token_losses


def bits_per_byte(lm: jaxdec.LM, split: str) -> dict[str, float]:
  """Cross-entropy over a whole split in pieces of ``SEQ_LEN``, per token and per byte of its text.

  Each piece starts without context, so its first token is not predicted: those tokens are left out
  of the sum, and their share of the bytes too (all tokens being of the mean length).
  """
  corpus = tokenize_documents(open_source("python_stdlib", split), lm.tokenizer)
  batches = make_dataset(corpus, batch_size=8, seq_len=config.SEQ_LEN, shuffle=False, num_epochs=1)

  @jax.jit
  def score(params, batch):
    out = lm.model.apply({"params": params}, batch["tokens"], batch["positions"],
                         batch["segment_ids"])  # fmt: skip
    labels, mask = next_token_targets(batch)
    losses, _ = token_losses(out.logits, labels)
    correct = (jnp.argmax(out.logits, axis=-1) == labels) * mask
    return jnp.sum(losses * mask), jnp.sum(correct), jnp.sum(mask)

  totals = np.zeros(3)
  for batch in batches:
    totals += np.asarray(score(lm.params, batch), np.float64)
  nats, correct, count = totals
  bytes_per_token = corpus.num_bytes / len(corpus.tokens)
  return {
    "tokens": len(corpus.tokens),
    "bytes": corpus.num_bytes,
    "loss": nats / count,
    "accuracy": correct / count,
    "bits_per_byte": nats / count / math.log(2) / bytes_per_token,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--work-dir", default="runs/tiny_python")
  parser.add_argument("--folder", default="tiny_python_model")
  parser.add_argument("--overwrite", action="store_true", help="replace an older export")
  arguments = parser.parse_args()
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), load_params(arguments.work_dir))
  tokenizer = load_tokenizer(TOKENIZER)
  lm = jaxdec.LM(Decoder(config.model_config(), dtype=jnp.bfloat16), params, tokenizer)
  folder = jaxdec.save(lm, arguments.folder, overwrite=arguments.overwrite)
  shipped = jaxdec.load(folder, dtype="float32")
  metrics = {split: bits_per_byte(shipped, split) for split in ("validation", "test")}
  (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
  print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
  main()
