# SPDX-License-Identifier: Apache-2.0
"""Attention of one block of queries to one block of keys some way off, and how parts are merged.

A ring, or any method that meets the keys piece by piece, needs three things: the part of the
attention that a block of keys gives, with its log-sum-exp; the merge of two such parts; and the
gradient of a part once the log-sum-exp over all keys is known (FlashAttention-2, arXiv 2307.08691,
Algorithm 2, block by block).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import (
  block_sparse_attention,
  block_sparse_attention_gradients,
)

Kind = Literal["hidden", "full"] | int
Ids = tuple[jax.Array, jax.Array] | None


class Rule(NamedTuple):
  """What a query sees in the whole sequence; see ``block_sparse_attention``."""

  causal: bool
  window: int | None
  logit_cap: float | None
  scale: float


def kind_of(distance: int, length: int, rule: Rule) -> Kind:
  """How a block of keys ``distance`` blocks (of ``length`` tokens) before the queries is seen.

  ``hidden``, ``full``, or in part: then the distance in tokens, by which the rule is shifted.
  """
  if distance < 0:
    return "hidden" if rule.causal else "full"
  offset, window = distance * length, rule.window
  if offset == 0 and rule.causal:
    return 0
  if window is None or offset + length - 1 < window:
    return "full"
  return "hidden" if offset - (length - 1) >= window else offset


class _Cut(NamedTuple):
  """Queries before ``queries`` and keys from ``keys`` on, under a rule without offset."""

  queries: int
  keys: int
  options: dict[str, Any]


def _cut(kind: Kind, length: int, rule: Rule) -> _Cut:
  same = {"logit_cap": rule.logit_cap, "scale": rule.scale}
  if kind == "full":
    return _Cut(length, 0, {"causal": False, "window": None, **same})
  if kind == 0:
    return _Cut(length, 0, {"causal": rule.causal, "window": rule.window, **same})
  # Only the window cuts blocks of the past: key j is seen by query i if i - j < window - offset.
  # Where that is below 1, key `skip` is the first that a query, the first one, sees.
  window = rule.window - kind
  skip = max(1 - window, 0)
  return _Cut(length - skip, skip, {"causal": False, "window": window + skip, **same})


def attend(kind: Kind, q, k, v, ids: Ids, rule: Rule) -> tuple[jax.Array, jax.Array]:
  """The part ``(out [B,l,N,Hv], lse [B,N,l])``; ``kind`` is not ``hidden``."""
  length = q.shape[1]
  stop, start, options = _cut(kind, length, rule)
  ids = None if ids is None else (ids[0][:, :stop], ids[1][:, start:])
  out, lse = block_sparse_attention(
    q[:, :stop], k[:, start:], v[:, start:], segment_ids=ids, return_lse=True, **options
  )
  if stop < length:
    out = jnp.pad(out, ((0, 0), (0, length - stop), (0, 0), (0, 0)))
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, length - stop)), constant_values=-jnp.inf)
  return out, lse


def gradients(kind: Kind, q, k, v, ids: Ids, lse, dout, delta, rule: Rule):
  """``(dq, dk, dv)`` of a part, float32 or wider.

  With P the attention map over all keys, ``P_ij = exp(s_ij - lse_i)``, and
  ``delta_i = sum_h dout_ih out_ih`` of the whole output: ``dS = P (dout v^T - delta)``.

  Args:
    lse, delta: ``[B,N,l]``, over all keys. dout: ``[B,l,N,Hv]``, of the whole output.
  """
  length = q.shape[1]
  stop, start, options = _cut(kind, length, rule)
  ids = None if ids is None else (ids[0][:, :stop], ids[1][:, start:])
  dq, dk, dv = block_sparse_attention_gradients(
    q[:, :stop], k[:, start:], v[:, start:], lse[..., :stop], dout[:, :stop], delta[..., :stop],
    segment_ids=ids, **options,
  )  # fmt: skip
  if stop < length:
    dq = jnp.pad(dq, ((0, 0), (0, length - stop), (0, 0), (0, 0)))
    dk, dv = (jnp.pad(x, ((0, 0), (start, 0), (0, 0), (0, 0))) for x in (dk, dv))
  return dq, dk, dv


def merge(part, other) -> tuple[jax.Array, jax.Array]:
  """Attention over the keys of both parts ``(out, lse)``, each weighed by its share of the mass.

  ``out = out_1 sigmoid(lse_1 - lse_2) + out_2 sigmoid(lse_2 - lse_1)``; a part that saw no key has
  ``lse = -inf`` and weighs nothing. In the dtype of the log-sum-exp, and differentiable.
  """
  (out, lse), (more, of_more) = part, other
  top = jax.lax.stop_gradient(jnp.maximum(lse, of_more))
  top = jnp.where(top > -jnp.inf, top, 0.0)
  weights = jnp.exp(lse - top), jnp.exp(of_more - top)
  mass = weights[0] + weights[1]
  some = mass > 0
  safe = jnp.where(some, mass, 1.0)
  shares = [(w / safe).swapaxes(1, 2)[..., None] for w in weights]
  out = shares[0] * out.astype(lse.dtype) + shares[1] * more.astype(lse.dtype)
  return out, jnp.where(some, top + jnp.log(safe), -jnp.inf)


def choose(
  kinds: Sequence[Kind], index: jax.Array | int, branch: Callable[[Kind], Callable], *operands: Any
) -> Any:
  """``branch(kinds[index])(*operands)``: only that branch runs."""
  if len(kinds) == 1:
    return branch(kinds[0])(*operands)
  return jax.lax.switch(index, [branch(kind) for kind in kinds], *operands)


def pack(k: jax.Array, v: jax.Array) -> jax.Array:
  """Keys and values as one array, for one collective instead of two."""
  return jnp.stack([k, v]) if k.shape == v.shape else jnp.concatenate([k, v], axis=-1)


def unpack(kv: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
  """The inverse of ``pack`` for keys of ``width`` features (``kv`` of one more axis: stacked)."""
  return (kv[0], kv[1]) if kv.ndim == 5 else (kv[..., :width], kv[..., width:])
