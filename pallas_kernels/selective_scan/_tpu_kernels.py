# SPDX-License-Identifier: Apache-2.0
"""Kernel bodies of the selective scan: states ``[S, channels]``, channels along lanes.

Tokens go in groups of 8, the sublanes of a register. A token's B and C are a column of the block
``rows`` (B^T over C^T over what a segment start keeps), rotated so that a group's columns are the
first 8. A sum over states leaves 8 sublanes a token; ``merge`` finishes the 8 tokens of a group
together, in 7 rotations where one by one would take 24.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

GROUP = 8
_LN2 = math.log(2)


def merge(parts):
  """Eight ``[8,L]`` to one: row j is the sum of the rows of ``parts[j]``."""
  row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
  for shift in (1, 2, 4):
    low = (row & shift) == 0
    # Rows without the bit keep the first of a pair, those with it the second; what a rotation
    # brings to a row is always a row of the other kind, that is the other half of its own sum.
    parts = [
      jnp.where(low, p, q) + pltpu.roll(jnp.where(low, q, p), shift, axis=0)
      for p, q in zip(parts[::2], parts[1::2])
    ]
  return parts[0]


def eight(x):
  """``[S,L]``, S a multiple of 8, summed to ``[8,L]``."""
  return sum(x[i : i + 8] for i in range(0, x.shape[0], 8))


def _lanes(x):
  """``[S,L]`` summed to ``[S,1]``, over whole registers first."""
  return jnp.sum(sum(x[:, i : i + 128] for i in range(0, x.shape[1], 128)), 1, keepdims=True)


def _columns(rows_ref, group, states):
  """B, C and keep of a group's tokens: token j's are the columns j of these ``[S,lanes]``."""
  rows = rows_ref[0]
  rows = pltpu.roll(rows, jax.lax.rem(rows.shape[1] - GROUP * group, rows.shape[1]), axis=1)
  return [rows[i : i + states] for i in range(0, rows.shape[0], states)]


def _slab(group):
  return pl.ds(pl.multiple_of(GROUP * group, GROUP), GROUP)


def forward(*refs, gated: bool, skipped: bool, keeps: bool):
  """One chunk of one channel tile; ``h_ref`` carries the state from chunk to chunk."""
  refs = list(refs)
  x_ref, dt_ref, rows_ref, A_ref, h0_ref = (refs.pop(0) for _ in range(5))
  D_ref = refs.pop(0) if skipped else None
  z_ref = refs.pop(0) if gated else None
  out_ref, state_ref = refs.pop(0), refs.pop(0)
  begin_ref = refs.pop(0) if keeps else None
  h_ref, dt_f32, u_f32, y_f32 = refs
  states = A_ref.shape[0]

  @pl.when(pl.program_id(2) == 0)
  def _():
    h_ref[...] = h0_ref[0]

  if keeps:
    begin_ref[0, 0] = h_ref[...]
  dt_f32[...] = dt_ref[0].astype(jnp.float32)
  u_f32[...] = dt_f32[...] * x_ref[0].astype(jnp.float32)
  A = A_ref[...]

  def group(i, h):
    B, C, *keep = _columns(rows_ref, i, states)
    dt, u, parts = dt_f32[_slab(i), :], u_f32[_slab(i), :], []
    for j in range(GROUP):
      if keep:
        h = h * keep[0][:, j : j + 1]
      h = jnp.exp2(dt[j : j + 1] * A) * h + u[j : j + 1] * B[:, j : j + 1]
      parts.append(eight(h * C[:, j : j + 1]))
    y_f32[_slab(i), :] = merge(parts)
    return h

  h_ref[...] = jax.lax.fori_loop(0, dt_f32.shape[0] // GROUP, group, h_ref[...])
  y = y_f32[...]
  if skipped:
    y = y + D_ref[...] * x_ref[0].astype(jnp.float32)
  if gated:
    z = z_ref[0].astype(jnp.float32)
    y = y * (z * jax.nn.sigmoid(z))
  out_ref[0] = y.astype(out_ref.dtype)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    state_ref[0] = h_ref[...]


def backward(*refs, gated: bool, skipped: bool):
  """One chunk, the last one first: recomputes its states, then goes through its tokens backwards.

  With ``g_t = C_t dy_t + a_{t+1} g_{t+1}`` and ``w_t = g_t a_t h_{t-1}``: ``dA = sum_t dt w``,
  ``d(dt) = sum_s w A + x s``, ``dx = dt s``, ``s = sum_s g B``, ``dB = sum_d g u``,
  ``dC = sum_d dy h``, ``u = dt x``.
  """
  refs = list(refs)
  x_ref, dt_ref, rows_ref, A_ref, begin_ref, d_state_ref, d_out_ref = (
    refs.pop(0) for _ in range(7)
  )
  D_ref = refs.pop(0) if skipped else None
  z_ref = refs.pop(0) if gated else None
  d_x_ref, d_dt_ref, d_rows_ref, d_A_ref, d_h0_ref = (refs.pop(0) for _ in range(5))
  d_D_ref = refs.pop(0) if skipped else None
  d_z_ref = refs.pop(0) if gated else None
  e_ref, dt_f32, u_f32, dy_f32, y_f32, s_f32, h_all = refs
  states, groups = A_ref.shape[0], dt_f32.shape[0] // GROUP
  A = A_ref[...]

  @pl.when(pl.program_id(2) == 0)
  def _():
    e_ref[...] = d_state_ref[0]
    d_A_ref[0] = jnp.zeros_like(d_A_ref[0])
    if skipped:
      d_D_ref[0] = jnp.zeros_like(d_D_ref[0])

  x = x_ref[0].astype(jnp.float32)
  d_out = d_out_ref[0].astype(jnp.float32)
  dt_f32[...] = dt_ref[0].astype(jnp.float32)
  u_f32[...] = dt_f32[...] * x
  if gated:
    z = z_ref[0].astype(jnp.float32)
    dy_f32[...] = d_out * (z * jax.nn.sigmoid(z))
  else:
    dy_f32[...] = d_out

  def again(i, h):
    B, C, *keep = _columns(rows_ref, i, states)
    dt, u, parts = dt_f32[_slab(i), :], u_f32[_slab(i), :], []
    for j in range(GROUP):
      if keep:
        h = h * keep[0][:, j : j + 1]
      h_all[GROUP * i + j] = h  # the state before the token
      h = jnp.exp2(dt[j : j + 1] * A) * h + u[j : j + 1] * B[:, j : j + 1]
      if gated:
        parts.append(eight(h * C[:, j : j + 1]))
    if gated:
      y_f32[_slab(i), :] = merge(parts)
    return h

  jax.lax.fori_loop(0, groups, again, begin_ref[0, 0])
  lane = jax.lax.broadcasted_iota(jnp.int32, d_rows_ref.shape[2:], 1)

  def group(i, carry):
    e, d_A, d_rows = carry  # e = a_{t+1} g_{t+1}
    i = groups - 1 - i
    B, C, *keep = _columns(rows_ref, i, states)
    dt, u, dy = dt_f32[_slab(i), :], u_f32[_slab(i), :], dy_f32[_slab(i), :]
    s_parts, w_parts = [None] * GROUP, [None] * GROUP
    for j in reversed(range(GROUP)):
      now = slice(j, j + 1)
      before = h_all[GROUP * i + j]
      a = jnp.exp2(dt[now] * A)
      decayed = a * before
      g = e + dy[now] * C[:, now]
      w = g * decayed
      d_B = _lanes(g * u[now])
      d_C = _lanes(dy[now] * (decayed + u[now] * B[:, now]))
      d_rows = jnp.where(lane == GROUP * i + j, jnp.concatenate([d_B, d_C], axis=0), d_rows)
      d_A = d_A + w * dt[now]
      s_parts[j], w_parts[j] = eight(g * B[:, now]), eight(w * A)
      e = g * a
      if keep:
        e = e * keep[0][:, now]
    s_f32[_slab(i), :] = merge(s_parts)
    u_f32[_slab(i), :] = merge(w_parts) * _LN2  # A is in base 2; u is not needed any more
    return e, d_A, d_rows

  carry = (e_ref[...], jnp.zeros_like(A), jnp.zeros(d_rows_ref.shape[2:], jnp.float32))
  e, d_A, d_rows = jax.lax.fori_loop(0, groups, group, carry)
  e_ref[...] = e
  d_A_ref[0] += d_A
  d_rows_ref[0, 0] = d_rows
  s, d_x = s_f32[...], dt_f32[...] * s_f32[...]
  d_dt_ref[0] = (u_f32[...] + x * s).astype(d_dt_ref.dtype)
  y = y_f32[...] if gated else None
  if skipped:
    d_x = d_x + D_ref[...] * dy_f32[...]
    d_D_ref[0] += jnp.sum(dy_f32[...] * x, 0, keepdims=True)
    y = y + D_ref[...] * x if gated else None
  d_x_ref[0] = d_x.astype(d_x_ref.dtype)
  if gated:
    sigmoid = jax.nn.sigmoid(z)
    d_z_ref[0] = (d_out * y * (sigmoid * (1 + z * (1 - sigmoid)))).astype(d_z_ref.dtype)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    d_h0_ref[0] = e
