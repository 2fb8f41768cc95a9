# SPDX-License-Identifier: Apache-2.0
"""Which mesh axis each logical axis of a parameter lies on: one value, checked before compilation.

Parameters carry the *names* of their dimensions (``nn.with_logical_partitioning``); a ``Rules``
value says where each name lives on the mesh. Changing the parallelism of a run changes the mesh or
this value, never a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdec.errors import UserError, nearest

MeshAxes = str | tuple[str, ...] | None

_DEFAULT: tuple[tuple[str, MeshAxes], ...] = (
  ("batch", ("data", "fsdp")),
  ("length", "seq"),
  ("vocab", "tensor"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
  ("layers", None),
)


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axis name -> mesh axis, tuple of mesh axes, or None (not split).

  The default keeps matrix products local: the contracted model width ``embed`` is gathered
  just in time (``fsdp``), heads, MLP width and vocabulary are split over ``tensor``, the batch over
  ``data`` and ``fsdp`` together, the tokens of a sequence over ``seq``.
  """

  table: tuple[tuple[str, MeshAxes], ...] = _DEFAULT

  def replace(self, **axes: MeshAxes) -> Rules:
    """The same rules with some logical axes moved: ``rules.replace(vocab=None)``."""
    table = dict(self.table)
    return Rules(tuple({**table, **axes}.items()))

  def mesh_axes(self, name: str | None) -> tuple[str, ...]:
    """The mesh axes of one logical axis, as a tuple; empty where the axis is not split."""
    if name is None:
      return ()
    table = dict(self.table)
    if name not in table:
      raise UserError(
        f"no rule for the logical axis {name!r}{nearest(name, table)}; known: {', '.join(table)}"
      )
    axes = table[name]
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

  def spec(
    self,
    names: tuple[str | None, ...],
    mesh: Mesh,
    *,
    shape: tuple[int, ...] | None = None,
    where: str = "array",
  ) -> PartitionSpec:
    """The partition of an array whose dimensions bear ``names``.

    Mesh axes of size 1 are left out. ``shape`` given: sizes are checked too.

    Raises:
      UserError: two dimensions on one mesh axis, or a size its mesh axes do not divide.
    """
    if shape is not None and len(names) != len(shape):
      raise UserError(f"{where}: shape {shape} has {len(shape)} dimensions, its axis names {names}")
    taken: dict[str, str] = {}
    parts = []
    for dim, name in enumerate(names):
      axes = self.mesh_axes(name)
      for axis in axes:
        if axis not in mesh.shape:
          raise UserError(
            f"the rule for {name!r} names the mesh axis {axis!r}{nearest(axis, mesh.shape)}; "
            f"the mesh has {', '.join(mesh.shape)}"
          )
      axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
      for axis in axes:
        if axis in taken:
          raise UserError(
            f"{where}: dimensions {taken[axis]!r} and {name!r} both lie on the mesh axis {axis!r}; "
            "an array can use a mesh axis once, so change the rule of one of them"
          )
        taken[axis] = name
      ways = math.prod(mesh.shape[axis] for axis in axes)
      if shape is not None and shape[dim] % ways:
        raise UserError(
          f"{where}: dimension {dim} ({name!r}) has size {shape[dim]}, which the mesh axis "
          f"{'*'.join(axes)} of size {ways} does not divide; choose another mesh or rule"
        )
      parts.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    while parts and parts[-1] is None:
      parts.pop()
    return PartitionSpec(*parts)

  def flax(self) -> tuple[tuple[str, MeshAxes], ...]:
    """The rules as ``nn.logical_axis_rules`` takes them."""
    return self.table


DEFAULT = Rules()


def is_boxed(leaf: Any) -> bool:
  """Whether a leaf carries logical axis names."""
  return isinstance(leaf, nn.LogicallyPartitioned)


def path_name(path: tuple[Any, ...]) -> str:
  """``layers_0/mixer/q/kernel`` for a key path of ``jax.tree_util``."""
  return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
  """One ``NamedSharding`` per leaf of a boxed (abstract) parameter tree, unboxed structure.

  Leaves without axis names are replicated.

  Args:
    tree: parameters or ``jax.eval_shape`` of their initialisation, boxed by
      ``nn.with_logical_partitioning``.

  Raises:
    UserError: naming the parameter, dimension, size and mesh axis.
  """

  def one(path, leaf):
    if not is_boxed(leaf):
      return NamedSharding(mesh, PartitionSpec())
    value = leaf.value
    spec = rules.spec(leaf.names, mesh, shape=tuple(value.shape), where=path_name(path))
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_boxed)


def place(tree: Any, rules: Rules, mesh: Mesh) -> Any:
  """The tree's arrays, unboxed, on the mesh; those that lie on it already stay as they are."""

  def put(leaf, sharding):
    if not is_boxed(leaf):
      placed = getattr(leaf, "sharding", None)
      if isinstance(placed, NamedSharding) and placed.mesh == mesh:
        return leaf
      return jax.device_put(leaf, sharding)
    return jax.device_put(leaf.value, sharding)

  return jax.tree.map(put, tree, shardings(tree, rules, mesh), is_leaf=is_boxed)


def like_parameters(tree: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
  """Shardings for a tree that mirrors parameters (an optimizer state).

  A leaf whose key path *ends* in a parameter's whole path and that has the parameter's shape is
  split like it; everything else (counters, schedules) is replicated.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  split = jax.tree.leaves(param_shardings)
  known = {tuple(map(str, path)): (leaf.shape, s) for (path, leaf), s in zip(flat, split)}
  replicated = NamedSharding(mesh, PartitionSpec())

  def one(path, leaf):
    keys = tuple(map(str, path))
    for start in range(len(keys)):
      found = known.get(keys[start:])
      if found is not None and found[0] == leaf.shape:
        return found[1]
    return replicated

  return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT, *, rank: int = 2) -> NamedSharding:
  """Split of a batch array: ``[B, T, ...]`` over the mesh axes of ``batch`` and ``length``."""
  return NamedSharding(mesh, rules.spec(("batch", "length")[:rank], mesh))


def batch_ways(mesh: Mesh, rules: Rules = DEFAULT) -> int:
  """Into how many shards a batch is split."""
  return math.prod(mesh.shape[axis] for axis in rules.mesh_axes("batch"))


def length_ways(mesh: Mesh, rules: Rules = DEFAULT) -> int:
  """Into how many shards a sequence is split."""
  return math.prod(mesh.shape[axis] for axis in rules.mesh_axes("length"))


def check_batch(batch: Mapping[str, Any], mesh: Mesh, rules: Rules = DEFAULT, *, split: int = 1):
  """Raise ``UserError`` unless every array divides over the mesh.

  Args:
    batch: global arrays or shapes ``[B, T, ...]``.
    split: gradient accumulation steps, which divide the rows too.
  """
  ways, length = batch_ways(mesh, rules), length_ways(mesh, rules)
  for name, value in batch.items():
    size = value.shape[0]
    if size % (ways * split):
      axes = "*".join(rules.mesh_axes("batch"))
      steps = f" in {split} accumulation steps" if split > 1 else ""
      raise UserError(
        f"batch array {name!r} has {size} rows, which the mesh axis {axes} of size {ways}{steps} "
        f"does not divide; use a multiple of {ways * split} rows"
      )
    if len(value.shape) > 1 and value.shape[1] % length:
      axes = "*".join(rules.mesh_axes("length"))
      raise UserError(
        f"batch array {name!r} has sequences of {value.shape[1]} tokens, which the mesh axis "
        f"{axes} of size {length} does not divide; use a multiple of {length} tokens"
      )
