# SPDX-License-Identifier: Apache-2.0
"""What a user would pick instead of ``pallas_kernels``, for ``kernels.py``: one function an op.

A function takes ``(spec, inputs, platform)`` and yields ``Arm``s, or a string: what is left out and
why. An arm brings its own inputs, in the layout its maker likes; making them is not timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._specs import Inputs, Spec


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to compute an op.

  Attributes:
    f: ``f(differentiable, others) -> outputs``; gradients are taken of the first argument.
    same: the first output is that of the op, and so compared with it.
    torch: ``f`` takes and returns torch tensors on the GPU.
  """

  name: str
  f: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
  differentiable: Mapping[str, Any]
  others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  same: bool = True
  torch: bool = False


def rivals(op: str, spec: Spec, inputs: Inputs, platform: str) -> Iterator[Arm | str]:
  return {
    "block_sparse_attention": block_sparse_attention,
    "linear_attention": linear_attention,
    "delta_rule": delta_rule,
    "tree_attention": tree_attention,
    "selective_scan": selective_scan,
    "linear_cross_entropy": linear_cross_entropy,
  }[op](spec, inputs, platform)


def _installed(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


def _torch_reason(platform: str, package: str) -> str | None:
  """Why torch's kernels can't run here; None where they can."""
  if platform != "gpu":
    return "its kernels need a GPU"
  for name in ("torch", package):
    if not _installed(name):
      return f"{name} is not installed"
  import torch

  return None if torch.cuda.is_available() else "torch sees no GPU"


def _to_torch(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
  import torch

  return {name: torch.from_dlpack(x).clone() for name, x in arrays.items()}


def _attention(name: str, q, k, v, implementation: str, same: bool, **options) -> Arm:
  def f(d, others):
    return jax.nn.dot_product_attention(
      d["q"], d["k"], d["v"], **others, **options, implementation=implementation
    )

  mask = {n: options.pop(n) for n in ("mask",) if n in options}
  return Arm(name, f, {"q": q, "k": k, "v": v}, mask, same)


def block_sparse_attention(spec: Spec, inputs: Inputs, platform: str) -> Iterator[Arm | str]:
  """Dense attention under the token rule alone; FlexAttention under the same block mask."""
  d, options = inputs.differentiable, {**spec.options, **inputs.static}
  q, k, v = d["q"], d["k"], d["v"]
  causal, window = options.get("causal", True), options.get("window")
  if options.get("logit_cap") is not None or "segment_ids" in inputs.others:
    yield "dense attention: jax.nn's takes no logit cap and no documents"
  else:
    name = "cudnn" if platform == "gpu" else "xla"
    local = {} if window is None else {"local_window_size": (window - 1, 0)}
    yield _attention(
      f"jax.nn, dense ({name})", q, k, v, name, False, is_causal=causal, scale=options.get("scale"),
      **local,
    )  # fmt: skip
  if not _installed("tokamax"):
    yield "tokamax: not installed"
  else:
    import tokamax

    yield Arm(
      "tokamax, dense",
      lambda d, _: tokamax.dot_product_attention(d["q"], d["k"], d["v"], is_causal=causal),
      {"q": q, "k": k, "v": v},
      same=False,
    )
  if platform != "tpu":
    yield "splash attention: needs a TPU"
  else:
    yield _splash(q, k, v, causal, window)
  if reason := _torch_reason(platform, "torch"):
    yield f"FlexAttention: {reason}"
  else:
    yield _flex(q, k, v, inputs.others["blocks"], causal, window)


def _splash(q, k, v, causal: bool, window: int | None) -> Arm:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  shape = (q.shape[1], k.shape[1])
  if window is not None:
    mask = masks.LocalMask(shape, (window - 1, 0 if causal else None), 0)
  else:
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
  heads, group = q.shape[2], q.shape[2] // k.shape[2]
  make = kernel.make_splash_mha if group == 1 else kernel.make_splash_mqa
  call = make(
    masks.MultiHeadMask([mask] * (heads if group == 1 else group)),
    head_shards=1,
    q_seq_shards=1,
  )
  # [B,T,N,H] -> [B,N,T,H], or [B,K,group,T,H] beside [B,K,T,H]
  q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
  call = jax.vmap(call)
  if group > 1:
    q, call = q.reshape(len(q), -1, group, *q.shape[2:]), jax.vmap(call)
  return Arm(
    "splash, dense", lambda d, _: call(d["q"], d["k"], d["v"]), {"q": q, "k": k, "v": v}, same=False
  )


def _flex(q, k, v, blocks, causal: bool, window: int | None) -> Arm:
  import torch
  from torch.nn.attention.flex_attention import create_block_mask, flex_attention

  dense = torch.from_dlpack(blocks.dense())
  rows, columns = blocks.block_q, blocks.block_kv

  def visible(b, h, i, j):
    # Rows of one pattern, heads h of as many as there are query heads: by index, not repeated.
    at = b * dense.shape[0] // q.shape[0], h * dense.shape[1] // q.shape[2]
    seen = dense[*at, i // rows, j // columns]
    if causal:
      seen = seen & (j <= i)
    return seen if window is None else seen & (i - j < window)

  arrays = {n: x.swapaxes(1, 2) for n, x in {"q": q, "k": k, "v": v}.items()}
  mask = create_block_mask(
    visible, q.shape[0], q.shape[2], q.shape[1], k.shape[1], BLOCK_SIZE=(rows, columns)
  )
  call = torch.compile(flex_attention)
  return Arm(
    "FlexAttention",
    lambda d, _: call(d["q"], d["k"], d["v"], block_mask=mask, enable_gqa=True),
    _to_torch(arrays),
    torch=True,
    same=False,  # heads first
  )


def _repeat(x: jax.Array, heads: int) -> jax.Array:
  return jnp.repeat(x, heads // x.shape[2], axis=2)


def _fla(spec: Spec, inputs: Inputs, platform: str, name: str, arrays, **options) -> Arm | str:
  """``fla.ops.<module>.<function>`` with equal head counts, as it wants them."""
  if reason := _torch_reason(platform, "fla"):
    return f"flash-linear-attention: {reason}"
  if "segment_ids" in inputs.others:
    return "flash-linear-attention: documents need one flattened row there"
  module, function = name.split(".")
  call = getattr(importlib.import_module(f"fla.ops.{module}"), function)
  heads = max(x.shape[2] for x in arrays.values())
  arrays = {n: _repeat(jnp.broadcast_to(x, (*inputs.differentiable["q"].shape[:2], *x.shape[2:])),
                       heads) for n, x in arrays.items()}  # fmt: skip
  tensors = _to_torch(arrays)
  return Arm(f"fla {function}", lambda d, _: call(**d, **options), tensors, torch=True)


def linear_attention(spec: Spec, inputs: Inputs, platform: str) -> Iterator[Arm | str]:
  arrays = {**inputs.differentiable, **inputs.others}
  scale = inputs.static.get("scale")
  plain = {n: arrays[n] for n in "qkv"}
  decay = arrays.get("log_decay")
  if decay is None:
    yield _fla(
      spec, inputs, platform, "linear_attn.chunk_linear_attn", plain, scale=scale, normalize=False
    )
  else:
    name = "gla.chunk_gla" if decay.ndim == 4 else "simple_gla.chunk_simple_gla"
    yield _fla(spec, inputs, platform, name, {**plain, "g": decay}, scale=scale)


def token_scan(inputs: Inputs) -> Arm:
  """Scalar-decay linear attention as a scan over tokens in products only, which a CPU does best.

  ``reference`` is the same recurrence in outer products by broadcasting; the gradients of those are
  slow reductions on a CPU.
  """

  def f(d, others):
    q, k, v, g = (jnp.moveaxis(d[n], 1, 0) for n in ("q", "k", "v", "log_decay"))
    scale = q.shape[-1] ** -0.5

    def step(s, token):
      q_t, k_t, v_t, g_t = token
      s = jnp.exp(g_t)[..., None, None] * s + jnp.einsum("bnh,bnv->bnhv", k_t, v_t)
      return s, scale * jnp.einsum("bnh,bnhv->bnv", q_t, s)

    state = jnp.zeros((*q.shape[1:], v.shape[-1]), jnp.float32)
    final, out = jax.lax.scan(step, state, (q, k, v, g))
    return jnp.moveaxis(out, 0, 1), final

  return Arm("token scan", f, inputs.differentiable, inputs.others)


def delta_rule(spec: Spec, inputs: Inputs, platform: str) -> Iterator[Arm | str]:
  arrays = {**inputs.differentiable, **inputs.others}
  plain = {n: arrays[n] for n in ("q", "k", "v", "beta")}
  decay = arrays.get("log_decay")
  if decay is None:
    yield _fla(spec, inputs, platform, "delta_rule.chunk_delta_rule", plain)
  else:
    name = "kda.chunk_kda" if decay.ndim == 4 else "gated_delta_rule.chunk_gated_delta_rule"
    yield _fla(spec, inputs, platform, name, {**plain, "g": decay})


def tree_attention(spec: Spec, inputs: Inputs, platform: str) -> Iterator[Arm | str]:
  """Attention over cache and nodes side by side, under a boolean mask."""
  d, others = inputs.differentiable, inputs.others
  if inputs.static.get("logit_cap") is not None:
    yield "masked attention: jax.nn's takes no logit cap"
    return
  if inputs.static.get("window") is not None or "prefix" in others:
    yield "masked attention: written here for neither windows nor shared prefixes"
    return
  caches = [d["k_cache"], d["v_cache"]]
  if inputs.static.get("cache_layout") == "BKSH":
    caches = [x.swapaxes(1, 2) for x in caches]
  k, v = (jnp.concatenate([x, y], 1) for x, y in zip(caches, (d["k_nodes"], d["v_nodes"])))
  slots, ancestors = caches[0].shape[1], others["ancestors"]
  live = jnp.arange(slots)[None, None] < others["length"][:, None, None]
  live = jnp.broadcast_to(live, (*ancestors.shape[:2], slots))
  mask = jnp.concatenate([live, ancestors.astype(bool)], axis=-1)[:, None]
  name = "cudnn" if platform == "gpu" else "xla"
  yield _attention(f"jax.nn, masked ({name})", d["q"], k, v, name, True, mask=mask)


def selective_scan(spec: Spec, inputs: Inputs, platform: str) -> Iterator[Arm | str]:
  """``lax.associative_scan``, the usual way in JAX: every state is in memory."""
  if "segment_ids" in inputs.others:
    yield "associative scan: written here without documents"
    return

  def f(d, others):
    a = {**d, **others}
    x, dt = a["x"].astype(jnp.float32), a["dt"].astype(jnp.float32)
    decay = jnp.exp(dt[..., None] * a["A"])  # [B,T,D,S]
    fed = (dt * x)[..., None] * a["B"][:, :, None].astype(jnp.float32)
    if a.get("initial_state") is not None:
      fed = fed.at[:, 0].add(decay[:, 0] * a["initial_state"])
    _, h = jax.lax.associative_scan(
      lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (decay, fed), axis=1
    )
    y = jnp.einsum("btds,bts->btd", h, a["C"].astype(jnp.float32))
    if a.get("D") is not None:
      y = y + a["D"] * x
    if a.get("z") is not None:
      y = y * jax.nn.silu(a["z"].astype(jnp.float32))
    return y.astype(a["x"].dtype), h[:, -1]

  yield Arm("associative scan", f, inputs.differentiable, inputs.others)


def linear_cross_entropy(spec: Spec, inputs: Inputs, platform: str) -> Iterator[Arm | str]:
  """All logits at once, in the states' dtype, as a training loop without a fused loss has them."""
  options = dict(inputs.static)
  cap, top_k = options.get("logit_cap"), options.get("top_k")

  def logits(x, w):
    z = jnp.dot(x, w.T).astype(jnp.float32)
    return z if cap is None else cap * jnp.tanh(z / cap)

  def f(d, others):
    log_q = jax.nn.log_softmax(logits(d["hidden"], d["head"]))
    if "labels" in others:
      return -jnp.take_along_axis(log_q, others["labels"][:, None], axis=-1)[:, 0]
    log_p = jax.nn.log_softmax(logits(others["teacher_hidden"], others["teacher_head"]))
    if top_k is not None:
      log_p, ids = jax.lax.top_k(log_p, top_k)
      log_q = jnp.take_along_axis(log_q, ids, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

  yield Arm("all logits", f, inputs.differentiable, inputs.others)
  if not _installed("tokamax"):
    yield "tokamax: not installed"
  elif "labels" not in inputs.others or cap is not None:
    yield "tokamax: has cross-entropy with labels, without a cap"
  else:
    import tokamax

    yield Arm(
      "tokamax",
      lambda d, others: tokamax.linear_softmax_cross_entropy_loss(
        d["hidden"], others["labels"], d["head"]
      ),
      {"hidden": inputs.differentiable["hidden"], "head": inputs.differentiable["head"].T},
      inputs.others,
      same=False,  # summed
    )
