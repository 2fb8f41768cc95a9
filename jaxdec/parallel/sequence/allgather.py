# SPDX-License-Identifier: Apache-2.0
"""All-gather of keys and values, then local attention (LASP-2H, arXiv 2502.07563, section 3.5).

Per device, with L = T/W tokens and K key/value heads of width H, along the axis of the sequence:
forward one all-gather of [K|V], ``2 B T K H (W-1)/W`` elements received; backward one
reduce-scatter of [dK|dV] of the same size (the transpose of the all-gather; it sums in the dtype of
K). Heads are not replicated for grouped queries. Keys and values of the whole sequence lie on every
device meanwhile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxdec.parallel.sequence import block_attention as block
from jaxdec.parallel.sequence.layout import Axis, axis_size, blocks_of, run_blocks
from pallas_kernels.block_sparse_attention import block_sparse_attention


def allgather_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  axis_name: Axis,
  ids: jax.Array | None,
  layout: str,
  rule: block.Rule,
) -> jax.Array:
  """Attention of this rank's queries to the gathered keys.

  The gathered blocks are rolled until the block of the queries is the last: the op's causal rule
  and its window, which align the last query with the last key, then hold as they are. The blocks of
  the future come first and bear a negative id, so that their tiles are never visited.

  Args:
    q: ``[B,L,N,H]``. k, v: ``[B,L,K,H]``, this rank's shard.
    ids: documents of all tokens, int32 ``[B,W,L]`` by rank, or None.

  Returns:
    ``[B,L,N,Hv]`` in q's dtype.
  """
  ranks = axis_size(axis_name)
  held = blocks_of(ranks, layout)
  runs, count = len(held[0]), ranks * len(held[0])
  batch, each = q.shape[0], q.shape[1] // runs
  kv = block.pack(k, v)
  gathered = checkpoint_name(_gathered(kv, axis_name), "sequence_kv")
  kv = _blocks(gathered.reshape(ranks, *kv.shape), runs)
  ids = jnp.zeros((1, count, each), jnp.int32) if ids is None else ids.reshape(batch, count, each)
  place = np.argsort(np.array(held).reshape(-1))  # where each block lies in what was gathered

  outs = []
  for run, number in enumerate(run_blocks(axis_name, layout)):
    order = (number + 1 + jnp.arange(count)) % count  # the block of the queries comes last
    where = jnp.asarray(place)[order]
    keys, values = block.unpack(_sequence(_taken(kv, where)), k.shape[-1])
    kv_ids, past = ids[:, where], (order <= number)[:, None]
    queries = q[:, run * each : (run + 1) * each]
    attend = functools.partial(_attend, queries, keys, values, kv_ids)
    if rule.causal or rule.window is None:
      out, _ = attend(past if rule.causal else True, rule)
    else:  # a window bounds the past only
      parts = attend(past, rule), attend(~past, rule._replace(window=None))
      out = block.merge(*parts)[0].astype(q.dtype)
    outs.append(out)
  return jnp.concatenate(outs, axis=1)


def _attend(q, keys, values, ids: jax.Array, seen: jax.Array | bool, rule: block.Rule):
  """Over the blocks that are ``seen [blocks,1]``; in ``ids [B,blocks,l]`` the queries' are last."""
  kv_ids = jnp.where(seen, ids, -1).reshape(ids.shape[0], -1)
  return block_sparse_attention(
    q, keys, values, segment_ids=(ids[:, -1], kv_ids), return_lse=True, **rule._asdict()
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, axis_name: Axis) -> jax.Array:
  """``[W*n,...]`` of all ranks' ``[n,...]``."""
  return jax.lax.all_gather(x, axis_name, tiled=True)


def _scattered(axis_name: Axis, _: None, g: jax.Array) -> tuple[jax.Array]:
  # Tiled and fenced: where the sum is cut up further, or lies by ranks in an axis of its own, TPU
  # compilers make an all-reduce of it, which sends twice the bytes.
  g = jax.lax.psum_scatter(jax.lax.optimization_barrier(g), axis_name, tiled=True)
  return (jax.lax.optimization_barrier(g),)


_gathered.defvjp(lambda x, axis_name: (_gathered(x, axis_name), None), _scattered)


def _blocks(x: jax.Array, runs: int) -> jax.Array:
  """``[W,...,L,K,H]`` as ``[W*runs,...,L/runs,K,H]``."""
  x = x.reshape(*x.shape[:-3], runs, x.shape[-3] // runs, *x.shape[-2:])
  x = jnp.moveaxis(x, -4, 1)
  return x.reshape(-1, *x.shape[2:])


def _sequence(x: jax.Array) -> jax.Array:
  """``[blocks,...,l,K,H]`` as ``[...,blocks*l,K,H]``."""
  x = jnp.moveaxis(x, 0, -4)
  return x.reshape(*x.shape[:-4], -1, *x.shape[-2:])


@jax.custom_vjp
def _taken(x: jax.Array, permutation: jax.Array) -> jax.Array:
  """``x[permutation]``; backward a permutation too, where autodiff would scatter."""
  return x[permutation]


_taken.defvjp(
  lambda x, permutation: (x[permutation], permutation),
  lambda permutation, g: (g[jnp.argsort(permutation)], None),
)
