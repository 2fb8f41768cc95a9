# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet against the layer of Qwen3-Next in the installed transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.mixers import GatedDeltaConfig, build_mixer

WHY = "live parity needs the `compare` extra (torch, transformers)"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)

pytestmark = pytest.mark.compare

K, N, H, V, DIM, WIDTH = 2, 4, 8, 6, 16, 4


def theirs(monkeypatch):
  from transformers.models.qwen3_next import Qwen3NextConfig, modeling_qwen3_next

  # The plain PyTorch of the rule: where flash-linear-attention is installed its kernels would be
  # taken, which need a GPU.
  rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
  plain = getattr(rule, "__wrapped__", rule)
  monkeypatch.setattr(modeling_qwen3_next, "torch_chunk_gated_delta_rule", plain)
  torch.manual_seed(0)
  config = Qwen3NextConfig(
    hidden_size=DIM, num_hidden_layers=1, layer_types=["linear_attention"],
    linear_num_key_heads=K, linear_num_value_heads=N, linear_key_head_dim=H,
    linear_value_head_dim=V, linear_conv_kernel_dim=WIDTH,
  )  # fmt: skip
  layer = modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0).eval()
  with torch.no_grad():
    layer.norm.weight.add_(0.3 * torch.randn(V))
    layer.dt_bias.add_(torch.randn(N))
  return layer


def convert(state: dict[str, np.ndarray]) -> dict:
  """Their parameters as ours: q, k, v and z of a key head lie together, a and b too."""
  group = N // K

  def split(name, sizes):
    x = state[name].reshape(K, -1, DIM)
    return [p.reshape(-1, DIM) for p in np.split(x, np.cumsum(sizes)[:-1], axis=1)]

  def by_head(q, k, v):  # [channels, ...] of each -> channels by key head
    parts = [x.reshape(K, -1, *x.shape[1:]) for x in (q, k, v)]
    return np.concatenate(parts, axis=1).reshape(-1, *q.shape[1:])

  q, k, v, z = split("in_proj_qkvz.weight", [H, H, group * V, group * V])
  b, a = split("in_proj_ba.weight", [group, group])
  taps = np.split(state["conv1d.weight"][:, 0], [K * H, 2 * K * H])
  dense = {"qkv": by_head(q, k, v), "z": z, "b": b, "a": a, "o": state["out_proj.weight"]}
  return {
    **{name: {"kernel": w.T} for name, w in dense.items()},
    "taps": by_head(*taps).T,
    "A_log": state["A_log"],
    "dt_bias": state["dt_bias"],
    "o_norm": {"scale": state["norm.weight"]},
  }


def test_layer_of_qwen3_next(monkeypatch):
  layer = theirs(monkeypatch)
  params = convert({name: x.detach().numpy() for name, x in layer.state_dict().items()})
  x = np.random.default_rng(1).normal(size=(2, 37, DIM)).astype(np.float32)
  with torch.no_grad():
    expected = layer(torch.from_numpy(x)).numpy()
  config = GatedDeltaConfig(num_heads=K, num_v_heads=N, head_dim=H, value_dim=V, conv_width=WIDTH)
  mixer = build_mixer(config, DIM)
  ours = jax.tree.map(jnp.asarray, {"params": params})
  positions = jnp.broadcast_to(jnp.arange(37), (2, 37))
  got = jax.jit(mixer.apply)(ours, x, positions)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
