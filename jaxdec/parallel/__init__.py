# SPDX-License-Identifier: Apache-2.0
"""Device meshes and the rules that lay parameters and batches on them."""

from __future__ import annotations

from jaxdec.parallel.batches import batch_share, place_batch
from jaxdec.parallel.mesh import AXES, make_mesh
from jaxdec.parallel.rules import (
  DEFAULT,
  Rules,
  batch_sharding,
  batch_ways,
  check_batch,
  length_ways,
  like_parameters,
  shardings,
)

__all__ = [
  "AXES",
  "DEFAULT",
  "Rules",
  "batch_sharding",
  "batch_share",
  "batch_ways",
  "check_batch",
  "length_ways",
  "like_parameters",
  "make_mesh",
  "place_batch",
  "shardings",
]
