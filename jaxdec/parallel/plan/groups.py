# SPDX-License-Identifier: Apache-2.0
"""Which devices take part in a collective, and along which mesh axes they differ."""

from __future__ import annotations

import re

import numpy as np
from jax.sharding import Mesh

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
  r"mesh\[([^\]]*)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
  """``[groups, W]`` device numbers, from any of the forms that XLA prints."""
  start = attributes.find("replica_groups=")
  text = attributes[start + len("replica_groups=") :] if start >= 0 else ""
  if (m := _MESH.match(text)) is not None:
    return _mesh_groups(*m.groups())
  if (m := _IOTA.match(text)) is not None:
    return _iota(m[2], m[3]).reshape(_ints(m[1]))
  rows = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
  groups = [_ints(row) for row in re.findall(r"\{([\d,]*)\}", rows[1])] if rows else []
  if not groups or not groups[0]:
    return np.arange(devices)[None]  # empty: everyone
  return np.array(groups)


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(x) for x in text.split(",") if x)


def _iota(sizes: str, order: str | None) -> np.ndarray:
  ids = np.arange(int(np.prod(_ints(sizes)))).reshape(_ints(sizes))
  return ids if order is None else ids.transpose(_ints(order))


def _mesh_groups(sizes: str, ids: str | None, order: str | None, over: str) -> np.ndarray:
  """Groups along named axes, or parts ``'a':(before)size`` of axes, of the compiler's mesh."""
  named = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", sizes)}
  grid = np.arange(int(np.prod(list(named.values())))) if ids is None else _iota(ids, order)
  wanted = [
    (name, int(before) if before else 1, int(size) if size else named[name])
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)
  ]
  split, inside, outside, shape = {}, [], [], []
  for name, n in named.items():
    parts = sorted((before, size) for axis, before, size in wanted if axis == name)
    done = 1
    for before, size in parts:
      if before > done:
        outside.append(len(shape))
        shape.append(before // done)
      split[name, before] = len(shape)
      shape.append(size)
      done = before * size
    if done < n:
      outside.append(len(shape))
      shape.append(n // done)
  inside = [split[name, before] for name, before, _ in wanted]
  grid = grid.reshape(shape).transpose(outside + inside)
  return grid.reshape(-1, int(np.prod([size for _, _, size in wanted])))


def pairs(attributes: str) -> np.ndarray:
  """``[n, 2]`` sources and targets of a permute."""
  text = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
  rows = re.findall(r"\{(\d+),(\d+)\}", text[1]) if text else []
  return np.array([(int(a), int(b)) for a, b in rows]).reshape(-1, 2)


def axes_of(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
  """The mesh axes along which devices of one group differ.

  ``("?",)`` where a group isn't all devices along these axes (permutes: no device at all differs).
  """
  if not groups.size:
    return ("?",)
  places = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
  differ = (places != places[:, :1]).any(axis=(0, 1))
  axes = tuple(name for name, varies in zip(mesh.axis_names, differ) if varies)
  span = int(np.prod([mesh.shape[a] for a in axes])) if axes else 1
  whole = groups.shape[1] in (span, 2)  # pairs are those of a permute, or of an axis of two
  return axes if axes and whole else axes or ("?",)


def by_slice(mesh: Mesh) -> np.ndarray:
  """``[slices, partitions]`` device numbers, those of a slice in the order of its partitions."""
  slices = np.array([getattr(d, "slice_index", 0) for d in mesh.devices.reshape(-1)])
  return np.stack([np.flatnonzero(slices == s) for s in np.unique(slices)])
