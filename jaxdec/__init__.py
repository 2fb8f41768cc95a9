# SPDX-License-Identifier: Apache-2.0
"""jaxdec: decoding fast and reading long, in JAX.

Importing this package sets no flag, touches no device, and loads neither torch, TensorFlow nor
transformers; heavy modules load on first use.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_LAZY = {
  "load": "jaxdec.lm",
  "save": "jaxdec.lm",
  "LM": "jaxdec.lm",
  "tiny": "jaxdec.lm",
  "generate": "jaxdec.decoding",
  "Sampler": "jaxdec.decoding",
}
__all__ = ["LM", "Sampler", "__version__", "generate", "load", "save", "tiny"]


def __getattr__(name: str):
  if name in _LAZY:
    return getattr(importlib.import_module(_LAZY[name]), name)
  raise AttributeError(f"module 'jaxdec' has no attribute {name!r}")
