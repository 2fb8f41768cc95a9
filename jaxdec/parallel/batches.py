# SPDX-License-Identifier: Apache-2.0
"""Which rows of a global batch a process reads, and how they get onto its devices."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdec.data.share import Share
from jaxdec.errors import UserError
from jaxdec.parallel.rules import DEFAULT, Rules, batch_sharding


@functools.lru_cache(maxsize=16)
def batch_share(mesh: Mesh, rules: Rules = DEFAULT, *, process_index: int | None = None) -> Share:
  """The rows of every global batch that a process reads, in full length.

  Rows go with the mesh, not with the process number: processes between which only sequences (or
  matrices) are split read the same rows, and on a real slice the rows of one host need not be
  neighbours. Which *columns* it keeps is settled by ``place_batch``.

  Args:
    mesh: devices of all processes. process_index: by default this process's.
  """
  me = jax.process_index() if process_index is None else process_index
  axes = rules.mesh_axes("batch")
  names = list(mesh.axis_names)
  sizes = [mesh.devices.shape[names.index(axis)] for axis in axes]
  parts = set()
  for where, device in np.ndenumerate(mesh.devices):
    if device.process_index == me:
      coordinates = [where[names.index(axis)] for axis in axes]
      parts.add(int(np.ravel_multi_index(coordinates, sizes)) if axes else 0)
  return Share(tuple(sorted(parts)), int(np.prod(sizes, dtype=int)))


def place_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh, rules: Rules = DEFAULT
) -> dict[str, jax.Array]:
  """This process's rows as part of the global batch ``[B, T, ...]``.

  Args:
    batch: the rows of ``batch_share``, in its order, all columns. Nothing is sent to other
      processes; each device takes its rows and columns.
  """
  share = batch_share(mesh, rules)
  return {name: _place(np.asarray(value), share, mesh, rules) for name, value in batch.items()}


def _place(value: np.ndarray, share: Share, mesh: Mesh, rules: Rules) -> jax.Array:
  sharding = batch_sharding(mesh, rules, rank=min(value.ndim, 2))
  rows = share.total(value.shape[0])
  first = {part: at for at, part in enumerate(share.parts)}
  each = value.shape[0] // len(share.parts)

  def piece(where: tuple[slice, ...]) -> np.ndarray:
    # A device's rows are one part, or all of them where the batch is not split.
    start = where[0].indices(rows)[0]
    at = first[start // each] * each
    return value[(slice(at, at + each), *where[1:])]

  return jax.make_array_from_callback((rows, *value.shape[1:]), sharding, piece)


def check_agreement(batch: Mapping[str, np.ndarray], mesh: Mesh, rules: Rules = DEFAULT) -> None:
  """Raises unless all processes with the same rows have really read the same.

  For a first batch: it would train on nonsense without an error otherwise. Communicates 36 bytes
  per process.
  """
  if jax.process_count() == 1:
    return
  share = batch_share(mesh, rules)
  digest = hashlib.sha256()
  for name in sorted(batch):
    digest.update(np.ascontiguousarray(batch[name]).tobytes())
  from jax.experimental import multihost_utils

  mine = np.concatenate([[share.parts[0]], np.frombuffer(digest.digest(), np.uint32)])
  everyone = np.asarray(multihost_utils.process_allgather(mine.astype(np.uint32)))
  for process, theirs in enumerate(everyone):
    if theirs[0] == mine[0] and (theirs != mine).any():
      raise UserError(
        f"processes {jax.process_index()} and {process} hold the same rows of the batch on this "
        f"mesh and read different ones; give the data share=batch_share(mesh), here part"
        f"{'s' * (len(share.parts) > 1)} {', '.join(map(str, share.parts))} of {share.of}"
      )
