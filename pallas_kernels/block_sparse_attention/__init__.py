# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over chosen tiles of the attention map, chosen at run time if need be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _checks
from pallas_kernels._dispatch import Op
from pallas_kernels.block_sparse_attention.lists import Lists, tile_lists
from pallas_kernels.block_sparse_attention.mosaic_tpu import TPUConfig
from pallas_kernels.block_sparse_attention.pattern import BlockPattern
from pallas_kernels.block_sparse_attention.xla import XLAConfig

__all__ = [
  "BlockPattern",
  "Lists",
  "TPUConfig",
  "XLAConfig",
  "block_sparse_attention",
  "block_sparse_attention_gradients",
  "tile_lists",
]

_NAME = "block_sparse_attention"
_CONFIGS = {"xla": XLAConfig, "mosaic_tpu": TPUConfig}
_OP = Op(_NAME, __name__, _CONFIGS)
_GRADIENTS = Op(f"{_NAME}_gradients", __name__, _CONFIGS)


def block_sparse_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  blocks: BlockPattern | None = None,
  *,
  segment_ids: Any = None,
  causal: bool = True,
  window: int | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
  return_lse: bool = False,
  return_block_max: bool = False,
  implementation: str | Sequence[str] = "auto",
  config: Any = None,
) -> Any:
  """Attention in which only the listed blocks of keys are read, for each block of queries.

  ``out_i = sum_j P_ij v_j`` with ``P_ij = exp(s_ij) / sum_j exp(s_ij)`` and
  ``s_ij = scale q_i . k_j`` (soft-capped: ``cap tanh(s / cap)``), over the keys j that the pattern
  lists *and* the token rule lets query i see: with ``d = S - T``

    causal: j <= i + d;  window: i + d - j < window;  documents: equal ids, neither negative.

  Tiles that are not listed, or that the rule hides, cost nothing, also when the pattern is computed
  at run time. A query that sees no key gives 0, log-sum-exp -inf and no gradient. Gradients for q,
  k and v, also through the log-sum-exp. Head n of N reads key/value head ``n // (N / K)``.

  ``blocks=None`` is plain causal (or windowed) attention over all tiles. jax's splash attention
  (``jax.experimental.pallas.ops.tpu.splash_attention``) serves such static masks on TPUs too; by
  the compiler's schedules ``mosaic_tpu`` needs fewer cycles, so nothing is handed over to it.

  Args:
    q: ``[B,T,N,H]``. k: ``[B,S,K,H]``. v: ``[B,S,K,Hv]``; K divides N, Hv may differ from H.
    blocks: which tiles, a ``BlockPattern`` with ``ceil(T / block_q)`` query blocks; None: all.
    segment_ids: document of each token, int ``[B,T]`` when T = S, else ``(q_ids [B,T],
      kv_ids [B,S])``. Negative ids are padding: they see nothing and nothing sees them. B may be 1.
      Fastest when non-decreasing.
    causal, window: the token rule; a window without ``causal`` bounds the past only.
    logit_cap: soft cap of the logits. scale: None is ``H ** -0.5``.
    return_lse: also the log-sum-exp of a query's logits, float32 ``[B,N,T]``.
    return_block_max: also the largest P of every tile, float32 ``[B,N,Nq,Nk]``, 0 where not
      visited, without gradient (the ground truth of SeerAttention, arXiv 2410.13276, before its
      rows are normalised). Needs ``blocks``.
    implementation, config: see ``pallas_kernels``; ``XLAConfig`` or ``TPUConfig``.

  Returns:
    ``out [B,T,N,Hv]`` in q's dtype; with the options a tuple ``(out, lse)``, ``(out, block_max)``
    or ``(out, lse, block_max)``. float64 inputs have float64 statistics in ``reference``, ``xla``.

  Raises:
    ValueError: shapes, heads, pattern or options that don't fit together.
    Unsupported: the implementation named can't run this call.

  >>> import jax, jax.numpy as jnp
  >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 4, 32))
  >>> scores = jnp.einsum("bqnh,bknh->bnqk", q[:, ::64], k[:, ::64])  # any scores of blocks
  >>> blocks = BlockPattern.from_scores(scores, 2, block_q=64, block_kv=64)
  >>> block_sparse_attention(q, k, v, blocks).shape
  (1, 256, 4, 32)
  """
  sizes = _check(q, k, v, blocks, window, logit_cap)
  B, T, N, S = (sizes[x] for x in "BTNS")
  if blocks is None and return_block_max:
    raise ValueError(
      f"{_NAME}: return_block_max=True needs blocks, whose sizes it reports; pass "
      "BlockPattern.from_rule(T, S, block_q=..., block_kv=...)."
    )
  ids = _pair(segment_ids, B, T, S)

  dtype = jnp.promote_types(q.dtype, jnp.float32)
  if T == 0 or S == 0:
    out, lse = jnp.zeros((B, T, N, v.shape[-1]), q.dtype), jnp.full((B, N, T), -jnp.inf, dtype)
    peak = None
    if blocks is not None:
      peak = jnp.zeros((B, N, blocks.num_q_blocks, blocks.num_kv_blocks), dtype)
  else:
    out, lse, peak = _OP(
      q, k, v, blocks, ids,
      causal=causal, window=window, logit_cap=logit_cap,
      scale=_checks.scale_of(scale, q.shape[-1]), block_max=return_block_max,
      implementation=implementation, config=config,
    )  # fmt: skip
  results = (out, *((lse,) if return_lse else ()), *((peak,) if return_block_max else ()))
  return results if len(results) > 1 else out


def block_sparse_attention_gradients(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  delta: jax.Array,
  blocks: BlockPattern | None = None,
  *,
  segment_ids: Any = None,
  causal: bool = True,
  window: int | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
  implementation: str | Sequence[str] = "auto",
  config: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What these keys contribute to the gradients of attention over more keys than these.

  ``P_ij = exp(s_ij - lse_i)``, ``dv = P^T dout``, ``dS = P (dout v^T - delta)``, ``dq = dS k``,
  ``dk = dS^T q`` (FlashAttention-2, arXiv 2307.08691, Algorithm 2), over the visible pairs. Ring
  attention (arXiv 2310.01889) adds this up block by block; over all keys at once it is the gradient
  of ``block_sparse_attention``.

  Args:
    lse: log-sum-exp over all keys, float32 ``[B,N,T]``; -inf where a query saw none.
    dout: cotangent of the output over all keys, ``[B,T,N,Hv]``.
    delta: ``sum_h dout out``, float32 ``[B,N,T]``.
    Others: as in ``block_sparse_attention``.

  Returns:
    ``dq``, ``dk``, ``dv`` in float32 (float64 for float64 inputs), to be added to others.
  """
  sizes = _check(q, k, v, blocks, window, logit_cap)
  B, T, N, S, Hv = (sizes[x] for x in ("B", "T", "N", "S", "Hv"))
  for name, x, shape in (("lse", lse, (B, N, T)), ("delta", delta, (B, N, T))):
    if x.shape != shape:
      raise ValueError(f"{_NAME}_gradients: {name} has shape {x.shape}, expected {shape}.")
  if dout.shape != (B, T, N, Hv):
    raise ValueError(f"{_NAME}_gradients: dout has shape {dout.shape}, expected {(B, T, N, Hv)}.")
  ids = _pair(segment_ids, B, T, S)
  if T == 0 or S == 0:
    return tuple(jnp.zeros(x.shape, lse.dtype) for x in (q, k, v))
  return _GRADIENTS(
    q, k, v, blocks, ids, lse, dout, delta,
    causal=causal, window=window, logit_cap=logit_cap,
    scale=_checks.scale_of(scale, q.shape[-1]), implementation=implementation, config=config,
  )  # fmt: skip


def _check(q, k, v, blocks, window, logit_cap) -> dict[str, int]:
  """Sizes by letter, of arguments that fit together."""
  sizes = _checks.shapes(_NAME, q=(q, "B T N H"), k=(k, "B S K H"), v=(v, "B S K Hv"))
  B, T, N, S, K = (sizes[x] for x in "BTNSK")
  if K == 0 or N % K:
    raise ValueError(
      f"{_NAME}: k has {K} heads, which don't divide the {N} heads of q; use a divisor of {N}."
    )
  if blocks is not None:
    _check_pattern(blocks, B, T, S, N, K)
  if window is not None and window < 1:
    raise ValueError(f"{_NAME}: window is at least 1, got {window}; use None for no window.")
  if logit_cap is not None and logit_cap <= 0:
    raise ValueError(f"{_NAME}: logit_cap is positive, got {logit_cap}; use None for no cap.")
  return sizes


def _check_pattern(blocks: BlockPattern, B: int, T: int, S: int, N: int, K: int) -> None:
  if not isinstance(blocks, BlockPattern):
    raise ValueError(
      f"{_NAME}: blocks is a BlockPattern or None, got {type(blocks).__name__}; for an array of "
      "blocks use BlockPattern.from_dense(mask, block_q=..., block_kv=...)."
    )
  batch, heads, nq = blocks.num.shape
  wanted = -(-T // blocks.block_q), -(-S // blocks.block_kv)
  if (nq, blocks.num_kv_blocks) != wanted:
    raise ValueError(
      f"{_NAME}: blocks has {nq} x {blocks.num_kv_blocks} blocks of {blocks.block_q} x "
      f"{blocks.block_kv}, expected {wanted[0]} x {wanted[1]} for T={T}, S={S}."
    )
  if batch not in (1, B) or heads not in (1, K, N):
    raise ValueError(
      f"{_NAME}: blocks is for batch {batch} and {heads} heads, expected batch 1 or {B} and one of "
      f"{sorted({1, K, N})} heads."
    )


def _pair(segment_ids: Any, B: int, T: int, S: int) -> tuple[jax.Array, jax.Array] | None:
  if segment_ids is None:
    return None
  if not isinstance(segment_ids, tuple | list):
    if T != S:
      raise ValueError(
        f"{_NAME}: one array of segment_ids is for T = S, got T={T}, S={S}; pass a pair (q_ids, "
        "kv_ids)."
      )
    segment_ids = (segment_ids, segment_ids)
  q_ids, kv_ids = (jnp.asarray(x) for x in segment_ids)
  for name, ids, length in (("q", q_ids, T), ("kv", kv_ids, S)):
    if ids.ndim != 2 or ids.shape[0] not in (1, B) or ids.shape[1] != length:
      raise ValueError(
        f"{_NAME}: {name} segment_ids have shape {ids.shape}, expected [{B} or 1, {length}]."
      )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(f"{_NAME}: segment_ids are integers, got {ids.dtype}; use int32.")
  return tuple(jnp.broadcast_to(x.astype(jnp.int32), (B, x.shape[1])) for x in (q_ids, kv_ids))
