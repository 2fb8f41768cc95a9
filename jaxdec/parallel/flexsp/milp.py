# SPDX-License-Identifier: Apache-2.0
"""Which groups, and which sequences in each: the mixed-integer program of FlexSP.

Buckets k of bound s_k with n_k sequences; candidate groups p of degree d_p; A_kp sequences of
bucket k go to group p, m_p says whether p is used:

    minimise T
    sum_p A_kp = n_k                            every sequence once
    A_kp = 0 where d_p < dmin_k                 it must fit
    sum_k s_k A_kp <= cap d_p                   memory
    b1 m_p + sum_k c(s_k, d_p) A_kp <= T        time
    m_p <= sum_k A_kp <= (sum_k n_k) m_p        used groups are those that are not empty
    sum_p d_p m_p = N                           all devices
    sum_k s_k A_kp >= sum_k s_k A_k,p+1         where d_p = d_p+1: copies are interchangeable

Source: FlexSP, arXiv 2412.01523, section 4.1 (equations 9 to 16), solved by HiGHS through
``scipy.optimize.milp``; the last line is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxdec.parallel.flexsp.cost import CostModel, degrees

Status = Literal["optimal", "limit", "infeasible"]
Histogram = Sequence[tuple[int, int]]

# Below this many integer variables the problem is small enough not to drop candidates.
_PRUNE_FROM = 500


@dataclasses.dataclass(frozen=True)
class Solution:
  """Groups of one micro-batch in terms of buckets.

  Attributes:
    status: ``optimal`` (within the gap), ``limit`` (stopped early; ``groups`` is usable if not
      empty), ``infeasible``.
    time: predicted ms of the slowest group; inf without groups.
    groups: degree of each group and how many sequences of each bucket it computes.
    bound: no solution is faster than this (ms), among those the candidates allow.
  """

  status: Status
  time: float
  groups: tuple[tuple[int, tuple[int, ...]], ...]
  bound: float = 0.0


def candidates(histogram: Histogram, devices: int, model: CostModel) -> tuple[int, ...]:
  """Degrees of the groups to choose from, ascending: ``floor(N / d)`` copies of every degree.

  In large problems, with D the degree the longest bucket needs and n_D the sequences that need it,
  degrees below D get only ``floor((N - D n_D) / d)``: what is left once each of those has a group
  of its own. This is the paper's code's rule and can cut the optimum (three sequences just over
  half of D's room fit into one group of 2 D).
  """
  copies = {d: devices // d for d in degrees(devices)}
  if len(histogram) * sum(copies.values()) >= _PRUNE_FROM:
    need = [(model.least_degree(bound), count) for bound, count in histogram]
    top = max(d for d, _ in need)
    left = devices - top * sum(count for d, count in need if d == top)
    copies = {d: n if d >= top else max(left, 0) // d for d, n in copies.items()}
  return tuple(d for d, n in copies.items() for _ in range(n))


def solve(
  histogram: Histogram,
  devices: int,
  model: CostModel,
  *,
  upper: float = np.inf,
  time_limit: float | None = 10.0,
  node_limit: int | None = None,
  gap: float = 1e-3,
) -> Solution:
  """The fastest groups for one micro-batch.

  Args:
    histogram: ``(bound, count)`` of each bucket.
    upper: ms of a known solution; the solver takes no starting point, a bound on T stands in.
    time_limit: seconds. A solution cut off by time depends on the machine; where every process
      must find the same one, use ``node_limit`` (branch-and-bound nodes) and no time limit.
    gap: relative distance to the best bound at which to stop.
  """
  from scipy import sparse
  from scipy.optimize import Bounds, LinearConstraint, milp

  bounds = np.array([b for b, _ in histogram], np.float64)
  counts = np.array([n for _, n in histogram], np.float64)
  group_degrees = np.array(candidates(histogram, devices, model))
  size_k, size_p = len(bounds), len(group_degrees)
  if not size_p:
    return Solution("infeasible", float("inf"), ())
  cost = np.stack([model.time(bounds, int(d)) for d in group_degrees], axis=1)  # [K, P]
  least = np.array([model.least_degree(int(b)) for b in bounds])

  eye_p, one_p = sparse.eye_array(size_p), np.ones((1, size_p))
  zeros = sparse.csr_array((size_p, size_p))
  column = sparse.csr_array((size_p, 1))
  each_bucket = sparse.kron(sparse.eye_array(size_k), one_p)  # sums A over p
  count_p = sparse.kron(np.ones((1, size_k)), eye_p)  # sums A over k
  tokens_p = sparse.kron(bounds[None], eye_p)
  time_p = sparse.hstack([sparse.diags_array(row) for row in cost])
  same = np.flatnonzero(group_degrees[:-1] == group_degrees[1:])
  order = (eye_p.tocsr()[same] - eye_p.tocsr()[same + 1]) @ tokens_p
  pad = sparse.csr_array((size_k, size_p + 1))
  total = counts.sum()
  inf = np.inf

  def constraint(a, m, t, low, high):
    return LinearConstraint(sparse.csr_array(sparse.hstack([a, m, t])), low, high)

  constraints = [
    LinearConstraint(sparse.csr_array(sparse.hstack([each_bucket, pad])), counts, counts),
    constraint(tokens_p, zeros, column, -inf, model.cap * group_degrees),
    constraint(time_p, model.b1 * eye_p, -np.ones((size_p, 1)), -inf, 0),
    constraint(count_p, -eye_p, column, 0, inf),
    constraint(count_p, -total * eye_p, column, -inf, 0),
    constraint(
      sparse.csr_array((1, size_k * size_p)), group_degrees[None], np.zeros((1, 1)),
      devices, devices,
    ),
  ]  # fmt: skip
  if len(same):
    rest = sparse.csr_array((len(same), size_p + 1))
    constraints.append(LinearConstraint(sparse.csr_array(sparse.hstack([order, rest])), 0, inf))
  most = np.where(group_degrees[None] < least[:, None], 0, counts[:, None])
  variables = size_k * size_p + size_p + 1
  options = {"mip_rel_gap": gap}
  if time_limit is not None:
    options["time_limit"] = float(time_limit)
  if node_limit is not None:
    options["node_limit"] = int(node_limit)
  found = milp(
    np.eye(1, variables, variables - 1)[0],
    integrality=np.arange(variables) < variables - 1,
    bounds=Bounds(0, np.concatenate([most.ravel(), np.ones(size_p), [upper * (1 + 1e-6)]])),
    constraints=constraints,
    options=options,
  )
  bound = found.mip_dual_bound if found.mip_dual_bound is not None else 0.0
  if found.x is None:
    status = "infeasible" if found.status == 2 else "limit"
    return Solution(status, inf, (), float(bound))
  amount = np.rint(found.x[: size_k * size_p]).astype(np.int64).reshape(size_k, size_p)
  used = np.flatnonzero(amount.sum(axis=0))
  # T again from the whole numbers: the solver's is off by its tolerances.
  time = max(model.b1 + float(amount[:, p] @ cost[:, p]) for p in used)
  groups = tuple((int(group_degrees[p]), tuple(amount[:, p].tolist())) for p in used)
  return Solution("optimal" if found.status == 0 else "limit", time, groups, float(bound))
