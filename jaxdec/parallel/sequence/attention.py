# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over a sequence that is split over a mesh axis: one entry for every method.

All methods compute the same function and differ in what they communicate (their modules say what):

  method                 forward                              backward
  allgather              1 all-gather of K, V                 1 reduce-scatter
  ring                   W-1 permutes of K, V                 W-1 of K, V and W-1 of dK, dV
  ulysses                2 all-to-alls (Q, K, V; output)      2 all-to-alls
  usp                    2 all-to-alls + a ring of W/U        the same of both
  ring_self_attention    W-1 permutes of K, W-1 of V          W-1 + W-1 permutes

and, where documents are packed, one all-gather of their ids in the forward pass. One rank
communicates nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxdec.errors import UserError
from jaxdec.parallel.sequence.allgather import allgather_attention
from jaxdec.parallel.sequence.block_attention import Rule
from jaxdec.parallel.sequence.config import LAYOUTS, METHODS, check_choice
from jaxdec.parallel.sequence.layout import Axis, axis_size, num_runs
from jaxdec.parallel.sequence.ring import Ring, ring_attention, schedule
from jaxdec.parallel.sequence.ring_self_attention import ring_self_attention
from jaxdec.parallel.sequence.ulysses import Group, repeated_heads, ulysses_attention
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.manual import vary_alike


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  causal: bool = True,
  axis_name: Axis,
  method: str = "allgather",
  layout: str = "contiguous",
  window: int | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
  ulysses_degree: int | None = None,
) -> jax.Array:
  """``block_sparse_attention`` of a whole sequence, from one rank's shard of it.

  For use inside ``jax.shard_map``. What is communicated, in bytes per device along ``axis_name``,
  is ``communicated_bytes``.

  Args:
    q: ``[B,L,N,H]``, this rank's shard. k, v: ``[B,L,K,H]``, K a divisor of N.
    segment_ids: document of each token, int32 ``[B,L]``; negative ids see nothing and are not seen.
    causal, window, logit_cap, scale: as in ``block_sparse_attention``, over the whole sequence.
    axis_name: mesh axis (or axes) of the sequence, W ranks. For ``usp`` a pair (ring axis, Ulysses
      axis), or one axis and ``ulysses_degree``.
    method: see the module. layout: ``contiguous`` or ``zigzag``, which tokens the shard holds.
    ulysses_degree: ranks that trade heads under ``usp``, U; rank r is place r // U of the ring.

  Returns:
    ``[B,L,N,H]`` in q's dtype. A token that sees nothing gives 0.

  Raises:
    UserError: names, shapes or sizes that don't fit together.

  >>> import jax, jax.numpy as jnp
  >>> from jax.sharding import PartitionSpec as P
  >>> mesh = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
  >>> q = k = v = jnp.ones((1, 64, 4, 16))
  >>> split = P(None, "seq")
  >>> f = lambda q, k, v: attention(q, k, v, axis_name="seq", method="ring")
  >>> jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split)(q, k, v).shape
  (1, 64, 4, 16)
  """
  _check(q, k, v, segment_ids, layout)
  degree = check_method(
    method,
    axis_size(axis_name),
    q.shape[2],
    ulysses_degree=_degree(method, axis_name, ulysses_degree),
  )
  rule = Rule(causal, window, logit_cap, q.shape[-1] ** -0.5 if scale is None else scale)
  ranks = axis_size(axis_name)
  q, k, v, segment_ids = vary_alike(q, k, v, segment_ids)
  if ranks == 1:
    return block_sparse_attention(q, k, v, segment_ids=segment_ids, **rule._asdict())
  ids = None
  if segment_ids is not None:
    ids = jax.lax.all_gather(segment_ids.astype(jnp.int32), axis_name, tiled=True)
    ids = ids.reshape(ranks, *segment_ids.shape).swapaxes(0, 1)
    ids = checkpoint_name(ids, "sequence_state")
  common = {"ids": ids, "layout": layout, "rule": rule}
  if method == "allgather":
    return allgather_attention(q, k, v, axis_name=axis_name, **common)
  if method == "ring":
    return ring_attention(q, k, v, ring=Ring(axis_name, ranks), **common)
  if method == "ring_self_attention":
    return ring_self_attention(q, k, v, ring=Ring(axis_name, ranks), **common)
  if method == "usp" and not isinstance(axis_name, str):
    group, ring = Group(axis_name[1], degree), Ring(axis_name[0], ranks // degree)
  else:
    group, ring = (
      Group(axis_name, degree, ranks // degree),
      Ring(axis_name, ranks // degree, degree),
    )
  return ulysses_attention(q, k, v, group=group, ring=ring, **common)


def _degree(method: str, axis_name: Axis, ulysses_degree: int | None) -> int | None:
  if method != "usp" or isinstance(axis_name, str):
    return ulysses_degree
  if len(axis_name) != 2:
    raise UserError(
      f"attention: method='usp' takes one axis name or a pair (ring axis, Ulysses axis), got "
      f"{axis_name!r}"
    )
  return axis_size(axis_name[1])


def check_method(method: str, ranks: int, heads: int, *, ulysses_degree: int | None = None) -> int:
  """How many ranks trade heads: W for ``ulysses``, U for ``usp``, else 1; before compilation.

  Raises:
    UserError: an unknown method, or heads and ranks that don't divide.
  """
  check_choice("method", method, METHODS)
  if method == "ulysses":
    if heads % ranks:
      raise UserError(
        f"attention: method='ulysses' gives each of {ranks} ranks an equal share of the heads, and "
        f"{ranks} does not divide {heads} heads; use method='usp' with ulysses_degree a divisor of "
        "both, or method='ring' or 'allgather'"
      )
    return ranks
  if method != "usp":
    return 1
  if ulysses_degree is None:
    raise UserError(
      "attention: method='usp' needs ulysses_degree, the number of ranks that trade heads, or a "
      "pair of axis names (ring axis, Ulysses axis)"
    )
  if ulysses_degree < 1 or ranks % ulysses_degree or heads % ulysses_degree:
    raise UserError(
      f"attention: ulysses_degree={ulysses_degree} must divide the {ranks} ranks of the sequence "
      f"axis and the {heads} heads; use a common divisor"
    )
  return ulysses_degree


def _check(q, k, v, segment_ids, layout: str) -> None:
  check_choice("layout", layout, LAYOUTS)
  B, L, N, H = q.shape
  if k.shape != v.shape or k.shape[:2] != (B, L) or k.shape[3] != H or N % k.shape[2]:
    raise UserError(
      f"attention: q has shape {q.shape}, k {k.shape} and v {v.shape}; expected [B,L,N,H] and "
      "twice [B,L,K,H] with K a divisor of N"
    )
  if segment_ids is not None and segment_ids.shape != (B, L):
    raise UserError(
      f"attention: segment_ids have shape {segment_ids.shape}, expected {(B, L)}, one id a token"
    )
  if L % num_runs(layout):
    raise UserError(
      f"attention: a shard of {L} tokens cannot hold the two runs of the zigzag layout; use a "
      "sequence length that twice the size of the sequence axis divides"
    )


class Traffic(NamedTuple):
  """Bytes that one device receives."""

  forward: int
  backward: int


def communicated_bytes(
  method: str,
  *,
  ranks: int,
  batch: int,
  length: int,
  heads: int,
  kv_heads: int,
  head_dim: int,
  itemsize: int = 2,
  layout: str = "contiguous",
  causal: bool = True,
  window: int | None = None,
  ulysses_degree: int | None = None,
  documents: bool = False,
) -> Traffic:
  """Bytes that each device receives in one layer's forward and in its backward pass.

  With T = ``length``, W = ``ranks``, L = T/W, U = ``ulysses_degree``, R = W/U, K' = lcm(K, U), e =
  ``itemsize`` and w = max(e, 4), the width of sums; n <= W-1 steps of the ring besides the first:

    allgather             2 B T K H e (W-1)/W                     the same
    ring                  2 B L K H e n                           2 B L K H (e + w) n
    ulysses (U = W)       B L (2 N + 2 K') H e (U-1)/U            the same
    usp                   that, and a ring of R ranks with U L tokens and K'/U heads
    ring_self_attention   2 B L K H e (W-1)                       the same
    documents             4 B T (W-1)/W                           nothing

  Args:
    length: tokens of the whole sequence. documents: whether segment ids are given.
  """
  degree = check_method(method, ranks, heads, ulysses_degree=ulysses_degree)
  shard = length // ranks

  def ring(size, tokens, kv):
    hops = len(schedule(size, tokens, layout, Rule(causal, window, None, 1.0))) - 1
    elements = 2 * batch * tokens * kv * head_dim * hops
    return elements * itemsize, elements * (itemsize + max(itemsize, 4))

  if method == "ring":
    forward, backward = ring(ranks, shard, kv_heads)
  elif method == "allgather" or method == "ring_self_attention":
    forward = backward = 2 * batch * shard * (ranks - 1) * kv_heads * head_dim * itemsize
  else:
    kv = repeated_heads(kv_heads, degree)
    sent = batch * shard * (2 * heads + 2 * kv) * head_dim * itemsize
    sent = sent * (degree - 1) // degree
    of_ring = ring(ranks // degree, shard * degree, kv // degree)
    forward, backward = (sent + x for x in of_ring)
  ids = 4 * batch * shard * (ranks - 1) if documents else 0
  return Traffic(forward + ids, backward)
