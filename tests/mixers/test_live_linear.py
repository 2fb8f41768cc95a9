# SPDX-License-Identifier: Apache-2.0
"""Linear attention against flash-linear-attention's own reference, where it is installed."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_attention import linear_attention

pytestmark = pytest.mark.compare


@pytest.fixture(scope="module")
def fla():
  pytest.importorskip("torch", reason="needs the compare extra")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    module = pytest.importorskip(
      "fla.ops.simple_gla.naive", reason="needs the compare extra", exc_type=ImportError
    )
  return module.naive_recurrent_simple_gla


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("strength", [0.05, 3.0])
def test_outputs_state_and_gradients(fla, implementation, strength):
  """Both of its outputs and all five gradients, at a length that is no multiple of the chunk."""
  import torch

  b, t, n, h, v = 2, 37, 3, 8, 5
  rng = np.random.default_rng(0)
  arrays = {
    "q": rng.normal(size=(b, t, n, h)),
    "k": rng.normal(size=(b, t, n, h)),
    "v": rng.normal(size=(b, t, n, v)),
    "g": -strength * rng.uniform(size=(b, t, n)),
    "s": rng.normal(size=(b, n, h, v)),
  }
  arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
  out_weight = rng.normal(size=(b, t, n, v)).astype(np.float32)
  state_weight = rng.normal(size=(b, n, h, v)).astype(np.float32)

  theirs = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}
  out, state = fla(theirs["q"], theirs["k"], theirs["v"], theirs["g"], initial_state=theirs["s"])
  loss = (out * torch.tensor(out_weight)).sum() + (state * torch.tensor(state_weight)).sum()
  loss.backward()

  def ours(a):
    out, state = linear_attention(
      a["q"], a["k"], a["v"], log_decay=a["g"], initial_state=a["s"], chunk_size=16,
      implementation=implementation,
    )  # fmt: skip
    return jnp.sum(out * out_weight) + jnp.sum(state * state_weight), (out, state)

  gradients, (our_out, our_state) = jax.grad(ours, has_aux=True)(jax.tree.map(jnp.asarray, arrays))
  pairs = {"out": (our_out, out), "state": (our_state, state)}
  pairs |= {f"d{name}": (gradients[name], x.grad) for name, x in theirs.items()}
  for name, (mine, other) in pairs.items():
    other = other.detach().numpy()
    error = np.abs(np.asarray(mine) - other).max() / np.abs(other).max()
    assert error < 2e-5, (name, error)
