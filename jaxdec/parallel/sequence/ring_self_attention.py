# SPDX-License-Identifier: Apache-2.0
"""Ring Self-Attention (Sequence Parallelism, arXiv 2105.13120, section 3.2): a baseline.

Two rings: the keys go round until each rank holds whole rows of scores, one softmax, then the
values go round. Scores take ``B N L T`` elements on every device, which is why ring attention
superseded it. Per device, with L = T/W tokens and K key/value heads of width H, along the axis of
the sequence: forward W-1 permutes of K and W-1 of V, ``B L K H`` elements each; backward the same
number back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdec.parallel.sequence.block_attention import Rule
from jaxdec.parallel.sequence.layout import num_runs
from jaxdec.parallel.sequence.ring import Ring


def ring_self_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  ring: Ring,
  ids: jax.Array | None,
  layout: str,
  rule: Rule,
) -> jax.Array:
  """Attention by whole rows of scores, gradients by autodiff.

  Args:
    q: ``[B,L,N,H]``. k, v: ``[B,L,K,H]``, this rank's shard.
    ids: documents of all tokens, int32 ``[B,W,L]`` by rank, or None.

  Returns:
    ``[B,L,N,Hv]`` in q's dtype; scores and sums in float32 or wider.
  """
  B, L, N, H = q.shape
  wide = jnp.promote_types(q.dtype, jnp.float32)
  exact = jax.lax.Precision.HIGHEST if q.dtype.itemsize >= 4 else None
  grouped = (q * jnp.asarray(rule.scale, q.dtype)).reshape(B, L, k.shape[2], -1, H)

  def product(equation, x, y):
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=wide)

  scores = []
  for shift in range(ring.size):
    k = ring.rotate(k, 1) if shift else k
    s = product("blkgh,bmkh->bkglm", grouped, k)
    s = s if rule.logit_cap is None else rule.logit_cap * jnp.tanh(s / rule.logit_cap)
    seen = _visible(ring, shift, L, ids, layout, rule)
    scores.append(jnp.where(seen[:, None, None], s, -jnp.inf))
  scores = jnp.concatenate(scores, axis=-1)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  p = jnp.exp(scores - jnp.where(top > -jnp.inf, top, 0.0))
  mass = jnp.sum(p, axis=-1, keepdims=True)
  p = (p / jnp.where(mass > 0, mass, 1.0)).astype(v.dtype)  # a row that sees nothing gives 0

  out = 0.0
  for shift, part in enumerate(jnp.split(p, ring.size, axis=-1)):
    v = ring.rotate(v, 1) if shift else v
    out = out + product("bkglm,bmkh->blkgh", part, v)
  return out.reshape(B, L, N, -1).astype(q.dtype)


def _visible(ring: Ring, shift: int, length: int, ids, layout: str, rule: Rule) -> jax.Array:
  """Which keys of rank r - shift this rank's queries see, bool ``[B|1,L,L]``."""
  there = (ring.rank - shift) % ring.size
  behind = _places(ring.rank, ring, length, layout)[:, None]
  behind = behind - _places(there, ring, length, layout)
  seen = jnp.ones(behind.shape, bool)
  if rule.causal:
    seen = seen & (behind >= 0)
  if rule.window is not None:
    seen = seen & (behind < rule.window)
  if ids is None:
    return seen[None]
  mine, theirs = (jax.lax.dynamic_index_in_dim(ids, r, 1, False) for r in (ring.rank, there))
  return seen & (mine[:, :, None] == theirs[:, None]) & (mine >= 0)[:, :, None]


def _places(rank, ring: Ring, length: int, layout: str) -> jax.Array:
  """Where in the sequence the tokens of a rank lie."""
  runs = num_runs(layout)
  start = jnp.stack([rank] if runs == 1 else [rank, 2 * ring.size - 1 - rank])
  each = length // runs
  return (start[:, None] * each + jnp.arange(each, dtype=jnp.int32)).reshape(-1)
