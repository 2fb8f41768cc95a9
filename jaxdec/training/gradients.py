# SPDX-License-Identifier: Apache-2.0
"""Gradients of a batch, whole or slice by slice, in the type that sums and updates are kept in.

Three types describe a run's precision (Mixed Precision Training, arXiv 1710.03740):

* ``param_dtype`` of the model: the parameters that updates are added to. Updates are some 1e-3 of a
  parameter and smaller, and bfloat16 (8 bits) rounds them away, hence float32 by default.
* ``dtype`` of the model: activations and matrix products. Their gradients come in it too, and so
  do sums over devices, which the compiler takes of the products' results.
* ``grad_dtype`` of the trainer: what comes after. Sums over the slices of ``accumulate``, clipping,
  and the optimizer's moments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def as_gradients(tree: Any, grad_dtype: str) -> Any:
  """Leaves in ``grad_dtype``; under ``float32``, leaves of more than 32 bits stay what they are."""

  def cast(x):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x.astype(wide if grad_dtype == "float32" else grad_dtype)

  return jax.tree.map(cast, tree)


def loss_and_gradients(
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  params: Any,
  frozen: Any,
  batch: Any,
  key: jax.Array,
  *,
  slices: int = 1,
  grad_dtype: str = "float32",
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Loss, metrics and gradients of a batch.

  In ``slices``, they are ``sum_i w_i x_i / sum_i w_i``, w the slice's metric ``weight`` (1 where it
  has none): the mean over all items, as of the whole batch.

  Args:
    loss: ``Task.loss``. batch: leaves ``[B, ...]``, ``slices`` divides B.
  """
  grad = jax.value_and_grad(loss, has_aux=True)
  if slices == 1:
    (value, metrics), gradients = grad(params, frozen, batch, key)
    return value, metrics, as_gradients(gradients, grad_dtype)

  # Strided slices keep every slice spread over all batch shards.
  batch = jax.tree.map(
    lambda x: x.reshape(x.shape[0] // slices, slices, *x.shape[1:]).swapaxes(0, 1), batch
  )

  def body(total, item):
    index, part = item
    (value, metrics), gradients = grad(params, frozen, part, jax.random.fold_in(key, index))
    weight = metrics.pop("weight", jnp.ones((), jnp.float32))
    found = (value, metrics, as_gradients(gradients, grad_dtype))
    new = (weight, jax.tree.map(lambda x: (x * weight).astype(x.dtype), found))
    return jax.tree.map(jnp.add, total, new), None

  first = jax.tree.map(lambda x: x[0], batch)
  (value, metrics), gradients = jax.eval_shape(grad, params, frozen, first, key)
  weighted = metrics.pop("weight", None) is not None
  gradients = jax.eval_shape(functools.partial(as_gradients, grad_dtype=grad_dtype), gradients)
  zero = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    (jax.ShapeDtypeStruct((), jnp.float32), (value, metrics, gradients)),
  )
  (weight, sums), _ = jax.lax.scan(body, zero, (jnp.arange(slices), batch))
  divisor = jnp.maximum(weight, 1e-9)
  value, metrics, gradients = jax.tree.map(lambda x: (x / divisor).astype(x.dtype), sums)
  return value, {**metrics, "weight": weight} if weighted else metrics, gradients
