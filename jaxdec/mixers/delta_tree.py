# SPDX-License-Identifier: Apache-2.0
"""Draft trees through the gated delta rule, and through the short convolution before it.

Along a root-to-node path the delta rule (``pallas_kernels.delta_rule``) is linear attention to *new
values* ``u``: with s_i the log-decay summed over node i and its ancestors,

  u_i = beta_i (v_i - exp(s_i) k_i S_0 - sum_j exp(s_i - s_j) (k_i k_j) u_j),  j above i
  o_i = exp(s_i) q_i S_0 + sum_j exp(s_i - s_j) (q_i k_j) u_j,                 j = i or above

This is the chunk form of DeltaNet (arXiv 2406.06484, section 3.2) and Gated DeltaNet (arXiv
2412.06464, section 3.3) with ancestors in place of earlier tokens. No state per node is formed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdec.mixers.base import Topology
from jaxdec.mixers.linear_tree import path_products
from pallas_kernels.numerics import accumulator


def tree_delta_rule(
  q: Float[Array, "B M K H"],
  k: Float[Array, "B M K H"],
  v: Float[Array, "B M N V"],
  beta: Float[Array, "B M N"],
  log_decay: Float[Array, "B M N"] | Float[Array, "B M N H"] | None,
  state: Float[Array, "B N H V"],
  topology: Topology,
  *,
  scale: float | None = None,
) -> Float[Array, "B M N V"]:
  """Outputs of all nodes of a draft tree at once, each as if its root-to-node path ran alone.

  New values are found one depth after the other, since a node's need its ancestors' only: forward
  substitution, ``M^2 V`` operations a head and depth. Float32 (float64 if given float64).

  Args:
    q, k: head n of N uses head ``n // (N / K)``; keys have norm 1.
    scale: factor on q; None: ``H ** -0.5``.
  """
  heads, dtype, out_dtype = v.shape[2], accumulator(q), q.dtype
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  q, k = (jnp.repeat(x.astype(dtype), heads // x.shape[2], axis=2) for x in (q, k))
  v, beta, state = v.astype(dtype), beta.astype(dtype)[..., None], state.astype(dtype)
  # A bfloat16 matrix unit must not round what is substituted again and again.
  exact = jax.lax.Precision.HIGHEST
  scores, inter = path_products(
    jnp.stack([scale * q, k], axis=3), k, log_decay, state, topology.ancestors, precision=exact
  )
  read, overlap = scores[:, :, 0], scores[:, :, 1] * (1 - jnp.eye(q.shape[1], dtype=dtype))
  wanted = v - inter[..., 1, :]

  def substitute(depth, u):
    new = beta * (wanted - jnp.einsum("bnij,bjnv->binv", overlap, u, precision=exact))
    return jnp.where((topology.depth == depth)[..., None, None], new, u)

  u = jax.lax.fori_loop(0, jnp.max(topology.depth) + 1, substitute, jnp.zeros_like(v))
  out = jnp.einsum("bnij,bjnv->binv", read, u, precision=exact) + inter[..., 0, :]
  return out.astype(out_dtype)


def tree_short_convolution(
  x: Float[Array, "B M C"],
  weight: Float[Array, "w C"],
  tail: Float[Array, "B w-1 C"],
  topology: Topology,
) -> Float[Array, "B M C"]:
  """The causal depthwise convolution of every node along its path, after the rows of ``tail``.

  ``y_i = sum_o weight[w-1-o] x[the o-th ancestor of i]``, where ancestors before the root are the
  last rows of ``tail``. Sums in float32 or wider, as ``parallel.sequence.halo.short_convolution``.
  """
  w = weight.shape[0]
  rows = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
  total = jnp.promote_types(jnp.promote_types(x.dtype, weight.dtype), jnp.float32)
  y = weight[w - 1].astype(total) * x.astype(total)
  for back in range(1, w):
    depth = topology.depth - back
    above = topology.ancestors & (topology.depth[:, None] == depth[:, :, None])
    index = w - 1 + jnp.where(depth < 0, depth, jnp.argmax(above, axis=-1))
    tap = jnp.take_along_axis(rows, index[..., None], axis=1)
    y = y + weight[w - 1 - back].astype(total) * tap.astype(total)
  return y.astype(x.dtype)
