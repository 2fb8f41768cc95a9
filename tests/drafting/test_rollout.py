# SPDX-License-Identifier: Apache-2.0
"""Rollout attention on several devices is that of one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.drafting.rollout import rollout_attention
from jaxdec.mixers import AttentionConfig
from jaxdec.parallel import make_mesh
from pallas_kernels.testing import COMPILE_ONCE


def _softmax_over_all(q, steps, segment_ids, cap):
  """By the definition: one softmax over step 0 up to t and the slot's own later keys."""
  b, t, n, h = q.shape
  out = np.zeros((b, t, n, h))
  for row in range(b):
    for slot in range(t):
      seen = [s for s in range(slot + 1) if segment_ids[row, s] == segment_ids[row, slot]]
      for head in range(n):
        kv = head // 2
        keys = [steps[0][0][row, s, kv] for s in seen] + [k[row, slot, kv] for k, _ in steps[1:]]
        values = [steps[0][1][row, s, kv] for s in seen] + [v[row, slot, kv] for _, v in steps[1:]]
        z = cap * np.tanh(np.asarray(keys) @ q[row, slot, head] * h**-0.5 / cap)
        p = np.exp(z - z.max())
        out[row, slot, head] = p @ np.asarray(values) / p.sum()
  return out


def test_one_softmax_on_one_device_and_on_four():
  config = AttentionConfig(4, 2, 8, logit_cap=5.0)
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  q = 2 * normal(2, 9, 4, 8)
  steps = [(normal(2, 9, 2, 8), normal(2, 9, 2, 8)) for _ in range(3)]
  segments = np.array([[1] * 9, [1] * 4 + [2] * 5], np.int32)
  expected = _softmax_over_all(q, steps, segments, 5.0)

  def run(q, steps):
    out = rollout_attention(q, steps, jnp.asarray(segments), config)
    return jnp.sum(out**2), out

  both = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True), compiler_options=COMPILE_ONCE)
  gradients, out = both(q, steps)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    split, out = both(q, steps)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split, gradients)
