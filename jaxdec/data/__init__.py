# SPDX-License-Identifier: Apache-2.0
"""Text to packed batches: sources, tokenised corpora, packing, and the Grain iterator.

Names load on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib

_LAZY = {
  "Corpus": "corpus",
  "Document": "documents",
  "PackedDataset": "pipeline",
  "Share": "share",
  "cut_prompts": "prompts",
  "make_dataset": "pipeline",
  "open_source": "sources",
  "plan_epoch": "packing",
  "split_of": "documents",
  "tokenize_documents": "corpus",
  "train_python_tokenizer": "tokenizer_training",
  "train_tokenizer": "tokenizer_training",
}
__all__ = [
  "Corpus",
  "Document",
  "PackedDataset",
  "Share",
  "cut_prompts",
  "make_dataset",
  "open_source",
  "plan_epoch",
  "split_of",
  "tokenize_documents",
  "train_python_tokenizer",
  "train_tokenizer",
]


def __getattr__(name: str):
  if name in _LAZY:
    return getattr(importlib.import_module(f"jaxdec.data.{_LAZY[name]}"), name)
  raise AttributeError(f"module 'jaxdec.data' has no attribute {name!r}")
