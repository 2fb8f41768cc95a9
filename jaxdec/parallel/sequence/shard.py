# SPDX-License-Identifier: Apache-2.0
"""What a linear layer computes on one rank's tokens, without any other rank."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxdec.parallel.sequence import delta
from jaxdec.parallel.sequence.summary import FORGET, Summary
from pallas_kernels import current_target
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.numerics import (
  accumulator,
  coarse_fine,
  log_decays,
  prefix,
  repeat_heads,
  suffix,
)


def split_runs(x: jax.Array | None) -> jax.Array | None:
  """Zigzag shard ``[B,L,..]`` as its two runs ``[2B,L/2,..]``."""
  if x is None:
    return None
  x = x.reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def join_runs(x: jax.Array) -> jax.Array:
  """The inverse of ``split_runs``."""
  x = x.reshape(2, x.shape[0] // 2, *x.shape[1:])
  return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def flip(x: jax.Array | None, runs: int) -> jax.Array | None:
  """The shard's tokens in reverse order: each run, and the runs."""
  if x is None:
    return None
  x = jnp.flip(x, 1)
  return x if runs == 1 else jnp.roll(x, x.shape[0] // 2, axis=0)


@dataclasses.dataclass(frozen=True)
class Shard:
  """One call's arrays on this rank, and what of them needs no other rank."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  log_decay: jax.Array | None
  beta: jax.Array | None
  segment_ids: jax.Array | None
  heads: int
  scale: float | None
  chunk_size: int | None

  def _map(self, f) -> Shard:
    names = ("q", "k", "v", "log_decay", "beta", "segment_ids")
    return dataclasses.replace(self, **{name: f(getattr(self, name)) for name in names})

  def split_runs(self) -> Shard:
    decay = self.log_decay
    if decay is not None:  # axes B and T may be 1
      decay = jnp.broadcast_to(decay, (*self.q.shape[:2], *decay.shape[2:]))
    return dataclasses.replace(self, log_decay=decay)._map(split_runs)

  def flip(self, runs: int) -> Shard:
    return self._map(lambda x: flip(x, runs))

  @property
  def wide(self) -> jnp.dtype:
    return accumulator(jnp.zeros((), jnp.result_type(self.q, self.k, self.v)))

  @property
  def factor(self) -> float:
    return 1.0 / math.sqrt(self.q.shape[-1]) if self.scale is None else self.scale

  @property
  def decays(self) -> jax.Array | None:
    """``[B,L,n]`` or ``[B,L,n,H]``, resets included."""
    if self.log_decay is None and self.segment_ids is None:
      return None
    rest = (1,) if self.log_decay is None else self.log_decay.shape[2:]
    shape = (*self.q.shape[:2], *rest)
    return log_decays(self.log_decay, self.segment_ids, shape).astype(self.wide)

  def op(self, initial_state: jax.Array | None = None):
    """Outputs and final state on this rank alone."""
    options = dict(
      initial_state=initial_state,
      segment_ids=self.segment_ids,
      scale=self.factor,
      chunk_size=self.chunk_size,
    )
    if self.beta is None:
      return linear_attention(self.q, self.k, self.v, log_decay=self.log_decay, **options)
    if initial_state is not None:
      options["initial_state"] = repeat_heads(initial_state, self.heads, 1)
    x = self._delta
    return delta_rule(x.q, x.k, x.v, x.beta, log_decay=x.log_decay, **options)

  def summary(self, heads: int = 0) -> tuple[Summary, delta.Link | None]:
    """This rank's map, and what ``outputs`` needs. ``heads``: the least its state has."""
    ids = (None, None)
    if self.segment_ids is not None:
      ids = self.segment_ids[:, 0], self.segment_ids[:, -1]
    if self.beta is not None:
      update, dense, link = delta.summarise(self._options, self._delta)
      return Summary(update, None, dense, *ids), link
    k, v, g = self.k, self.v, self.decays
    log = None
    if g is not None:
      log = sum(jnp.sum(x, axis=1) for x in coarse_fine(g))
      log = jnp.where(log < FORGET, FORGET, log)
      log = log if g.ndim == 4 else log[..., None]
      k, v = self._decay(k, v, suffix(g, axis=1))
    counts = [k.shape[2], v.shape[2], heads or 1]
    heads = max(counts) if all(max(counts) % x == 0 for x in counts) else self.heads
    return Summary(self._outer(k, v, heads), log, None, *ids), None

  def outputs(self, state: jax.Array, final: jax.Array, link: delta.Link | None):
    """Outputs, with a state that enters the shard, and the final state."""
    if self.beta is None:
      return self.op()[0] + self.read(state), final
    out, queries = delta.outputs(self._options, self._delta)
    product = functools.partial(_read, operands=self._operands)
    out = delta.read(product, out, queries, state, link)
    return out, delta.passed(final, state, link)

  @property
  def _options(self) -> delta.Options:
    return delta.Options(self.heads, self.factor, self.chunk_size)

  @property
  def _delta(self) -> delta.Arrays:
    decay = None if self.log_decay is None else repeat_heads(self.log_decay, self.heads, 2)
    beta = repeat_heads(self.beta, self.heads, 2)
    return delta.Arrays(self.q, self.k, self.v, beta, decay, self.segment_ids)

  def read(self, state: jax.Array) -> jax.Array:
    """What the queries see of a state that enters the shard (no delta rule)."""
    q, g = self.q, self.decays
    if g is None:
      return self.factor * _read(q, state, self._operands)
    if g.ndim == 4:
      q = _times(q, jnp.exp(prefix(g, axis=1)))
      return self.factor * _read(q, state, self._operands)
    weights = self.factor * jnp.exp(prefix(g, axis=1))
    return _times(_read(q, state, self._operands), weights[..., None])

  def diagonal(self) -> jax.Array:
    """What each token reads of its own update."""
    q, k, v = (x.astype(self.wide) for x in (self.q, self.k, self.v))
    n = max(q.shape[2], k.shape[2])
    q, k = repeat_heads(q, n, 2), repeat_heads(k, n, 2)
    dots = self.factor * jnp.sum(q * k, axis=-1, keepdims=True)
    return _times(repeat_heads(v, self.heads, 2), dots)

  @property
  def _operands(self) -> jnp.dtype:
    """Of products: as in the ops, 16-bit floats stay what they are except on a CPU."""
    dtype = jnp.result_type(self.q, self.k, self.v)
    return self.wide if current_target().platform == "cpu" else dtype

  def _decay(self, k, v, exponents):
    """Keys or, by scalars, values, decayed until the end of the shard."""
    decay = jnp.exp(exponents)
    return (_times(k, decay), v) if decay.ndim == 4 else (k, _times(v, decay[..., None]))

  def _outer(self, k, v, heads: int) -> jax.Array:
    """``sum over tokens of k v^T``, ``[B,heads,H,Hv]``."""
    b, length, nk, h = k.shape
    nv, width = v.shape[2:]
    if heads not in (nk, nv) or heads % nk or heads % nv:
      k, v, nk, nv = repeat_heads(k, heads, 2), repeat_heads(v, heads, 2), heads, heads
    few = min(nk, nv)
    k = k.reshape(b, length, few, nk // few, h)
    v = v.reshape(b, length, few, nv // few, width)
    out = _product("blcgh,blcfv->bcgfhv", k, v, self._operands)
    return out.reshape(b, heads, h, width)


def _read(q: jax.Array, state: jax.Array, operands) -> jax.Array:
  """``[B,L,N,Hv]``: heads are only repeated where neither side has all of them."""
  b, length, nq, h = q.shape
  ns, width = state.shape[1], state.shape[3]
  few, heads = min(nq, ns), max(nq, ns)
  if heads % few:
    heads = math.lcm(nq, ns)
    q, state = repeat_heads(q, heads, 2), repeat_heads(state, heads, 1)
    few = nq = ns = heads
  q = q.reshape(b, length, few, nq // few, h)
  state = state.reshape(b, few, ns // few, h, width)
  out = _product("blcgh,bcfhv->blcgfv", q, state, operands)
  return out.reshape(b, length, heads, width)


def _product(subscripts: str, a: jax.Array, b: jax.Array, operands) -> jax.Array:
  wide = jnp.promote_types(operands, jnp.float32)
  # Matrix units round float32 operands to bfloat16 unless told not to.
  precision = lax.Precision.HIGHEST if wide == operands else lax.Precision.DEFAULT
  return jnp.einsum(
    subscripts,
    a.astype(operands),
    b.astype(operands),
    precision=precision,
    preferred_element_type=wide,
  )


def _times(x: jax.Array, weights: jax.Array) -> jax.Array:
  """``x [B,L,heads,..]`` times weights with other heads, in the weights' type."""
  heads = math.lcm(x.shape[2], weights.shape[2])
  return repeat_heads(x, heads, 2).astype(weights.dtype) * repeat_heads(weights, heads, 2)
