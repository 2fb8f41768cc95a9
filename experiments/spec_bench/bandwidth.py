# SPDX-License-Identifier: Apache-2.0
"""What a step of plain decoding has to read, and what the machine's memory gives."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxdec.mixers.attention import AttentionConfig


def memory_bandwidth(megabytes: int = 512, repeats: int = 5) -> float:
  """Bytes a second, read and written, of the best of some copies that fit no cache."""
  x = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  jax.block_until_ready(copy(x))
  best = float("inf")
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(copy(x))
    best = min(best, time.perf_counter() - begin)
  return 2 * x.nbytes / best


def bytes_of_a_step(lm: Any, length: float) -> float:
  """Bytes of weights and keys and values that one token after ``length`` others needs.

  An embedding table that is not the LM head too is read by the row: it doesn't count. States of
  recurrent layers are read and written.
  """
  params = dict(lm.params)
  if not lm.config.tie_embeddings:
    params.pop("embed")
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  capacity = 128
  state = jax.eval_shape(lambda: lm.model.init_state(1, capacity))
  cache = 0.0
  for layer, config in zip(state.layers, lm.config.layers):
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer))
    attends = isinstance(config.mixer, AttentionConfig)
    cache += size / capacity * length if attends else 2 * size
  return weights + cache
