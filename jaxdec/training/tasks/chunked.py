# SPDX-License-Identifier: Apache-2.0
"""The head of a language model a piece of tokens at a time: no array of ``[B, T, V]``.

Logits of a million tokens over Llama 3's vocabulary are 513 GB in float32. Here the logits of
``chunk`` tokens are formed, reduced to a few numbers a token, and formed again for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdec.models import Decoder
from jaxdec.parallel.rules import DEFAULT, Rules


def by_chunks(
  f: Callable[[jax.Array, jax.Array], Any],
  model: Decoder,
  params: Any,
  hidden: jax.Array,
  labels: jax.Array,
  chunk: int,
) -> Any:
  """``f(logits, labels)`` of all tokens, from the logits of ``chunk`` tokens of a row at a time.

  On a mesh every device does its own tokens with the whole head, which is gathered once; the
  devices among which the vocabulary is split deal the tokens out instead. The gradient of the head
  is summed in its own dtype over a device's tokens and then, once, over the devices.

  Args:
    f: ``[B,c,V]`` logits and ``[B,c]`` labels to arrays ``[B,c]``.
    hidden: ``[B,T,D]``. labels: ``[B,T]``. params: of the whole model.
    chunk: c; a last piece that is shorter is filled up.

  Returns:
    What ``f`` returns, ``[B,T]`` each.
  """
  head = {name: params[name] for name in ("embed", "head") if name in params}

  @jax.checkpoint
  def piece(head, hidden, labels):
    return f(model.apply({"params": head}, hidden, method="unembed"), labels)

  def local(head, hidden, labels):
    length = labels.shape[1]
    size = min(chunk, length)
    count = -(-length // size)

    def cut(x):
      x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
      return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
      return x.swapaxes(0, 1).reshape(x.shape[1], count * size)[:, :length]

    return jax.tree.map(join, jax.lax.map(lambda x: piece(head, *x), (cut(hidden), cut(labels))))

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(head, hidden, labels)
  tokens = _tokens(mesh, labels.shape)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(PartitionSpec(), tokens, tokens),
    out_specs=tokens,
    check_vma=False,
  )(head, hidden, labels)


def _tokens(mesh: Any, shape: tuple[int, int]) -> PartitionSpec:
  """Where tokens lie, with the axes of the vocabulary added to the length where they divide it."""
  table = nn.get_logical_axis_rules()
  rules = Rules(tuple(table)) if table else DEFAULT
  batch, length = (*rules.spec(("batch", "length"), mesh, shape=shape), None, None)[:2]
  length = () if length is None else (length,) if isinstance(length, str) else tuple(length)
  used = {*length, *((batch,) if isinstance(batch, str) else batch or ())}
  more = [a for a in rules.mesh_axes("vocab") if mesh.shape[a] > 1 and a not in used]
  ways = 1
  for axis in (*length, *more):
    ways *= mesh.shape[axis]
  if shape[1] % ways == 0:
    length = (*length, *more)
  return PartitionSpec(batch, length or None)
