# SPDX-License-Identifier: Apache-2.0
"""Attention in the rollout of a drafter that is fed its own outputs ("training-time test").

At step j of slot t a query sees the keys of step 0, which are those of true features, up to slot t,
and of steps 1..j only those of slot t itself: what a draft sees at inference (EAGLE-3, arXiv
2503.01840).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdec.mixers import AttentionConfig
from jaxdec.parallel.sequence import sharded
from pallas_kernels.block_sparse_attention import block_sparse_attention

KeysValues = tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]


def rollout_attention(
  q: Float[Array, "B T N H"],
  steps: Sequence[KeysValues],
  segment_ids: Int[Array, "B T"],
  config: AttentionConfig,
) -> Float[Array, "B T N H"]:
  """Attention of a rollout's last step; never windowed.

  ``steps``: keys and values of every step so far, step 0 first, the query's own last.
  """
  context, own = steps[0], steps[1:]
  out, lse = causal_attention(q, *context, segment_ids, config)
  return with_own_slots(out, lse, q, own, config)


def causal_attention(q, k, v, segment_ids, config: AttentionConfig):
  """Attention over the true slots and the log-sum-exp of its logits, ``[B,T,N,H]``, ``[B,N,T]``."""

  def local(q, k, v, segment_ids):
    return block_sparse_attention(
      q, k, v,
      segment_ids=segment_ids, logit_cap=config.logit_cap, scale=config.scale, return_lse=True,
    )  # fmt: skip

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(q, k, v, segment_ids)
  # XLA can't partition a kernel: each device takes its rows and heads.
  heads, kv = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
  names = {"q": heads, "k": kv, "v": kv, "segment_ids": ("batch", None)}
  arrays = {"q": q, "k": k, "v": v, "segment_ids": segment_ids}
  return sharded.run(local, arrays, names, (heads, ("batch", "heads", None)))


def with_own_slots(out, lse, q, own, config: AttentionConfig) -> Float[Array, "B T N H"]:
  """One softmax over the true slots and the drafted keys of a query's own slot.

  With ``out_0`` and log-sum-exp ``l`` of the true slots and ``s_i = q_t . k_t^(i)``, the weights
  of ``out_0`` and the ``v_t^(i)`` are ``softmax([l, s_1, ..])``: no logits of ``[T,T]`` are held.
  """
  if not own:
    return out
  b, t, n, h = q.shape
  groups = n // own[0][0].shape[2]
  keys, values = (jnp.stack(x, axis=3) for x in zip(*own))  # [B,T,K,J,H]
  folded = q.reshape(b, t, -1, groups, h)
  scale = config.scale if config.scale is not None else h**-0.5
  logits = scale * jnp.einsum(
    "btkgh,btkjh->btkgj", folded, keys, preferred_element_type=jnp.float32
  )
  if config.logit_cap is not None:
    logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
  first = lse.swapaxes(1, 2).reshape(b, t, -1, groups, 1)
  weights = jax.nn.softmax(jnp.concatenate([first, logits], axis=-1), axis=-1)
  drafted = jnp.einsum(
    "btkgj,btkjh->btkgh", weights[..., 1:], values, preferred_element_type=jnp.float32
  )
  return (weights[..., :1] * out.reshape(folded.shape) + drafted).reshape(b, t, n, h)
