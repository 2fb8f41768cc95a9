# SPDX-License-Identifier: Apache-2.0
"""The least time a step can take: products, HBM traffic, and collectives over the links they use.

Every term is a lower bound at the data sheet's rates, so a step time below it is an error and a
measured one is above it. The model of a torus is that of "How to Scale Your Model"
(jax-ml.github.io/scaling-book, chapters 1 to 3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from jaxdec.parallel.plan.collectives import Collective
from jaxdec.parallel.plan.costs import Costs
from jaxdec.slices import Topology

# Between the two dies of a tpu7x: "six times the bandwidth of one ICI link"
# (docs.cloud.google.com/tpu/docs/tpu7x).
_BETWEEN_DIES = 6.0


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of one step on one device.

  Attributes:
    compute: matrix products at the bfloat16 peak. memory: HBM traffic at its bandwidth.
    links: seconds of collectives by mesh axes, one after the other on each.
    exposed: the part of ``links`` that the compiler scheduled with nothing to do meanwhile.
    step: ``max(compute, memory, hidden collectives) + exposed``.
    model_flops: what the model needs for these tokens, of all devices (no recomputation).
    tokens: in one step, of all devices.
  """

  compute: float
  memory: float
  links: dict[str, float]
  exposed: float
  step: float
  model_flops: float
  tokens: int
  devices: int
  peak: float

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.step

  @property
  def mfu(self) -> float:
    """Model FLOPs / (step time x peak): no run can reach more."""
    return self.model_flops / (self.step * self.devices * self.peak)

  @property
  def bound(self) -> str:
    """What the step waits for most."""
    terms = {
      "compute": self.compute,
      "memory": self.memory,
      "collectives": sum(self.links.values()),
    }
    return max(terms, key=terms.get)


def roofline(
  costs: Costs,
  found: Sequence[Collective],
  mesh: Mesh,
  topology: Topology,
  *,
  tokens: int,
  model_flops: float,
) -> Roofline:
  """The bound for one compiled program."""
  generation = topology.generation
  compute, memory = costs.flops / generation.peak, costs.bytes / generation.bandwidth
  links: dict[str, float] = {}
  exposed = 0.0
  for c in found:
    seconds = c.count * collective_seconds(c, mesh, topology)
    name = "*".join(c.axes)
    links[name] = links.get(name, 0.0) + seconds
    if not c.overlapped:
      exposed += seconds
  hidden = max(0.0, sum(links.values()) - exposed)
  return Roofline(
    compute=compute,
    memory=memory,
    links=links,
    exposed=exposed,
    step=max(compute, memory, hidden) + exposed,
    model_flops=model_flops,
    tokens=tokens,
    devices=mesh.devices.size,
    peak=generation.peak,
  )


def collective_seconds(c: Collective, mesh: Mesh, topology: Topology) -> float:
  """Time of one run on the links of its group; latency is left out.

  A ring of n chips in one dimension of the torus moves both ways at once. All-gather,
  reduce-scatter, all-reduce: bytes / rate in. All-to-all: a device's bytes travel n/4 hops on a
  ring (n/2 on a line that does not close, over its middle link). Permute: bytes x hops / link.
  """
  if c.group < 2 or not c.bytes or not c.groups.size:
    return 0.0
  devices = mesh.devices.reshape(-1)[c.groups]
  slices = {getattr(d, "slice_index", 0) for d in devices[0]}
  generation = topology.generation
  if len(slices) > 1:
    return c.bytes / generation.dcn  # the part inside the slices is a collective of its own
  if c.kind == "collective-permute":
    return c.bytes * _hops(devices, topology) / generation.link
  spans = _spans(devices[0], topology)
  if not spans:
    return c.bytes / (_BETWEEN_DIES * generation.link)
  if c.kind in ("all-to-all", "ragged-all-to-all"):
    whole = c.bytes * c.group / (c.group - 1)
    worst = max(n / 8 if wraps else n / 4 for n, wraps in spans)
    return whole * worst / generation.link
  rate = generation.link * sum(2 if wraps else 1 for _, wraps in spans)
  return c.bytes / rate


def _spans(group: np.ndarray, topology: Topology) -> list[tuple[int, bool]]:
  """For every dimension of the torus a group extends in: chips, and whether they form a ring."""
  coords = np.array([d.coords for d in group])
  spans = []
  for dimension in range(coords.shape[1]):
    n = len(np.unique(coords[:, dimension]))
    if n > 1:
      whole = dimension < len(topology.shape) and n == topology.shape[dimension]
      spans.append((n, whole and n > 2 and topology.wraps(dimension)))
  return spans


def _hops(pairs: np.ndarray, topology: Topology) -> float:
  """Most links that one of the pairs is apart."""
  worst = 0
  for source, target in pairs:
    distance = 0
    for dimension, (a, b) in enumerate(zip(source.coords, target.coords)):
      apart = abs(a - b)
      if topology.wraps(dimension):
        apart = min(apart, topology.shape[dimension] - apart)
      distance += apart
    worst = max(worst, distance)
  return worst or 1 / _BETWEEN_DIES


def dollars(topology: Topology, seconds: float, price: float) -> float:
  """Of all chips for that long, at ``price`` a chip-hour."""
  return math.fsum([topology.chips * price * seconds / 3600])
