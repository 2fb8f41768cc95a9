# SPDX-License-Identifier: Apache-2.0
"""Cycles of the TPU kernels, from their schedules and from how many tiles a pattern has.

``inner_loops`` describes the loops that do the arithmetic; ``cycles`` adds everything else a call
does: what each row of the lists and each grid step costs, and trips that are not filled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pallas_kernels._aot import Schedule
from pallas_kernels._specs import Inner, Spec
from pallas_kernels._tpu import Chip
from pallas_kernels.block_sparse_attention._tpu_forward import Rule
from pallas_kernels.block_sparse_attention.mosaic_tpu import Plan, TPUConfig

FORWARD, BACKWARD = "block_sparse_forward", "block_sparse_backward"
# Loops inside the grid's, by place: sums set to zero, trips of one row's full tiles, other trips,
# sums written; in the backward pass dq is set to zero first. A step of one row has no first or last
# loop: the compiler takes them apart.
_UNIT = "query block x key block"


@dataclasses.dataclass(frozen=True)
class Trips:
  """How often the loops of a kernel run in a call of one batch entry and head.

  ``full``: trips of full tiles of one row. ``rest``: trips of other tiles. ``rows``, ``steps``: of
  the lists, of the grid. ``tiles``: that the lists hold.
  """

  full: int
  rest: int
  rows: int
  steps: int
  tiles: int


def count_trips(num_full: Any, num: Any, *, per_trip: int, rows_per_step: int) -> Trips:
  """From the counts of one head's lists, ``num_full`` and ``num`` of ``Lists``, ``[rows]``."""
  num_full, num = np.asarray(num_full, np.int64), np.asarray(num, np.int64)
  steps = -(-len(num) // rows_per_step)
  full = num_full // per_trip
  left = np.pad(num - full * per_trip, (0, steps * rows_per_step - len(num)))
  rest = -(-left.reshape(steps, rows_per_step).sum(axis=1) // per_trip)
  return Trips(int(full.sum()), int(rest.sum()), steps * rows_per_step, steps, int(num.sum()))


def cycles(schedule: Schedule, trips: Trips, *, heads: int = 1) -> int:
  """Bundles that a call issues, from the schedule of its kernel (one range of keys or queries)."""
  grid = schedule.loops[0]
  inner = list(grid.inner)
  queries = inner.pop(0) if schedule.name.startswith(BACKWARD) else None
  full, rest = (inner[1], inner[2]) if len(inner) == 4 else (inner[0], inner[1])
  by_row = sum(x.bundles for x in inner) - full.bundles - rest.bundles
  total = grid.own * trips.steps + by_row * trips.rows
  total += full.bundles * trips.full + rest.bundles * trips.rest
  if queries is not None:  # as many query blocks as the call has are cleared once a head
    total += queries.bundles * trips.rows
  return heads * total


def causal_counts(
  spec: Spec, density: float = 1.0, *, seed: int = 0
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """``(num_full, num)`` of the rows and of the columns of a causal pattern, T = S, square blocks.

  ``density``: the share of the causal tiles that is listed: always the diagonal ones, and others at
  random.
  """
  n = -(-spec.T // spec.block)
  mask, below = np.eye(n, dtype=bool), np.tril(np.ones((n, n), bool), -1)
  wanted = max(round(density * n * (n + 1) / 2) - n, 0)
  places = np.flatnonzero(below)
  mask.flat[np.random.default_rng(seed).choice(places, wanted, replace=False)] = True
  full = mask & below
  return (full.sum(1), mask.sum(1)), (full.sum(0), mask.sum(0))


def plan_of(spec: Spec, chip: Chip, config: TPUConfig | None = None) -> Plan:
  """The plan of a causal call with square blocks."""
  rule = Rule(spec.T, spec.T, spec.block, spec.block, True, None, False, None, spec.H**-0.5)
  return Plan(rule, config or TPUConfig(), False, False, chip)


def call_trips(spec: Spec, chip: Chip, density: float = 1.0) -> tuple[Trips, Trips]:
  """Forward and backward, of one batch entry and head."""
  plan = plan_of(spec, chip)
  rows, columns = causal_counts(spec, density)
  sizes = spec.T, spec.T, spec.H, spec.H, spec.dtype
  of_forward, of_backward = plan.forward_layout(*sizes).rows, plan.backward_layout(*sizes).rows
  return (
    count_trips(*rows, per_trip=plan.forward_tiles, rows_per_step=of_forward),
    count_trips(*columns, per_trip=plan.backward_tiles, rows_per_step=of_backward),
  )


def inner_loops(spec: Spec, chip: Chip) -> tuple[Inner, ...]:
  """The two loops over tiles of each kernel; causal, with the spec's density."""
  plan = plan_of(spec, chip)
  made = []
  of_each = zip(
    (FORWARD, BACKWARD), (2, 5), (plan.forward_tiles, plan.backward_tiles),
    call_trips(spec, chip, spec.options.get("density", 1.0)),
  )  # fmt: skip
  for kernel, products, per_trip, trips in of_each:
    first = (1 if kernel == BACKWARD else 0) + (1 if trips.rows > trips.steps else 0)
    for place, count in enumerate((trips.full, trips.rest)):
      made.append(
        Inner(
          kernel=kernel,
          loop=(0, first + place),
          unit=_UNIT if place == 0 else f"{_UNIT} (masked, mixed rows)",
          units_per_trip=per_trip,
          macs_per_trip=per_trip * products * spec.block**2 * spec.H,
          trips=spec.B * spec.N * count,
          backward=kernel == BACKWARD,
        )
      )
  return tuple(made)
