# SPDX-License-Identifier: Apache-2.0
"""What a run of tokens does to a recurrent state: an affine map, and how such maps combine.

Every linear layer takes the state before a run of tokens to the state after it by ``S' = M S + U``:
U is the state after a start from zero, and M is 1 (no decay), an elementwise factor (scalar or
channel decay) or a matrix H x H (delta rules). Maps compose, the later one on the left::

  (M2, U2) after (M1, U1) = (M2 M1, M2 U1 + U2)

Documents: a run also knows the ids of its first and last token. Where two runs meet and the ids
differ, nothing passes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import repeat_heads, sum_heads

FORGET = -1e4  # the floor of a run's log-decay: exp of it is 0 in float64 too


class Summary(NamedTuple):
  """The map of a run of tokens. Axes before B, if any, are runs."""

  update: jax.Array  # U [..,B,N,H,Hv]
  log: jax.Array | None = None  # [..,B,n,h], M = exp(log): n divides N, h is H or 1
  dense: jax.Array | None = None  # M [..,B,N,H,H]
  first: jax.Array | None = None  # int32 [..,B], document of the first token
  last: jax.Array | None = None  # of the last


def cut(x: jax.Array, where: jax.Array | None) -> jax.Array:
  """Zero for the batch rows ``where [..,B]``; for None ``x`` as it is."""
  if where is None:
    return x
  return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), 0, x)


def factor(log: jax.Array, heads: int) -> jax.Array:
  """``exp(log)`` as what a state ``[..,B,N,H,Hv]`` is multiplied by."""
  return repeat_heads(jnp.exp(log), heads, axis=log.ndim - 2)[..., None]


def through(run: Summary, state: jax.Array) -> jax.Array:
  """``M S``."""
  if run.dense is not None:
    return jnp.einsum("...ij,...jv->...iv", run.dense, state, precision=lax.Precision.HIGHEST)
  return state if run.log is None else factor(run.log, state.shape[-3]) * state


def after(run: Summary, state: jax.Array) -> jax.Array:
  """``M S + U``."""
  return through(run, state) + run.update


def meet(earlier: Summary, later: Summary) -> jax.Array | None:
  """bool ``[..,B]``: a document ends where the two runs meet. None: there are no documents."""
  return None if later.first is None else earlier.last != later.first


def ending(run: Summary, here: jax.Array | None) -> Summary:
  """The run followed by the end of a document for the batch rows ``here``."""
  if here is None:
    return run
  log = run.log
  if log is not None:
    log = jnp.where(here[..., None, None], FORGET, log)
  dense = None if run.dense is None else cut(run.dense, here)
  return run._replace(update=cut(run.update, here), log=log, dense=dense)


def compose(later: Summary, earlier: Summary) -> Summary:
  """The map of both runs, one after the other."""
  before = ending(earlier, meet(earlier, later))
  log = dense = None
  if later.log is not None and before.log is not None:
    log = jnp.maximum(later.log + before.log, FORGET)
  if later.dense is not None and before.dense is not None:
    dense = through(later, before.dense)
  return Summary(after(later, before.update), log, dense, earlier.first, later.last)


def adjoint(run: Summary, cotangent: jax.Array) -> Summary:
  """The run as gradients pass it, from its last token to its first: ``E' = M^T E + dS``."""
  dense = None if run.dense is None else jnp.swapaxes(run.dense, -1, -2)
  return Summary(cotangent, run.log, dense, run.last, run.first)


def map_gradient(run: Summary, state: jax.Array, cotangent: jax.Array) -> Summary:
  """Gradient of ``M S + U`` by the map, for a state before it and the gradient after it."""
  log = dense = None
  if run.dense is not None:
    pairs = "...iv,...jv->...ij"
    dense = jnp.einsum(pairs, cotangent, state, precision=lax.Precision.HIGHEST)
  elif run.log is not None:
    terms = jnp.sum(through(run, state) * cotangent, axis=-1)  # [..,B,N,H]
    terms = sum_heads(terms, run.log.shape[-2], axis=terms.ndim - 2)
    log = terms if run.log.shape[-1] == terms.shape[-1] else jnp.sum(terms, -1, keepdims=True)
  return Summary(cotangent, log, dense)


def payload_elements(
  batch: int,
  heads: int,
  width: int,
  value_width: int,
  *,
  decay: tuple[int, ...] = (),
  dense: bool = False,
  documents: bool = False,
) -> int:
  """Numbers that describe one run of tokens on the wire: ``pack`` of a whole ``Summary``.

  ``B N H Hv`` for U, ``B n h`` for log-decays, ``B N H H`` for a matrix M and ``4 B`` for the ids
  of the first and last document. Independent of how many tokens the run has.

  Args:
    batch: B of one device. heads: N, of the state. width: H. value_width: Hv.
    decay: ``(n,)`` for n scalar decays, ``(n, H)`` for channel decays, ``()`` for none; documents
      without decay count as ``(1,)``.
    dense: a delta rule, whose decays are part of M.
    documents: segment ids were given.
  """
  if dense:
    maps = heads * width * width
  else:
    decay = decay or ((1,) if documents else ())
    maps = math.prod(decay) if decay else 0
  return batch * (heads * width * value_width + maps + (4 if documents else 0))


def pack(run: Summary) -> jax.Array:
  """One array ``[..,B,E]`` of the update's type, so that one collective carries everything.

  Ids travel as two numbers each, which every float type holds exactly.
  """
  lead = run.update.shape[:-3]
  parts = [x.reshape(*lead, -1) for x in run[:3] if x is not None]
  ids = [x for x in run[3:] if x is not None]
  halves = [part for x in ids for part in (x >> 16, x & 0xFFFF)]
  if halves:
    parts.append(jnp.stack(halves, axis=-1).astype(run.update.dtype))
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def unpack(payload: jax.Array, like: Summary) -> Summary:
  """The inverse of ``pack``: fields as in ``like``, axes before B as in the payload."""
  lead, runs = payload.shape[:-1], like.update.ndim - 3
  fields, start = [], 0
  for x in like[:3]:
    if x is None:
      fields.append(None)
      continue
    shape = x.shape[runs:]
    stop = start + math.prod(shape)
    fields.append(payload[..., start:stop].reshape(*lead, *shape))
    start = stop
  for x in like[3:]:
    if x is None:
      fields.append(None)
      continue
    high, low = (payload[..., start + i].astype(jnp.int32) for i in (0, 1))
    fields.append((high << 16) | low)
    start += 2
  return Summary(*fields)
