# SPDX-License-Identifier: Apache-2.0
"""Compressors: an image's embeddings to a few vectors, which is what a drafter reads of it.

A draft layer that reads every image token spends most of its keys on what tells little about the
next word. Each compressor takes ``x [B,N,D]``, right-padded with ``count [B]`` valid rows, and
gives ``Compressed``; rows of text have count 0 and keep nothing. None knows positions, so an order
of the tokens matters only where the method has one (pooling, convolution, pruning).

  pruning       m of the tokens: at random in training, evenly spaced in use
  pooling       means of r neighbours
  convolution   ``sum_i W_i x_{rj+i}``, stride r; starts as pooling
  resampler     q learned queries attend to all tokens (arXiv 2204.14198)
  latents       m learned queries a: ``softmax_t(a . x_t) x``, no projections (FLASH)

``Elastic`` (SpecVLM, arXiv 2509.11815) combines the first four: ``mix`` weighs three of equal
ratio, ``concat`` keeps them all, ``gate`` lets the question choose one of them, or none.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.mixers.norms import Dense


@struct.dataclass
class Compressed:
  """What is left of a span: the first ``count[b]`` rows of ``values``."""

  values: Float[Array, "B M D"]
  count: Int[Array, "B"]


def _up(count: Int[Array, "B"], ratio: int) -> Int[Array, "B"]:
  return (count + ratio - 1) // ratio


class Pruning(nn.Module):
  """One of ``ratio`` tokens, in order."""

  ratio: int

  def __call__(self, x, count, rng=None) -> Compressed:
    n = x.shape[1]
    m, left = -(-n // self.ratio), _up(count, self.ratio)
    if rng is None:
      slots = ((jnp.arange(m) + 0.5) * (count / jnp.maximum(left, 1))[:, None]).astype(jnp.int32)
    else:
      score = jax.random.uniform(rng, x.shape[:2]) + (jnp.arange(n) < count[:, None])
      chosen = jnp.argsort(-score, axis=1)[:, :m]
      chosen = jnp.where(jnp.arange(m) < left[:, None], chosen, n)
      slots = jnp.sort(chosen, axis=1)
    slots = jnp.clip(slots, 0, n - 1)
    return Compressed(jnp.take_along_axis(x, slots[..., None], axis=1), left)


class Pooling(nn.Module):
  """Means of ``ratio`` neighbours; the last group may be smaller."""

  ratio: int

  def __call__(self, x, count, rng=None) -> Compressed:
    groups = _groups(x, count, self.ratio)
    size = jnp.clip(count[:, None] - jnp.arange(groups.shape[1]) * self.ratio, 1, self.ratio)
    mean = jnp.sum(groups, axis=2) / size[..., None].astype(x.dtype)
    return Compressed(mean, _up(count, self.ratio))


class Convolution(nn.Module):
  """Kernel and stride ``ratio``; starts as the mean."""

  ratio: int

  @nn.compact
  def __call__(self, x, count, rng=None) -> Compressed:
    d = x.shape[-1]
    init = nn.with_logical_partitioning(
      lambda rng, r, d: jnp.broadcast_to(jnp.eye(d) / r, (r, d, d)), (None, "embed", None)
    )
    kernel = self.param("kernel", init, self.ratio, d).astype(x.dtype)
    groups = _groups(x, count, self.ratio)
    return Compressed(jnp.einsum("bmri,rio->bmo", groups, kernel), _up(count, self.ratio))


def _groups(x, count, ratio) -> Float[Array, "B M R D"]:
  """Neighbours together; padding is zero."""
  b, n, d = x.shape
  m = -(-n // ratio)
  x = jnp.where((jnp.arange(n) < count[:, None])[..., None], x, 0)
  return jnp.pad(x, ((0, 0), (0, m * ratio - n), (0, 0))).reshape(b, m, ratio, d)


class Resampler(nn.Module):
  """``queries`` learned queries, multi-head cross-attention over the tokens, no positions."""

  queries: int
  num_heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, count, rng=None) -> Compressed:
    b, n, d = x.shape
    head = d // self.num_heads
    init = nn.with_logical_partitioning(nn.initializers.normal(head**-0.5), (None, "embed"))
    query = self.param("query", init, (self.queries, d)).astype(self.dtype)
    query = query.reshape(self.queries, self.num_heads, head)
    k, v = (
      Dense(d, ("embed", "heads"), dtype=self.dtype, name=name)(x).reshape(b, n, -1, head)
      for name in "kv"
    )
    logits = jnp.einsum("qnh,btnh->bnqt", query, k, preferred_element_type=jnp.float32)
    probs = _softmax(logits * head**-0.5, count).astype(v.dtype)
    out = jnp.einsum("bnqt,btnh->bqnh", probs, v).reshape(b, self.queries, d)
    out = Dense(d, ("heads", "embed"), dtype=self.dtype, name="o")(out)
    return Compressed(out, jnp.where(count > 0, self.queries, 0))


class Latents(nn.Module):
  """``queries`` learned queries; each is a weighted mean of the tokens."""

  queries: int

  @nn.compact
  def __call__(self, x, count, rng=None) -> Compressed:
    d = x.shape[-1]
    init = nn.with_logical_partitioning(nn.initializers.normal(d**-0.5), (None, "embed"))
    query = self.param("query", init, (self.queries, d)).astype(x.dtype)
    logits = jnp.einsum("qd,btd->bqt", query, x, preferred_element_type=jnp.float32)
    probs = _softmax(logits, count).astype(x.dtype)
    return Compressed(probs @ x, jnp.where(count > 0, self.queries, 0))


def _softmax(logits: Float[Array, "B ... N"], count: Int[Array, "B"]):
  """Over the valid tokens; where there are none, uniform (and not used)."""
  valid = jnp.arange(logits.shape[-1]) < count.reshape(-1, *[1] * (logits.ndim - 1))
  return jax.nn.softmax(jnp.where(valid, logits, -1e30), axis=-1)


class Elastic(nn.Module):
  """SpecVLM's compressor; ``question [B,D]`` is what its gate reads.

  Attributes:
    mode: ``mix``, ``concat`` or ``gate``.
    ratio: of all branches of ``mix``, and of the convolution otherwise.
    coarse: ratio of pruning and pooling in ``concat`` and ``gate``.
    queries: of the resampler.
  """

  mode: Literal["mix", "concat", "gate"]
  ratio: int
  coarse: int
  queries: int
  num_heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, count, question, rng=None) -> Compressed:
    gate_rng = prune_rng = None
    if rng is not None:
      gate_rng, prune_rng = jax.random.split(rng)
    wide = self.ratio if self.mode == "mix" else self.coarse
    branches = [
      Pruning(wide, name="pruning")(x, count, prune_rng),
      Pooling(wide, name="pooling")(x, count),
      Convolution(self.ratio, name="convolution")(x, count),
    ]
    if self.mode == "mix":
      init = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
      weights = jax.nn.softmax(self.param("weights", init, (3,)))
      values = sum(w.astype(x.dtype) * b.values for w, b in zip(weights, branches))
      return Compressed(values, branches[0].count)
    resampler = Resampler(self.queries, self.num_heads, self.dtype, name="resampler")
    branches.append(resampler(x, count))
    if self.mode == "concat":
      return _concatenate(branches)
    none = Compressed(jnp.zeros((x.shape[0], 0, x.shape[2]), x.dtype), jnp.zeros_like(count))
    branches.append(none)
    gate = Dense(len(branches), ("embed", None), True, self.dtype, name="gate")
    return _choose(branches, gate(question).astype(jnp.float32), gate_rng)


def _concatenate(branches: list[Compressed]) -> Compressed:
  """All of them, one after the other, the padding between them gone."""
  values = jnp.concatenate([b.values for b in branches], axis=1)
  kept = jnp.concatenate([_first(b.count, b.values.shape[1]) for b in branches], axis=1)
  order = jnp.argsort(~kept, axis=1, stable=True)
  values = jnp.take_along_axis(values, order[..., None], axis=1)
  return Compressed(values, jnp.sum(kept, axis=1, dtype=jnp.int32))


def _choose(branches: list[Compressed], logits: Float[Array, "B K"], rng) -> Compressed:
  """The best branch of each row; in training a draw (Gumbel-softmax, arXiv 1611.01144), whose
  gradient is that of the soft weights."""
  if rng is not None:
    logits = logits + jax.random.gumbel(rng, logits.shape)
  soft = jax.nn.softmax(logits, axis=-1)
  best = jnp.argmax(logits, axis=-1)
  hard = jax.nn.one_hot(best, len(branches))
  weights = hard + soft - jax.lax.stop_gradient(soft)
  most = max(b.values.shape[1] for b in branches)
  padded = [jnp.pad(b.values, ((0, 0), (0, most - b.values.shape[1]), (0, 0))) for b in branches]
  values = sum(w[:, None, None].astype(p.dtype) * p for w, p in zip(weights.T, padded))
  count = jnp.take_along_axis(jnp.stack([b.count for b in branches], 1), best[:, None], 1)[:, 0]
  return Compressed(values, count.astype(jnp.int32))


def _first(count: Int[Array, "B"], width: int) -> Bool[Array, "B W"]:
  return jnp.arange(width) < count[:, None]
