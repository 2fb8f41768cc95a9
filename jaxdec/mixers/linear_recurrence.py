# SPDX-License-Identifier: Apache-2.0
"""Linear attention with scalar decay as pure functions: token scan, chunks, draft trees.

Per head, with log-decay ``g_t <= 0`` and state ``S [H,V]``:

  S_t = exp(g_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

This covers linear attention (arXiv 2006.16236, g = 0), RetNet (2307.08621), Lightning Attention
(2401.04658) and Mamba-2 / SSD (2405.21060: k = B, q = C, v = dt x, g = dt A, scale = 1).

Query heads may outnumber key/value heads (N = G K): the state, the keys, the values and the decays
are per kv head. Everything is computed in float32 (float64 if given float64), whatever the inputs.

Sums of log-decays. A float32 cumulative sum loses the small decays beside a large one (one -20
among -0.01 costs two digits). So ``g`` is clamped at -100 (``exp(-100)`` is 0 in float32) and split
into a multiple of 1/256, whose partial sums are exact up to chunks of 655 tokens, and a small
remainder. A segment boundary is then simply a token with ``g = -100``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdec.errors import UserError
from jaxdec.mixers.base import Topology

RESET = -100.0  # log-decay that forgets everything; also the floor of log-decays
_MASKED = -1e30  # exponent of a masked pair; finite, so that no inf - inf arises in gradients


def chunked_linear_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  *,
  log_decay: Float[Array, "#B #T K"] | None = None,
  initial_state: Float[Array, "B K H V"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  valid: Bool[Array, "B T"] | None = None,
  scale: float | None = None,
  chunk_size: int = 64,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K H V"]]:
  """The recurrence in chunks of C tokens: matrix products inside, a scan over T / C states between.

  With ``G`` the cumulative log-decay inside a chunk and ``S`` the state before it:

    O      = (Q K^T * exp(G_i - G_j) [i >= j]) V + exp(G) * (Q S)
    S_next = exp(G_C) S + (exp(G_C - G) * K)^T V

  Args:
    log_decay: g <= 0, per kv head; None: no decay. May be -inf.
    initial_state: state before the first token; it belongs to the first token's segment.
    segment_ids: the state is forgotten where the id changes (adjacent segments need distinct ids).
    valid: tokens that count; the others leave the state unchanged and their output is undefined.
    scale: factor on q; None: ``H ** -0.5``.
    chunk_size: C; changes speed and rounding only.

  Returns:
    Outputs in the dtype of ``q``, and the state after the last token in float32.

  Raises:
    UserError: N is not a multiple of K.

  Source: Transformers are SSMs (arXiv 2405.21060), section 6; RetNet (2307.08621), equation 7.
  """
  b, t, kv_heads, h = k.shape
  group = _group(q, k)
  dtype = _accumulator(q)
  q, k, v, g, state, out_dtype = _prepare(
    q, k, v, log_decay, initial_state, segment_ids, valid, scale
  )
  if t == 0:
    return jnp.zeros(q.shape[:-1] + v.shape[-1:], out_dtype), state

  c = min(chunk_size, t)
  chunks = -(-t // c)

  def split(x):  # [B,T,K,...] -> [B,K,chunks,C,...]; the tail is padded with k = v = g = 0
    x = jnp.pad(x, [(0, 0), (0, chunks * c - t)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(b, chunks, c, *x.shape[2:])
    return jnp.moveaxis(x, 3, 1)

  q = jnp.moveaxis(split(q.reshape(b, t, kv_heads, group, h)), 4, 3)  # [B,K,n,G,C,H]
  k, v = split(k), split(v)
  scores = jnp.einsum("bkngch,bknsh->bkngcs", q, k)
  if g is None:
    causal = jnp.tril(jnp.ones((c, c), bool))
    scores = jnp.where(jnp.broadcast_to(causal, scores.shape), scores, 0.0)
    update = jnp.einsum("bknsh,bknsv->bknhv", k, v)
    forget = jnp.ones((b, kv_heads, chunks), dtype)
  else:
    g = split(g)
    scores = scores * jnp.exp(_between(g))[:, :, :, None]
    after = jnp.exp(_sums(g, exclusive_suffix=True))
    update = jnp.einsum("bknsh,bknsv->bknhv", k * after[..., None], v)
    before = jnp.exp(_sums(g))
    forget = before[..., -1]

  def carry(s, chunk):
    decay, u = chunk
    return decay[:, :, None, None] * s + u, s

  if chunks == 1:
    final = forget[:, :, 0, None, None] * state + update[:, :, 0]
    states = state[:, :, None]
  else:
    per_chunk = (jnp.moveaxis(forget, 2, 0), jnp.moveaxis(update, 2, 0))
    final, states = jax.lax.scan(carry, state, per_chunk)
    states = jnp.moveaxis(states, 0, 2)

  inter = jnp.einsum("bkngch,bknhv->bkngcv", q, states)
  if g is not None:
    inter = inter * before[:, :, :, None, :, None]
  out = jnp.einsum("bkngcs,bknsv->bkngcv", scores, v) + inter
  out = jnp.transpose(out, (0, 2, 4, 1, 3, 5)).reshape(b, chunks * c, kv_heads * group, -1)
  return out[:, :t].astype(out_dtype), final


def recurrent_linear_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  *,
  log_decay: Float[Array, "#B #T K"] | None = None,
  initial_state: Float[Array, "B K H V"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  valid: Bool[Array, "B T"] | None = None,
  scale: float | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B K H V"]]:
  """The definition, token by token: the reference for ``chunked_linear_attention``."""
  b, t, kv_heads, h = k.shape
  group = _group(q, k)
  q, k, v, g, state, out_dtype = _prepare(
    q, k, v, log_decay, initial_state, segment_ids, valid, scale
  )
  if g is None:
    g = jnp.zeros((b, t, kv_heads), k.dtype)

  def step(s, token):
    q_t, k_t, v_t, g_t = token
    s = jnp.exp(g_t)[..., None, None] * s + k_t[..., :, None] * v_t[..., None, :]
    return s, jnp.einsum("bkgh,bkhv->bkgv", q_t, s)

  tokens = (q.reshape(b, t, kv_heads, group, h), k, v, g)
  final, out = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
  out = jnp.moveaxis(out, 0, 1).reshape(b, t, kv_heads * group, v.shape[-1])
  return out.astype(out_dtype), final


def tree_linear_attention(
  q: Float[Array, "B M N H"],
  k: Float[Array, "B M K H"],
  v: Float[Array, "B M K V"],
  log_decay: Float[Array, "B M K"] | None,
  state: Float[Array, "B K H V"],
  topology: Topology,
  *,
  scale: float | None = None,
) -> Float[Array, "B M N V"]:
  """Outputs of all nodes of a draft tree at once, each as if its root-to-node path ran alone.

  Sums over time become sums over ancestors: with ``s_i`` the log-decay summed over node i and its
  ancestors, and ``A`` the ancestor-or-self relation,

    o_i = exp(s_i) q_i S_0 + sum_j A_ij exp(s_i - s_j) (q_i k_j) v_j

  Every exponent used is <= 0, because j lies on the path to i. No state per branch is materialised:
  M^2 (H + V) operations a head in place of M H V.

  Source: STree (arXiv 2505.14969), section 3, for scalar-decay models.
  """
  b, m, kv_heads, h = k.shape
  group = _group(q, k)
  q, k, v, g, state, out_dtype = _prepare(q, k, v, log_decay, state, None, None, scale)
  ancestors = topology.ancestors
  q = q.reshape(b, m, kv_heads, group, h)
  scores = jnp.einsum("bikgh,bjkh->bkgij", q, k)
  inter = jnp.einsum("bikgh,bkhv->bikgv", q, state)
  if g is None:
    keep = jnp.broadcast_to(ancestors[:, None, None], scores.shape)
    scores = jnp.where(keep, scores, 0.0)
  else:
    parts = [
      # HIGHEST: a bfloat16 matrix unit must not round the sums of log-decays.
      jnp.einsum("bij,bjk->bki", ancestors.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)
      for x in _coarse_fine(g)
    ]
    exponent = sum(x[..., :, None] - x[..., None, :] for x in parts)
    keep = jnp.broadcast_to(ancestors[:, None], exponent.shape)
    scores = scores * jnp.exp(jnp.where(keep, exponent, _MASKED))[:, :, None]
    inter = inter * jnp.exp(jnp.moveaxis(sum(parts), 1, 2))[..., None, None]
  out = jnp.einsum("bkgij,bjkv->bikgv", scores, v) + inter
  return out.reshape(b, m, kv_heads * group, v.shape[-1]).astype(out_dtype)


def update_state(
  state: Float[Array, "B K H V"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  *,
  log_decay: Float[Array, "#B #T K"] | None = None,
  valid: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B K H V"]:
  """The state after T more tokens, in one masked sum (the commit of a few accepted nodes).

  S <- exp(G_T) S + sum_t exp(G_T - G_t) k_t^T v_t
  """
  _, k, v, g, state, _ = _prepare(k, k, v, log_decay, state, None, valid, 1.0)
  if g is None:
    return state + jnp.einsum("btkh,btkv->bkhv", k, v)
  g = jnp.moveaxis(g, 1, 2)
  after = jnp.moveaxis(jnp.exp(_sums(g, exclusive_suffix=True)), 2, 1)
  update = jnp.einsum("btkh,btkv->bkhv", k * after[..., None], v)
  return jnp.exp(_sums(g)[..., -1])[..., None, None] * state + update


def _accumulator(x: Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)


def _group(q: Array, k: Array) -> int:
  heads, kv_heads = q.shape[2], k.shape[2]
  if heads % kv_heads:
    raise UserError(
      f"linear attention: {heads} query heads are not a multiple of {kv_heads} "
      "key/value heads; make them one."
    )
  return heads // kv_heads


def _prepare(q, k, v, log_decay, state, segment_ids, valid, scale):
  """Casts, scales, folds padding into zeros and segment starts into log-decays."""
  dtype, out_dtype = _accumulator(q), q.dtype
  b, t, kv_heads, h = k.shape
  q = q.astype(dtype) * (h**-0.5 if scale is None else scale)
  k, v = k.astype(dtype), v.astype(dtype)
  g = None
  if log_decay is not None:
    g = jnp.maximum(log_decay.astype(dtype), RESET)
    g = jnp.broadcast_to(g, (b, t, kv_heads))
  if segment_ids is not None and t > 0:
    g = jnp.zeros((b, t, kv_heads), dtype) if g is None else g
    start = jnp.broadcast_to(_segment_starts(segment_ids, valid)[..., None], g.shape)
    g = jnp.where(start, RESET, g)
  if valid is not None:
    here = valid[:, :, None]
    k = jnp.where(here[..., None], k, 0.0)
    v = jnp.where(here[..., None], v, 0.0)
    g = None if g is None else jnp.where(here, g, 0.0)
  if state is None:
    state = jnp.zeros((b, kv_heads, h, v.shape[-1]), dtype)
  return q, k, v, g, state.astype(dtype), out_dtype


def _segment_starts(segment_ids: Array, valid: Array | None) -> Array:
  """True where a token's id differs from that of the valid token before it; never at the first."""
  t = segment_ids.shape[1]
  index = jnp.broadcast_to(jnp.arange(t)[None], segment_ids.shape)
  seen = index if valid is None else jnp.where(valid, index, -1)
  last = jax.lax.cummax(seen, axis=1)
  last = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  previous = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)
  return (last >= 0) & (segment_ids != previous)


def _coarse_fine(g: Array) -> tuple[Array, Array]:
  """``g`` as a multiple of 1/256 (sums of which are exact) plus a remainder."""
  coarse = jax.lax.stop_gradient(jnp.round(g * 256.0) / 256.0)
  return coarse, g - coarse


def _sums(g: Array, exclusive_suffix: bool = False) -> Array:
  """Sums over the last axis: of ``g[..i]``, or of what comes after, ``g[i+1..]``.

  The suffix is summed by itself rather than as total minus prefix, so that its gradient (a sum over
  earlier tokens) isn't the difference of two large sums either.
  """
  if not exclusive_suffix:
    return sum(jnp.cumsum(x, axis=-1) for x in _coarse_fine(g))
  shifted = jnp.pad(g[..., 1:], [(0, 0)] * (g.ndim - 1) + [(0, 1)])
  return sum(jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True) for x in _coarse_fine(shifted))


@jax.custom_jvp
def _between(g: Float[Array, "... C"]) -> Float[Array, "... C C"]:
  """``E[i, j]`` = sum of ``g`` over ``j < l <= i`` for ``i >= j`` (diagonal: 0), else -1e30."""
  parts = [jnp.cumsum(x, axis=-1) for x in _coarse_fine(g)]
  difference = sum(x[..., :, None] - x[..., None, :] for x in parts)
  lower = jnp.tril(jnp.ones(difference.shape[-2:], bool))
  return jnp.where(jnp.broadcast_to(lower, difference.shape), difference, _MASKED)


@_between.defjvp
def _between_jvp(primals, tangents):
  """Tangent as a masked sum, whose transpose adds each (j < l <= i) pair to ``g_l`` once.

  Differentiating ``G_i - G_j`` instead would subtract row sums from column sums, which buries the
  gradients of strongly decayed tokens under rounding.
  """
  (g,), (dg,) = primals, tangents
  c = g.shape[-1]
  later = jnp.tril(jnp.ones((c, c), bool), -1)  # [l, j]: l > j
  masked = jnp.where(jnp.broadcast_to(later, (*dg.shape, c)), dg[..., :, None], 0.0)
  lower = jnp.tril(jnp.ones((c, c), dg.dtype))
  tangent = jnp.einsum("il,...lj->...ij", lower, masked, precision=jax.lax.Precision.HIGHEST)
  return _between(g), tangent
