# SPDX-License-Identifier: Apache-2.0
"""What mixers call: the plain op on one shard of sequence, the parallel one on several.

Arrays here are whole (``[B,T,...]`` as the model sees them). Where the mesh in context
(``jax.set_mesh``) has several devices, the layer runs inside ``jax.shard_map`` over the whole mesh:
batch, length and heads lie as the logical rules in context say, and every device computes on its
own block. That is also so where sequences are whole, since XLA cannot partition a Pallas kernel.
Without such a mesh, or without a ``SequenceConfig``, nothing is added to the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxdec.parallel.rules import DEFAULT, Rules
from jaxdec.parallel.sequence.config import SequenceConfig

TOKENS = ("batch", "length")


def ways(config: SequenceConfig | None) -> int:
  """Over how many devices the mesh in context splits the arrays of a layer; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if config is None or mesh.empty else mesh.size


def run(
  f: Callable[..., jax.Array],
  arrays: dict[str, Any],
  names: dict[str, tuple[str | None, ...]],
  out: tuple[Any, ...],
) -> Any:
  """``f(**arrays)`` on every device's block.

  Args:
    arrays: by keyword; those that are None stay None. names: logical axes of each.
    out: logical axes of the result; of each result where there are several.

  Raises:
    UserError: a size that the mesh does not divide, with array, dimension, size and axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  table = nn.get_logical_axis_rules()
  rules = Rules(tuple(table)) if table else DEFAULT
  present = {name: x for name, x in arrays.items() if x is not None}
  specs = {
    name: rules.spec(names[name], mesh, shape=x.shape, where=name) for name, x in present.items()
  }
  # check_vma=False: Pallas kernels carry no annotations of what varies over the mesh.
  return jax.shard_map(
    lambda present: f(**{name: present.get(name) for name in arrays}),
    mesh=mesh,
    in_specs=(specs,),
    out_specs=tuple(rules.spec(x, mesh) for x in out)
    if isinstance(out[0], tuple)
    else rules.spec(out, mesh),
    check_vma=False,
  )(present)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array | None,
  config: SequenceConfig | None,
  **options: Any,
) -> jax.Array:
  """Causal softmax attention ``[B,T,N,H]``; ``options``: window, logit_cap, scale."""
  if ways(config) == 1:
    from pallas_kernels.block_sparse_attention import block_sparse_attention

    return block_sparse_attention(q, k, v, None, segment_ids=segment_ids, **options)
  from jaxdec.parallel import sequence

  def local(q, k, v, segment_ids):
    return sequence.attention(
      q, k, v,
      segment_ids=segment_ids, axis_name=config.axis, method=config.attention,
      layout=config.layout, ulysses_degree=config.ulysses_degree, **options,
    )  # fmt: skip

  heads, kv = (*TOKENS, "heads", None), (*TOKENS, "kv_heads", None)
  arrays = {"q": q, "k": k, "v": v, "segment_ids": segment_ids}
  return run(local, arrays, {"q": heads, "k": kv, "v": kv, "segment_ids": TOKENS}, heads)


def recurrence(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  log_decay: jax.Array | None = None,
  beta: jax.Array | None = None,
  segment_ids: jax.Array | None,
  config: SequenceConfig,
  **options: Any,
) -> jax.Array:
  """A linear-attention or (with ``beta``) delta-rule layer on several shards, from an empty state.

  Args:
    q: ``[B,T,N,H]``. k, v: with K heads. log_decay: ``[B,T,K]`` or ``[B,T,K,H]``.
    beta: ``[B,T,K]``.
    options: scale, chunk_size.
  """
  from jaxdec.parallel import sequence

  def local(q, k, v, log_decay, beta, segment_ids):
    return sequence.linear_attention(
      q, k, v,
      log_decay=log_decay, beta=beta, segment_ids=segment_ids, axis_name=config.axis,
      exchange=config.linear, layout=config.layout, slices=config.slices, **options,
    )[0]  # fmt: skip

  heads, kv = (*TOKENS, "heads", None), (*TOKENS, "kv_heads", None)
  arrays = {
    "q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "segment_ids": segment_ids,
  }  # fmt: skip
  decay = kv if log_decay is not None and log_decay.ndim == 4 else kv[:3]
  names = {
    "q": heads, "k": kv, "v": kv, "log_decay": decay, "beta": kv[:3], "segment_ids": TOKENS,
  }  # fmt: skip
  return run(local, arrays, names, heads)


def short_convolution(
  x: jax.Array,
  weight: jax.Array,
  *,
  segment_ids: jax.Array | None,
  config: SequenceConfig | None,
  channels: str = "heads",
) -> jax.Array:
  """Depthwise causal convolution ``[B,T,C]`` with ``weight [w,C]``; rows before a shard come over.

  Args:
    channels: logical axis of the C channels.
  """
  from jaxdec.parallel.sequence.halo import short_convolution

  if ways(config) == 1:
    return short_convolution(x, weight, segment_ids=segment_ids, axis_name=None)

  def local(x, weight, segment_ids):
    return short_convolution(
      x, weight, segment_ids=segment_ids, axis_name=config.axis, layout=config.layout
    )

  names = {"x": (*TOKENS, channels), "weight": (None, channels), "segment_ids": TOKENS}
  return run(
    local, {"x": x, "weight": weight, "segment_ids": segment_ids}, names, (*TOKENS, channels)
  )
