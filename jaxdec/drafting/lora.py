# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv 2106.09685) as a parameter tree that is merged into a decoder's kernels.

  W' = W + (alpha / rank) a b,     a [in, rank] drawn with variance 1 / in,  b [rank, out] zero

so that a fresh tree merges to the model it was made for, bit for bit. The tree mirrors the model's
own, in either layout: scanned layers have a leading axis here too. Nothing else in the library has
to know of it, since a merged tree is a model's parameters like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdec.errors import UserError, nearest

_KERNELS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Low-rank additions to dense layers.

  Attributes:
    rank, alpha: see above.
    layers: names of the dense layers adapted, wherever they stand in a block.
  """

  rank: int = 32
  alpha: float = 16.0
  layers: tuple[str, ...] = _KERNELS

  def __post_init__(self):
    if self.rank < 1 or not self.layers:
      raise UserError(
        f"LoRA needs a rank of at least 1 and the name of a layer, got rank={self.rank} and "
        f"layers={self.layers}"
      )

  def init(self, rng: jax.Array, params: Any) -> dict[str, Any]:
    """A fresh tree for the decoder parameters ``params``; keeps their logical axis names.

    Raises:
      UserError: a name of ``layers`` that no dense layer of the model has.
    """
    tree: dict[str, Any] = {}
    found = _dense(params)
    names = {path[-1] for path in found}
    for name in self.layers:
      if name not in names:
        raise UserError(f"the model has no dense layer {name!r}{nearest(name, names)}")
    wanted = {path: kernel for path, kernel in found.items() if path[-1] in self.layers}
    for key, (path, kernel) in zip(jax.random.split(rng, len(wanted)), sorted(wanted.items())):
      node = tree
      for name in path:
        node = node.setdefault(name, {})
      *stacked, rows, columns = nn.unbox(kernel).shape
      a = jax.random.normal(key, (*stacked, rows, self.rank)) * rows**-0.5
      node["a"], node["b"] = a, jnp.zeros((*stacked, self.rank, columns))
      if isinstance(kernel, nn.Partitioned):
        *layers, first, last = kernel.names
        node["a"] = kernel.replace(value=a, names=(*layers, first, None))
        node["b"] = kernel.replace(value=node["b"], names=(*layers, None, last))
    return tree

  def merge(self, params: Any, tree: Mapping[str, Any]) -> Any:
    """``params`` with the additions in; leaves without one are passed on as they are."""

    def one(node, added):
      if "a" in added:
        kernel = node["kernel"]
        delta = self.alpha / self.rank * (added["a"] @ added["b"])
        return {**node, "kernel": (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)}
      return {**node, **{name: one(node[name], child) for name, child in added.items()}}

    return one(params, tree)


def _dense(params: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
  """Kernels of the dense layers inside blocks, by path."""
  found = {}
  for name, node in params.items():
    if not isinstance(node, Mapping) or (not path and not name.startswith(("layers_", "stack"))):
      continue
    found |= {(*path, name): node["kernel"]} if "kernel" in node else _dense(node, (*path, name))
  return found
