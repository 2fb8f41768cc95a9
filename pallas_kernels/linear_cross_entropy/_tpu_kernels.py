# SPDX-License-Identifier: Apache-2.0
"""The two kernels, bodies only. Logits lie as ``[vocabulary, tokens]``.

So statistics of a token lie along lanes, reductions over the vocabulary go over sublanes, mostly
plain vector maxima and sums, and a row of statistics takes no padding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu

_FLOOR = -1e30  # running maximum before anything was seen, and logits past the end: finite


@dataclasses.dataclass(frozen=True)
class Rules:
  """What is fixed at trace time.

  Attributes:
    vocab: V; rows of blocks beyond it hold anything and are masked.
    dtype: of the products' operands.
    tokens, rows, sub: sizes of a token block, a vocabulary block, and the part of the latter whose
      logits are formed at once.
    cores: that share the vocabulary in the backward kernel.
    chunk: columns of the gradients that are formed at once.
  """

  vocab: int
  dtype: Any
  temperature: float
  logit_cap: float | None
  tokens: int
  rows: int
  sub: int
  interpret: Any = False
  cores: int = 1
  chunk: int = 256

  @property
  def ragged(self) -> bool:
    return self.vocab % self.rows != 0

  @property
  def blocks(self) -> int:
    return -(-self.vocab // self.rows)


def dot(rules: Rules, x, y, x_axis: int, y_axis: int):
  x, y = x.astype(rules.dtype), y.astype(rules.dtype)
  if (
    rules.interpret
  ):  # not every CPU product takes bfloat16; those of bfloat16 are exact in float32
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  return jax.lax.dot_general(
    x,
    y,
    (((x_axis,), (y_axis,)), ((), ())),
    precision=_tpu.precision(rules.dtype),
    preferred_element_type=jnp.float32,
  )


def logits(rules: Rules, head, states):
  """``z [v,t]`` and ``dz / d product``, a number or an array."""
  z = dot(rules, head, states, 1, 1)
  slope = 1.0 / rules.temperature
  if rules.logit_cap is not None:
    bent = jnp.tanh(z * (1.0 / rules.logit_cap))
    z, slope = rules.logit_cap * bent, slope * (1.0 - bent * bent)
  return (z if rules.temperature == 1.0 else z * (1.0 / rules.temperature)), slope


def targets(ids_ref, p_ref, word):
  """``sum_k p_k [v = i_k]``  # ids, p [K,t], word [v,t] -> [v,t]; p None: ones."""
  count = ids_ref.shape[0]

  def add(k, total):
    p = 1.0 if p_ref is None else p_ref[pl.ds(k, 1), :]
    return total + jnp.where(word == ids_ref[pl.ds(k, 1), :], p, 0.0)

  zeros = jnp.zeros(word.shape, jnp.float32)
  if count <= 8:
    for k in range(count):
      zeros = add(k, zeros)
    return zeros
  return jax.lax.fori_loop(0, count, add, zeros)


def _part(rules: Rules, s):
  return pl.ds(pl.multiple_of(s * rules.sub, rules.sub), rules.sub)


def _words(rules: Rules, block, s):
  """Ids of the words of sub-block s, ``[v,t]``."""
  row = jax.lax.broadcasted_iota(jnp.int32, (rules.sub, rules.tokens), 0)
  return row + (block * rules.rows + s * rules.sub)


def forward(rules: Rules, *refs, dense: bool, weighted: bool):
  """One (token block, vocabulary block) step; the vocabulary is the inner axis of the grid.

  Inputs: states, head, then teacher's states and head, or target ids (and probabilities).
  Outputs ``[1,t]``: log-sum-exp; KL, or ``sum_k p_k z[i_k]``; with a teacher its log-sum-exp.
  Scratch ``[1,t]``: maximum, sum and result so far; with a teacher its maximum and sum.
  """
  x, w, *refs = refs
  (y, u, *refs) = refs if dense else (None, None, *refs)
  (ids, *refs) = (None, *refs) if dense else refs
  (p, *refs) = refs if weighted else (None, *refs)
  if dense:
    lse, value, teacher_lse, top, total, result, teacher_top, teacher_total = refs
  else:
    lse, value, top, total, result = refs
  block, last = pl.program_id(1), pl.num_programs(1) - 1

  @pl.when(block == 0)
  def _():
    for running, start in zip(refs[-5 if dense else -3 :], (_FLOOR, 0.0, 0.0, _FLOOR, 0.0)):
      running[...] = jnp.full(running.shape, start, running.dtype)

  def online(top, total, z):
    new = jnp.maximum(top[...], jnp.max(z, axis=0, keepdims=True))
    decay, e = jnp.exp(top[...] - new), jnp.exp(z - new)
    top[...] = new
    total[...] = total[...] * decay + jnp.sum(e, axis=0, keepdims=True)
    return decay, e

  def step(s, _):
    word = _words(rules, block, s)
    z, _ = logits(rules, w[_part(rules, s), :], x[...])
    if rules.ragged:
      z = jnp.where(word < rules.vocab, z, _FLOOR)
    online(top, total, z)
    if dense:
      other, _ = logits(rules, u[_part(rules, s), :], y[...])
      if rules.ragged:
        other = jnp.where(word < rules.vocab, other, _FLOOR)
      decay, e = online(teacher_top, teacher_total, other)
      # past the end both logits are _FLOOR: their difference is 0
      here = jnp.sum(e * (other - z), axis=0, keepdims=True)
      result[...] = result[...] * decay + here
    else:
      here = targets(ids, p, word)
      result[...] = result[...] + jnp.sum(here * z, axis=0, keepdims=True)
    return 0

  jax.lax.fori_loop(0, rules.rows // rules.sub, step, 0)

  @pl.when(block == last)
  def _():
    log_z = top[...] + jnp.log(total[...])
    lse[...] = log_z
    if dense:
      teacher = teacher_top[...] + jnp.log(teacher_total[...])
      teacher_lse[...] = teacher
      value[...] = result[...] / teacher_total[...] - teacher + log_z
    else:
      value[...] = result[...]


def backward(rules: Rules, *refs, dense: bool, weighted: bool):
  """One (core, vocabulary block, token block) step; the tokens are the inner axis of the grid.

  A block's part of the head's gradient stays in VMEM. That of the states, float32, is in HBM: its
  token block is fetched while logits are formed, added to, and sent back while the next step runs.

  Inputs: states, head, then teacher's states and head, or ids (and probabilities); then rows
  ``[1,t]``: cotangent, log-sum-exp, with a teacher its own, with probabilities their sum.
  Outputs: gradients of states ``[cores, T, D]`` in HBM, of the head.
  """
  x, w, *refs = refs
  (y, u, *refs) = refs if dense else (None, None, *refs)
  (ids, *refs) = (None, *refs) if dense else refs
  (p, *refs) = refs if weighted else (None, *refs)
  g, lse, *refs = refs
  (extra, *refs) = refs if dense or weighted else (None, *refs)
  dx_hbm, dw, dw_sum, dx, delta, delta_t, fetched, sent = refs

  core, local, token = (pl.program_id(a) for a in range(3))
  per_core, token_blocks = -(-rules.blocks // rules.cores), pl.num_programs(2)
  block = core * per_core + local
  mine = jnp.minimum(per_core, rules.blocks - core * per_core)  # blocks of this core
  step = local * token_blocks + token
  slot = jax.lax.rem(step, 2)

  def move(slot, token, out: bool):
    hbm = dx_hbm.at[core, pl.ds(pl.multiple_of(token * rules.tokens, rules.tokens), rules.tokens)]
    ends = (dx.at[slot], hbm) if out else (hbm, dx.at[slot])
    return pltpu.make_async_copy(*ends, (sent if out else fetched).at[slot])

  @pl.when(local < mine)
  def _():
    # This buffer's last block must have left it; any block's size serves to wait for it. With one
    # block of tokens in all, what is fetched now is what the other buffer was sending.
    @pl.when((token_blocks > 1) & (step >= 2))
    def _():
      move(slot, token, True).wait()

    @pl.when((token_blocks == 1) & (step >= 1))
    def _():
      move(1 - slot, token, True).wait()

    @pl.when(local > 0)
    def _():
      move(slot, token, False).start()

    def slopes(s, _):
      word = _words(rules, block, s)
      z, slope = logits(rules, w[_part(rules, s), :], x[...])
      d = jnp.exp(z - lse[...])
      if dense:
        other, _ = logits(rules, u[_part(rules, s), :], y[...])
        d = d - jnp.exp(other - extra[...])
      else:
        d = (d if extra is None else d * extra[...]) - targets(ids, p, word)
      d = d * g[...] * slope
      if rules.ragged:
        d = jnp.where(word < rules.vocab, d, 0.0)
      delta[_part(rules, s), :] = d.astype(delta.dtype)
      delta_t[:, _part(rules, s)] = d.T.astype(delta.dtype)
      return 0

    jax.lax.fori_loop(0, rules.rows // rules.sub, slopes, 0)

    @pl.when(local > 0)
    def _():
      move(slot, token, False).wait()

    width, chunk = x.shape[1], rules.chunk

    def products(at, size):
      head = w[:, at].astype(rules.dtype)
      if rules.ragged:  # 0 * anything may be NaN
        row = jax.lax.broadcasted_iota(jnp.int32, head.shape, 0) + block * rules.rows
        head = jnp.where(row < rules.vocab, head.astype(jnp.float32), 0.0).astype(rules.dtype)
      d_states = dot(rules, delta_t[...], head, 1, 0)
      d_head = dot(rules, delta[...], x[:, at], 1, 0)
      # Selected, not multiplied: a fresh buffer may hold NaN.
      dx[slot, :, at] = d_states + jnp.where(local > 0, dx[slot, :, at], 0.0)
      dw_sum[:, at] = d_head + jnp.where(token > 0, dw_sum[:, at], 0.0)

    def chunks(c, _):
      products(pl.ds(pl.multiple_of(c * chunk, chunk), chunk), chunk)
      return 0

    if width >= chunk:
      jax.lax.fori_loop(0, width // chunk, chunks, 0)
    if width % chunk:
      products(pl.ds(width // chunk * chunk, width % chunk), width % chunk)

    move(slot, token, True).start()

    @pl.when(token == token_blocks - 1)
    def _():
      dw[...] = dw_sum[...].astype(dw.dtype)

    @pl.when(step == mine * token_blocks - 1)
    def _():
      move(slot, token, True).wait()

      @pl.when((step >= 1) & (token_blocks > 1))
      def _():
        move(1 - slot, token, True).wait()
