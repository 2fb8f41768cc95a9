# SPDX-License-Identifier: Apache-2.0
"""How implementations are compared: relative root mean square error against a reference.

An element may be small beside its neighbours and carry their rounding, so errors are measured in
the norm of the whole array: ``|x - y| / |y|``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# A comparison runs once, and takes far longer to compile than to run: no optimization by LLVM. What
# XLA makes of the program is not affected.
COMPILE_ONCE = {"xla_backend_optimization_level": "0"}


def relative_rms(got: Any, expected: Any) -> float:
  """``|got - expected| / |expected|`` in float64; 0 for two zero arrays; NaN where one has NaN."""
  got, expected = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (got, expected))
  if got.shape != expected.shape:
    raise AssertionError(f"shape {got.shape}, expected {expected.shape}")
  size = np.sqrt(np.sum(expected**2))
  error = np.sqrt(np.sum((got - expected) ** 2))
  return float(error) if size == 0 else float(error / size)


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
  """Every leaf within the tolerance; the message names the worst offenders."""
  got_leaves = jax.tree_util.tree_leaves_with_path(got)
  wanted = dict(jax.tree_util.tree_leaves_with_path(expected))
  assert [p for p, _ in got_leaves] == list(wanted), "different structures"
  errors = {jax.tree_util.keystr(p): relative_rms(x, wanted[p]) for p, x in got_leaves}
  wrong = {name: e for name, e in errors.items() if not e <= tolerance}
  assert not wrong, f"relative RMS error above {tolerance}: {wrong} (all: {errors})"


def value_and_gradients(
  f: Callable[..., Any], differentiable: Mapping[str, Any], seed: int = 0
) -> dict[str, Any]:
  """Outputs of ``f(**differentiable)`` and the gradients of a random weighting of all of them.

  Returns:
    ``{"out": outputs, "grad": {name: gradient}}``, one compilation.
  """

  def weighted(inputs):
    out = f(**inputs)
    leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
    total = 0.0
    for index, leaf in enumerate(leaves):
      weight = jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), leaf.shape)
      finite = jnp.where(jnp.isfinite(leaf), leaf, 0).astype(jnp.float32)  # an LSE may be -inf
      total = total + jnp.sum(finite * weight)
    return total, out

  both = jax.jit(jax.value_and_grad(weighted, has_aux=True), compiler_options=COMPILE_ONCE)
  (_, out), grads = both(dict(differentiable))
  return {"out": out, "grad": grads}
