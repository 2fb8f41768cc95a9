# SPDX-License-Identifier: Apache-2.0
"""Attention of a draft tree's nodes over (shared prefix, ragged cache, ancestors)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _checks
from pallas_kernels._dispatch import Op
from pallas_kernels.tree_attention._common import (
  Levels,
  TPUConfig,
  XLAConfig,
  combine,
  pack_ancestors,
  unpack_ancestors,
)

__all__ = [
  "TPUConfig",
  "XLAConfig",
  "combine",
  "pack_ancestors",
  "tree_attention",
  "unpack_ancestors",
]

_OP = Op(
  "tree_attention",
  "pallas_kernels.tree_attention",
  {"xla": XLAConfig, "mosaic_tpu": TPUConfig},
)


def tree_attention(
  q: jax.Array,
  k_cache: jax.Array,
  v_cache: jax.Array,
  length: jax.Array,
  k_nodes: jax.Array,
  v_nodes: jax.Array,
  ancestors: jax.Array,
  *,
  scale: float | None = None,
  window: int | None = None,
  logit_cap: float | None = None,
  depth: jax.Array | None = None,
  cache_layout: str = "BSKH",
  prefix: tuple[jax.Array, jax.Array] | Levels | None = None,
  return_lse: bool = False,
  implementation: str | Sequence[str] = "auto",
  config: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Softmax attention of M tree nodes over the live slots of a cache and their own ancestors.

  Node ``i`` stands at position ``length + depth[i]``. It sees cache slot ``s`` iff ``s < length``
  and node ``j`` iff ``ancestors[i, j]``; with a window only what lies fewer than ``window``
  positions back. ``out_i = sum_x softmax_x(scale * q_i . k_x) v_x`` over all it sees, in one
  softmax. A node that sees nothing gets 0, and ``lse = -inf``. Dead slots are masked, not skipped
  over in every implementation: they must hold finite numbers.

  One new token a row (plain decoding) is M = 1 with ``ancestors`` all true; a chunk of a prompt is
  a chain, ``ancestors = tril``. ``prefix`` are keys and values that rows share and that precede
  their caches: they meet the queries of all their rows in ONE attention (their positions are
  ``0 .. P-1``, the cache's ``P ..``), merged by log-sum-exp. Prefixes may branch: then they are
  levels, coarse to fine, whose groups serve equal numbers of consecutive rows. Gradients, of
  ``lse`` too, by recomputation.

  Args:
    q: ``[B,M,N,H]``.
    k_cache, v_cache: ``[B,S,K,H]`` and ``[B,S,K,Hv]``, or ``[B,K,S,..]`` for
      ``cache_layout="BKSH"``, which is read as it lies (the other one is transposed first). K
      divides N. Their dtype is that of the products; sums and statistics are float32.
    length: int ``[B]``, live slots of each row, at most S.
    k_nodes, v_nodes: ``[B,M,K,H]``, ``[B,M,K,Hv]``.
    ancestors: bool ``[B,M,M]``, self included, or its words (``pack_ancestors``).
    scale: None: ``H**-0.5``. window: positions seen, itself included. logit_cap: ``c tanh(x/c)``.
    depth: int ``[B,M]``; None: the number of proper ancestors. Only a window needs it.
    prefix: ``([P,K,H], [P,K,Hv])``, which all rows share; or any number of levels, each
      ``(k [G,P,K,H], v [G,P,K,Hv], length int [G])`` in the cache's layout, where G divides B and
      group g serves the rows ``g B/G .. (g+1) B/G - 1``.
    return_lse: also return the log-sum-exp of the logits.
    implementation, config: see ``pallas_kernels``; ``XLAConfig`` or ``TPUConfig``.

  Returns:
    ``[B,M,N,Hv]`` in ``q``'s dtype; with ``return_lse`` also ``[B,N,M]`` float32.

  Raises:
    ValueError: shapes, dtypes or options don't fit.
    NotImplementedError: the named implementation can't run this call.

  Source: "SpecInfer" (arXiv 2305.09781, section 4.2, tree attention); the shared prefix is
  "Hydragen" (arXiv 2402.05099, sections 3.1 and 3.3).

  >>> import jax, jax.numpy as jnp
  >>> q = jnp.ones((1, 3, 4, 8)); kv = jnp.ones((1, 3, 2, 8)); cache = jnp.ones((1, 16, 2, 8))
  >>> tree = jnp.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], bool)  # a root with two children
  >>> out, lse = tree_attention(q, cache, cache, jnp.array([5]), kv, kv, tree, return_lse=True)
  >>> out.shape, jnp.exp(lse[0, 0] - 8**0.5).round()  # each sees 5 slots and its ancestors
  ((1, 3, 4, 8), Array([6., 7., 7.], dtype=float32))
  """
  name = "tree_attention"
  if cache_layout not in ("BSKH", "BKSH"):
    raise ValueError(f"{name}: cache_layout is 'BSKH' or 'BKSH', got {cache_layout!r}.")
  if window is not None and window < 1:
    raise ValueError(f"{name}: window is at least 1 (the node itself), got {window}; None for all.")
  if logit_cap is not None and logit_cap <= 0:
    raise ValueError(f"{name}: logit_cap is positive, got {logit_cap}; None for no cap.")
  cache = "B S K" if cache_layout == "BSKH" else "B K S"
  prefix = prefix or ()
  shared = len(prefix) == 2 and all(hasattr(x, "shape") for x in prefix)
  k_prefix, v_prefix = prefix if shared else (None, None)
  sizes = _checks.shapes(
    name,
    q=(q, "B M N H"),
    k_nodes=(k_nodes, "B M K H"),
    v_nodes=(v_nodes, "B M K V"),
    k_cache=(k_cache, f"{cache} H"),
    v_cache=(v_cache, f"{cache} V"),
    length=(length, "B"),
    depth=(depth, "B M"),
    k_prefix=(k_prefix, "P K H"),
    v_prefix=(v_prefix, "P K V"),
  )
  if shared:
    k, v = (jnp.swapaxes(x, 0, 1)[None] for x in prefix)
    levels = ((k, v, jnp.full(1, k.shape[2], jnp.int32)),)
  else:
    levels = tuple(_level(name, sizes, cache_layout, i, *level) for i, level in enumerate(prefix))
  if sizes["K"] == 0 or sizes["N"] % sizes["K"]:
    raise ValueError(
      f"{name}: q has N={sizes['N']} heads, which is no multiple of the caches' K={sizes['K']}; "
      "every key/value head serves the same number of query heads."
    )
  packed = ancestors.dtype == jnp.uint32
  if not packed and ancestors.dtype != jnp.bool_:
    raise ValueError(
      f"{name}: ancestors has dtype {ancestors.dtype}, expected bool, or uint32 words from "
      "pack_ancestors."
    )
  words = f"{-(-sizes['M'] // 32)}"
  _checks.shapes(
    name, q=(q, "B M N H"), ancestors=(ancestors, f"B M {words}" if packed else "B M M")
  )
  for label, array in (("length", length), ("depth", depth)):
    if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
      raise ValueError(f"{name}: {label} has dtype {array.dtype}, expected integers.")

  length, position = length.astype(jnp.int32), None
  if window is not None:
    ancestors = unpack_ancestors(ancestors) if packed else ancestors
    if depth is None:
      depth = jnp.sum(ancestors, -1, dtype=jnp.int32) - 1
    depth = depth.astype(jnp.int32)
    position = length[:, None] + depth
    ancestors = ancestors & (depth[:, :, None] - depth[:, None, :] < window)
  out, lse = _OP(
    q, k_cache, v_cache, length, k_nodes, v_nodes, ancestors, position, levels,
    scale=_checks.scale_of(scale, sizes["H"]),
    window=window,
    logit_cap=logit_cap,
    cache_layout=cache_layout,
    implementation=implementation,
    config=config,
  )  # fmt: skip
  return (out, lse) if return_lse else out


def _level(name, sizes, layout, i, k, v, length):
  """One level of prefixes, checked, heads first."""
  slots = "G P {K}" if layout == "BSKH" else "G {K} P"
  got = _checks.shapes(
    name,
    **{
      f"prefix[{i}].k": (k, f"{slots.format(**sizes)} {sizes['H']}"),
      f"prefix[{i}].v": (v, f"{slots.format(**sizes)} {sizes['V']}"),
      f"prefix[{i}].length": (length, "G"),
    },
  )
  if not got["G"] or sizes["B"] % got["G"]:
    raise ValueError(
      f"{name}: prefix[{i}] has G={got['G']} groups, which doesn't divide the B={sizes['B']} rows; "
      "every group serves equally many."
    )
  if layout == "BSKH":
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  return k, v, length.astype(jnp.int32)
