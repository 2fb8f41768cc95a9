# SPDX-License-Identifier: Apache-2.0
"""Files in and out: Hugging Face checkpoints, tokenizers, model folders. No torch, no network."""

from __future__ import annotations

import importlib

# Loaded on first use: path and configuration errors must not wait for JAX.
_LAZY = {
  "ModelFolder": "jaxdec.io.folders",
  "Tokenizer": "jaxdec.io.tokenizers",
  "load_checkpoint": "jaxdec.io.huggingface",
  "load_tokenizer": "jaxdec.io.tokenizers",
  "open_model": "jaxdec.io.folders",
  "read_drafter": "jaxdec.io.drafters",
  "save_checkpoint": "jaxdec.io.huggingface",
  "write_drafter": "jaxdec.io.drafters",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str):
  if name in _LAZY:
    return getattr(importlib.import_module(_LAZY[name]), name)
  raise AttributeError(f"module 'jaxdec.io' has no attribute {name!r}")
