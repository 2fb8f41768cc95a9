# SPDX-License-Identifier: Apache-2.0
"""What a sequence costs on a group of devices: the cost model of FlexSP, and its fit.

A sequence of s tokens on a group of d devices takes, forward and backward together,

    c(s, d) = (a1 s^2 + a2 s) / d + [d > 1] * (b s / 2^20 / d) / bw(d)        milliseconds

(attention, everything linear in tokens, and the all-to-alls: b bytes a token; for l Ulysses layers
of width h in two-byte numbers b = 16 l h, four tensors in two passes). A group that computes
several sequences takes ``b1 + sum c``; a micro-batch takes as long as its slowest group.

Source: FlexSP, arXiv 2412.01523, section 4.1. Loads numpy only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxdec.errors import UserError

MIB = 2.0**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
  """Predicted milliseconds and the memory limit.

  Attributes:
    a1, a2, b1: ms per token squared, per token, and per group. ``a1 = 0``: only linear layers.
    bandwidth: of an all-to-all, for each degree above 1: MiB of a device's array that are exchanged
      in a millisecond (about GB/s). A mapping, kept as sorted pairs so that models can be compared.
    bytes_per_token: bytes of a token in all the arrays that a step exchanges.
    cap: tokens that fit on one device.
  """

  a1: float
  a2: float
  b1: float
  bandwidth: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
  bytes_per_token: float = 0.0
  cap: int

  def __post_init__(self):
    pairs = tuple(sorted((int(d), float(bw)) for d, bw in dict(self.bandwidth).items()))
    object.__setattr__(self, "bandwidth", pairs)
    for name in ("a1", "a2", "b1", "bytes_per_token"):
      value = getattr(self, name)
      if not (math.isfinite(value) and value >= 0):
        raise UserError(f"CostModel: {name} must be a finite number >= 0, got {value}")
    if int(self.cap) != self.cap or self.cap < 1:
      raise UserError(f"CostModel: cap must be a whole number of tokens >= 1, got {self.cap}")
    for degree, bandwidth in pairs:
      if not bandwidth > 0:
        raise UserError(f"CostModel: the bandwidth of degree {degree} must be > 0, got {bandwidth}")

  def time(self, length, degree: int):
    """``c(length, degree)`` in ms; ``length`` is a number or an array, the result is float64."""
    s = np.asarray(length, np.float64)
    compute = (self.a1 * s * s + self.a2 * s) / degree
    if degree == 1 or not self.bytes_per_token:
      return compute
    bandwidth = dict(self.bandwidth).get(degree)
    if bandwidth is None:
      known = ", ".join(str(d) for d, _ in self.bandwidth) or "none"
      raise UserError(
        f"the cost model has no bandwidth for groups of {degree} devices (it has {known}); "
        "measure it, or give one"
      )
    return compute + self.bytes_per_token * s / MIB / degree / bandwidth

  def group_time(self, lengths: Iterable[int], degree: int) -> float:
    """``b1 + sum c``: a group's time for all its sequences; 0 for none."""
    lengths = np.asarray(list(lengths), np.float64)
    return self.b1 + float(np.sum(self.time(lengths, degree))) if lengths.size else 0.0

  def least_degree(self, length: int) -> int:
    """The least power of two whose group holds the sequence: ``2^ceil(log2(ceil(s / cap)))``."""
    return 1 << (-(-int(length) // self.cap) - 1).bit_length()


def degrees(devices: int) -> tuple[int, ...]:
  """1, 2, 4, ..., N.

  Raises:
    UserError: N is not a power of two.
  """
  if devices < 1 or devices & (devices - 1):
    raise UserError(
      f"groups have 1, 2, 4, ... devices, so their number must be a power of two, got {devices}"
    )
  return tuple(1 << i for i in range(devices.bit_length()))


def check_lengths(lengths: Sequence[int], devices: int, model: CostModel) -> np.ndarray:
  """The lengths as an array.

  Raises:
    UserError: no sequence, one without tokens, or one that all devices together cannot hold.
  """
  array = np.asarray(lengths)
  if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
    raise UserError(
      f"sequence lengths must be a non-empty list of whole numbers, got {array.dtype} of shape "
      f"{array.shape}"
    )
  if array.min() < 1:
    where = int(np.argmin(array))
    raise UserError(f"sequence {where} has {array[where]} tokens; every sequence needs at least 1")
  where = int(np.argmax(array))
  if array[where] > devices * model.cap:
    raise UserError(
      f"sequence {where} has {array[where]} tokens, and {devices} devices with room for "
      f"{model.cap} tokens each hold {devices * model.cap}; cut it, or use more devices or memory"
    )
  return array.astype(np.int64)


def lower_bound(lengths: Sequence[int], devices: int, model: CostModel) -> float:
  """No assignment of these sequences to groups that together are N devices is faster (ms).

  ``max( b1 + sum_s min_d d c(s, d) / N,  b1 + max_s min_d c(s, d) )`` over the degrees that hold
  s: the group times, weighted by d / N, average to the first; the second is the longest sequence.
  """
  lengths = np.asarray(lengths, np.int64)
  area = longest = np.full(lengths.shape, np.inf)
  for degree in degrees(devices):
    time = np.where(lengths <= degree * model.cap, model.time(lengths, degree), np.inf)
    area, longest = np.minimum(area, degree * time), np.minimum(longest, time)
  return model.b1 + float(max(np.sum(area) / devices, np.max(longest)))


def token_cap(
  *, memory_mib: float, params_billion: float, devices: int, activation_mib: float, zero: int = 3
) -> int:
  """Tokens that fit on a device: ``floor((memory - 16 * 1024 * params * z) / activation)``.

  Mixed-precision Adam keeps 16 bytes a parameter, of which ZeRO (arXiv 1910.02054) leaves a
  device the share z: ``1/N`` in stage 3, ``7/(8N) + 1/8`` in stage 2, ``6/(8N) + 2/8`` in stage 1.

  Args:
    memory_mib: memory of a device. params_billion: parameters, in billions (2^30).
    activation_mib: what a token's activations take.

  Raises:
    UserError: an unknown stage, or nothing left for tokens.
  """
  if zero not in (1, 2, 3):
    raise UserError(f"zero must be 1, 2 or 3, got {zero}")
  kept = (3 - zero) / 8
  states = 16 * 1024 * params_billion * ((1 - kept) / devices + kept)
  cap = math.floor((memory_mib - states) / activation_mib)
  if cap < 1:
    raise UserError(
      f"parameters and optimizer take {states:.0f} MiB of the {memory_mib:.0f} MiB of a device, "
      "which leaves no room for a token; use more devices or a higher ZeRO stage"
    )
  return cap


def gpt_7b(devices: int, *, memory_mib: float = 72 * 1024) -> CostModel:
  """The paper's fit of GPT-7B (32 layers of width 4,096) on A100s in nodes of 8, ZeRO-3.

  Above 16 devices, where the paper's code has no number, the bandwidth of 16 is kept.
  """
  measured = {2: 154.0, 4: 137.0, 8: 121.0, 16: 8.7}
  return CostModel(
    a1=5.128e-6,
    a2=0.18396,
    b1=629.36,
    bandwidth={d: measured[min(d, 16)] for d in degrees(devices) if d > 1},
    bytes_per_token=16.0 * 32 * 4096,
    cap=token_cap(
      memory_mib=memory_mib, params_billion=7, devices=devices, activation_mib=4.71, zero=3
    ),
  )


@dataclasses.dataclass(frozen=True)
class Step:
  """One timed step of one group: these sequences on so many devices took ``ms``."""

  lengths: tuple[int, ...]
  degree: int
  ms: float


@dataclasses.dataclass(frozen=True)
class Exchange:
  """One timed all-to-all: ``degree`` devices exchanged arrays of ``mib`` each in ``ms``."""

  degree: int
  mib: float
  ms: float


def fit(
  steps: Sequence[Step],
  exchanges: Sequence[Exchange] = (),
  *,
  cap: int,
  bytes_per_token: float = 0.0,
  linear: bool = False,
) -> CostModel:
  """The model nearest to measurements.

  Bandwidths come from the exchanges: the slope of time over size where a degree was timed at
  several sizes (what an exchange costs regardless of its size is then part of b1), else size
  over time. The rest of each step is fitted by least squares of the *relative* error, with no
  coefficient below 0; an absolute error would leave the short steps to chance.

  Args:
    cap, bytes_per_token: as in ``CostModel``. linear: fit without ``a1``.

  Raises:
    UserError: too few steps, or a degree without exchange.
  """
  from scipy.optimize import nnls

  bandwidth = {}
  for degree in sorted({x.degree for x in exchanges if x.degree > 1}):
    sizes, times = np.array([(x.mib, x.ms) for x in exchanges if x.degree == degree]).T
    rows = np.stack([sizes, np.ones_like(sizes)], axis=1)
    slope = 0.0
    if len(set(sizes)) > 1:
      slope = nnls(rows / times[:, None], np.ones_like(times))[0][0]
    bandwidth[degree] = float(1 / slope if slope > 0 else np.sum(sizes) / np.sum(times))
  unknowns = 2 if linear else 3
  if len({(x.lengths, x.degree) for x in steps}) < unknowns:
    raise UserError(f"a fit needs at least {unknowns} different steps, got {len(steps)}")
  wire = CostModel(a1=0, a2=0, b1=0, cap=cap, bandwidth=bandwidth, bytes_per_token=bytes_per_token)
  rows, targets = [], []
  for step in steps:
    s = np.asarray(step.lengths, np.float64)
    rows.append([np.sum(s * s) / step.degree, np.sum(s) / step.degree, 1.0])
    targets.append(step.ms - float(np.sum(wire.time(s, step.degree))))
  rows = np.array(rows)[:, 1 if linear else 0 :]
  measured = np.array([step.ms for step in steps])
  rows, targets = rows / measured[:, None], np.array(targets) / measured
  # Coefficients differ by ten orders of magnitude; columns of one scale keep the solver exact.
  scale = np.max(np.abs(rows), axis=0)
  found = nnls(rows / scale, targets)[0] / scale
  a1, a2, b1 = (0.0, *found) if linear else found
  return dataclasses.replace(wire, a1=float(a1), a2=float(a2), b1=float(b1))
