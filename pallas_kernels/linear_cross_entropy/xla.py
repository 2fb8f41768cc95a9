# SPDX-License-Identifier: Apache-2.0
"""Blocks of logits in plain XLA: scans over the vocabulary, inside them over the tokens.

Both losses with few targets a token are one: with target ids ``i_k`` and probabilities ``p_k``,

  cross-entropy   K = 1, p = 1:     loss = lse - z[label]
  top-k KL        teacher's top k:  loss = sum_k p_k (log p_k + lse - z[i_k])

and ``dloss/dz = (sum_k p_k) q - sum_k p_k [v = i_k]``. The full KL forms the teacher's logits
again in the backward pass instead, ``dloss/dz = q - p``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._dispatch import current_target
from pallas_kernels._numerics import accumulator
from pallas_kernels._tpu import precision
from pallas_kernels.linear_cross_entropy._config import XLAConfig

COMPARED = 16  # targets found by comparison, which fuses; more are scattered


@dataclasses.dataclass(frozen=True)
class Options:
  """What is static: blocks, and how logits are made of products."""

  vocab_block: int
  token_block: int
  temperature: float
  logit_cap: float | None


def linear_cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array | None,
  teacher_hidden: jax.Array | None,
  teacher_head: jax.Array | None,
  *,
  top_k: int | None,
  temperature: float,
  logit_cap: float | None,
  vocab_block: int | None,
  config: XLAConfig | None,
) -> jax.Array:
  """Per-token loss ``[T]``."""
  config = config or XLAConfig(vocab_block=vocab_block)
  tokens = hidden.shape[0]
  options = Options(*_blocks(config, tokens, head.shape[0]), temperature, logit_cap)
  hidden, labels, teacher_hidden = (
    None if x is None else pad(x, options.token_block) for x in (hidden, labels, teacher_hidden)
  )
  if labels is not None:
    loss = _sparse(hidden, head, labels[:, None], None, options)
  elif top_k is None:
    loss = _dense(hidden, head, teacher_hidden, teacher_head, options)
  else:
    ids, log_p = teacher_top_k(teacher_hidden, teacher_head, top_k, options)
    p = jnp.exp(log_p)
    loss = _sparse(hidden, head, ids, p, options) + jnp.sum(p * log_p, axis=-1)
  return loss[:tokens]


def _blocks(config: XLAConfig, tokens: int, vocab: int) -> tuple[int, int]:
  cpu = current_target().platform == "cpu"
  token_block = config.token_block
  if token_block is None:  # as even as can be
    token_block = -(-tokens // -(-tokens // (1024 if cpu else 8192)))
  vocab_block = config.vocab_block or max(128, (2**21 if cpu else 2**25) // token_block)
  return min(vocab, vocab_block), min(tokens, token_block)


def pad(x: jax.Array, size: int) -> jax.Array:
  """Zeros up to a multiple of ``size`` rows."""
  return jnp.pad(x, ((0, -x.shape[0] % size), *((0, 0),) * (x.ndim - 1)))


def over_blocks(length: int, size: int, step: Callable[[Any, Any, int], Any], carry: Any) -> Any:
  """``carry = step(carry, start, size)`` by blocks, a shorter last one apart: no masks."""
  whole, rest = divmod(length, size)
  if whole == 1:
    carry = step(carry, 0, size)
  elif whole:
    carry, _ = jax.lax.scan(
      lambda c, i: (step(c, i * size, size), None), carry, jnp.arange(whole, dtype=jnp.int32)
    )
  return step(carry, whole * size, rest) if rest else carry


def rows(x: jax.Array, start: Any, size: int) -> jax.Array:
  # A CPU widens half-precision arrays to move them. Tied to the index, which changes, that isn't
  # done to the whole array outside of the loop.
  x, start = jax.lax.optimization_barrier((x, start))
  return jax.lax.dynamic_slice_in_dim(x, start, size)


def put(x: jax.Array, block: jax.Array, start: Any) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, 0)


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int, dtype: jnp.dtype) -> jax.Array:
  """Contracts one axis of two matrices, in ``dtype``, accumulating in float32 or wider."""
  return jax.lax.dot_general(
    x.astype(dtype),
    y.astype(dtype),
    (((x_axis,), (y_axis,)), ((), ())),
    precision=precision(dtype),
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


def logits(hidden: jax.Array, head: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
  """``z`` of a block ``[t,v]``, and ``dz / d product``: a number, or an array with a cap."""
  z = dot(hidden, head, 1, 1, jnp.promote_types(hidden.dtype, head.dtype))
  slope = 1.0 / options.temperature
  if options.logit_cap is not None:
    bent = jnp.tanh(z * (1.0 / options.logit_cap))
    z, slope = options.logit_cap * bent, slope * (1 - bent * bent)
  return z * (1.0 / options.temperature), slope


def targets(ids: jax.Array, p: jax.Array | None, start: Any, size: int, dtype) -> jax.Array:
  """``sum_k p_k [v = i_k]`` of a block ``[t,v]``. ids, p: ``[t,K]``; p None: ones."""
  tokens, count = ids.shape
  if count <= COMPARED:
    column = jax.lax.broadcasted_iota(jnp.int32, (tokens, size), 1) + start
    hits = [column == ids[:, k, None] for k in range(count)]
    return sum(h.astype(dtype) * (1 if p is None else p[:, k, None]) for k, h in enumerate(hits))
  place = jnp.where(ids < start, size, ids - start)  # a negative index would wrap around
  row = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 0)
  return jnp.zeros((tokens, size), dtype).at[row, place].add(p, mode="drop")


def online(running: tuple[jax.Array, jax.Array], z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Maximum, and sum of ``exp(z - maximum)``, after another block of logits."""
  top, total = running
  new = jnp.maximum(top, jnp.max(z, axis=-1))
  return new, total * jnp.exp(top - new) + jnp.sum(jnp.exp(z - new[:, None]), axis=-1)


def _start(tokens: int, dtype) -> tuple[jax.Array, jax.Array]:
  return jnp.full(tokens, -jnp.inf, dtype), jnp.zeros(tokens, dtype)


def _forward(hidden, options, statistics, start):
  """Blocks of tokens outside, of vocabulary inside; ``statistics(at, carry, v, size) -> carry``."""
  tokens = hidden.shape[0]
  out = jax.eval_shape(lambda: start(tokens))

  def per_tokens(carry, t, size):
    block = statistics(t, size, start(size))
    return jax.tree.map(lambda whole, part: put(whole, part, t), carry, block)

  initial = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)
  return over_blocks(tokens, options.token_block, per_tokens, initial)


def _backward(hidden, head, g, options, slope_of_loss):
  """Gradients from ``slope_of_loss(t, size, v, size) -> (dloss/dz, dz/dproduct)`` of a block.

  Vocabulary outside: rows of the head's gradient are complete when they are rounded to its dtype.
  """
  tokens, vocab = hidden.shape[0], head.shape[0]
  dtype, wide = jnp.promote_types(hidden.dtype, head.dtype), accumulator(hidden)

  def per_vocab(carry, v, v_size):
    d_hidden, d_head = carry
    weight = rows(head, v, v_size)

    def per_tokens(inner, t, t_size):
      d_hidden, d_rows = inner
      delta, slope = slope_of_loss(t, t_size, v, v_size)
      delta = (rows(g, t, t_size)[:, None] * delta * slope).astype(dtype)
      here = rows(d_hidden, t, t_size) + dot(delta, weight, 1, 0, dtype)
      return put(d_hidden, here, t), d_rows + dot(delta, rows(hidden, t, t_size), 0, 0, dtype)

    d_rows = jnp.zeros(weight.shape, wide)
    d_hidden, d_rows = over_blocks(tokens, options.token_block, per_tokens, (d_hidden, d_rows))
    return d_hidden, put(d_head, d_rows, v)

  initial = jnp.zeros(hidden.shape, wide), jnp.zeros(head.shape, head.dtype)
  d_hidden, d_head = over_blocks(vocab, options.vocab_block, per_vocab, initial)
  return d_hidden.astype(hidden.dtype), d_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sparse(hidden, head, ids, p, options):
  """``(sum_k p_k) lse - sum_k p_k z[i_k]``. ids, p: ``[T,K]``; p None: ones, K = 1."""
  return _sparse_fwd(hidden, head, ids, p, options)[0]


def _sparse_fwd(hidden, head, ids, p, options):
  dtype = accumulator(hidden)

  def statistics(t, size, carry):
    states, ids_here = rows(hidden, t, size), rows(ids, t, size)
    p_here = None if p is None else rows(p, t, size)

    def step(carry, v, v_size):
      running, picked = carry
      z, _ = logits(states, rows(head, v, v_size), options)
      hit = targets(ids_here, p_here, v, v_size, dtype)
      return online(running, z), picked + jnp.sum(hit * z, axis=-1)

    return over_blocks(head.shape[0], options.vocab_block, step, carry)

  def start(n):
    return _start(n, dtype), jnp.zeros(n, dtype)

  (top, total), picked = _forward(hidden, options, statistics, start)
  lse = top + jnp.log(total)
  loss = (lse if p is None else lse * jnp.sum(p, axis=-1)) - picked
  return loss, (hidden, head, ids, p, lse)


def _sparse_bwd(options, residuals, g):
  hidden, head, ids, p, lse = residuals

  def slope_of_loss(t, t_size, v, v_size):
    z, slope = logits(rows(hidden, t, t_size), rows(head, v, v_size), options)
    q = jnp.exp(z - rows(lse, t, t_size)[:, None])
    p_here = None if p is None else rows(p, t, t_size)
    if p is not None:
      q = q * jnp.sum(p_here, axis=-1, keepdims=True)
    return q - targets(rows(ids, t, t_size), p_here, v, v_size, q.dtype), slope

  d_hidden, d_head = _backward(hidden, head, g, options, slope_of_loss)
  return d_hidden, d_head, None, None


_sparse.defvjp(_sparse_fwd, _sparse_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _dense(hidden, head, teacher_hidden, teacher_head, options):
  """``sum_v p_v (log p_v - log q_v)``."""
  return _dense_fwd(hidden, head, teacher_hidden, teacher_head, options)[0]


def _dense_fwd(hidden, head, teacher_hidden, teacher_head, options):
  dtype = accumulator(hidden)

  def statistics(t, size, carry):
    states, teacher_states = rows(hidden, t, size), rows(teacher_hidden, t, size)

    def step(carry, v, v_size):
      student, teacher, gap = carry
      z, _ = logits(states, rows(head, v, v_size), options)
      y, _ = logits(teacher_states, rows(teacher_head, v, v_size), options)
      new = online(teacher, y)
      here = jnp.sum(jnp.exp(y - new[0][:, None]) * (y - z), axis=-1)
      return online(student, z), new, gap * jnp.exp(teacher[0] - new[0]) + here

    return over_blocks(head.shape[0], options.vocab_block, step, carry)

  def start(n):
    return _start(n, dtype), _start(n, dtype), jnp.zeros(n, dtype)

  (top, total), (teacher_top, teacher_total), gap = _forward(hidden, options, statistics, start)
  lse, teacher_lse = top + jnp.log(total), teacher_top + jnp.log(teacher_total)
  loss = gap / teacher_total - teacher_lse + lse
  return loss, (hidden, head, teacher_hidden, teacher_head, lse, teacher_lse)


def _dense_bwd(options, residuals, g):
  hidden, head, teacher_hidden, teacher_head, lse, teacher_lse = residuals

  def slope_of_loss(t, t_size, v, v_size):
    z, slope = logits(rows(hidden, t, t_size), rows(head, v, v_size), options)
    y, _ = logits(rows(teacher_hidden, t, t_size), rows(teacher_head, v, v_size), options)
    q = jnp.exp(z - rows(lse, t, t_size)[:, None])
    p = jnp.exp(y - rows(teacher_lse, t, t_size)[:, None])
    return q - p, slope

  d_hidden, d_head = _backward(hidden, head, g, options, slope_of_loss)
  return d_hidden, d_head, None, None


_dense.defvjp(_dense_fwd, _dense_bwd)


def teacher_top_k(
  hidden: jax.Array, head: jax.Array, k: int, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Ids and log-probabilities ``[T,k]`` of the teacher's likeliest tokens, best first.

  A running top k merges block by block. Earlier blocks stand first, so that equal logits keep the
  order of their ids, as ``lax.top_k`` over all of them would.
  """
  dtype = accumulator(hidden)

  def statistics(t, size, carry):
    states = rows(hidden, t, size)

    def step(carry, v, v_size):
      running, values, ids = carry
      y, _ = logits(states, rows(head, v, v_size), options)
      here, place = jax.lax.top_k(y, min(k, v_size))
      values = jnp.concatenate([values, here], axis=-1)
      ids = jnp.concatenate([ids, place + v], axis=-1)
      values, order = jax.lax.top_k(values, k)
      return online(running, y), values, jnp.take_along_axis(ids, order, axis=-1)

    return over_blocks(head.shape[0], options.vocab_block, step, carry)

  def start(n):
    values = jnp.full((n, k), -jnp.inf, dtype)
    return _start(n, dtype), values, jnp.zeros((n, k), jnp.int32)

  (top, total), values, ids = _forward(hidden, options, statistics, start)
  return ids, values - (top + jnp.log(total))[:, None]
