# SPDX-License-Identifier: Apache-2.0
"""Times real steps and all-to-alls on the devices present, for ``fit``."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdec.errors import UserError
from jaxdec.mixers.attention import AttentionConfig
from jaxdec.models import DecoderConfig
from jaxdec.parallel.flexsp.cost import MIB, CostModel, Exchange, Step, degrees, fit
from jaxdec.parallel.flexsp.execute import Executor
from jaxdec.parallel.flexsp.plan import Group, Plan


@dataclasses.dataclass(frozen=True)
class Measurements:
  """Timed steps and exchanges."""

  steps: tuple[Step, ...]
  exchanges: tuple[Exchange, ...]

  def fit(self, *, cap: int, bytes_per_token: float = 0.0, linear: bool = False) -> CostModel:
    """See ``flexsp.fit``."""
    return fit(self.steps, self.exchanges, cap=cap, bytes_per_token=bytes_per_token, linear=linear)

  def errors(self, model: CostModel) -> tuple[tuple[Step, float], ...]:
    """Predicted over measured time, less 1, of each step."""
    return tuple((s, model.group_time(s.lengths, s.degree) / s.ms - 1) for s in self.steps)


def exchange_bytes(config: DecoderConfig, itemsize: int = 2) -> float:
  """Bytes that Ulysses' all-to-alls send for a token, forward and backward, over all layers.

  ``2 (2 N + 2 K) H`` numbers for a softmax layer with N query and K key/value heads of width H: q
  and the output, k and v, twice (arXiv 2309.14509). With K = N and N H = D these are the 16 l D
  bytes of the FlexSP paper. Recurrent layers send states, whose size is not the tokens'.
  """
  numbers = sum(
    4.0 * (mixer.num_heads + mixer.num_kv_heads) * mixer.head_dim
    for mixer in (layer.mixer for layer in config.layers)
    if isinstance(mixer, AttentionConfig)
  )
  return numbers * itemsize


def random_tokens(length: int) -> dict[str, np.ndarray]:
  """A sequence any vocabulary has: zeros and ones."""
  return {"tokens": np.random.default_rng(length).integers(0, 2, length).astype(np.int32)}


def measure(
  executor: Executor,
  params: Any,
  *,
  cap: int,
  lengths: Iterable[Sequence[int]],
  exchange_mib: Sequence[float] = (0.25, 1.0, 4.0),
  repeats: int = 3,
  sequence: Callable[[int], Mapping[str, np.ndarray]] = random_tokens,
  extras: tuple = (),
) -> Measurements:
  """Times each of these lists of sequences on every degree that holds it.

  All devices work: with degree d, N / d groups compute the same list side by side, as in a step of
  training. Of ``repeats`` runs after a first one, which compiles, the fastest counts.

  Args:
    executor: with the ``loss_and_gradients`` that training will use.
    cap: tokens that fit on a device.
    lengths: lists of lengths; those of one or more long sequences and of many short ones, that
      together take all sorts of room, tell the coefficients apart.
    exchange_mib: sizes of the all-to-alls timed for each degree; empty: none.
    sequence: length -> arrays of a sequence.
    extras: as for the executor.

  Raises:
    UserError: where nothing fits.
  """
  devices = executor.mesh.size
  limit = CostModel(a1=0, a2=0, b1=0, cap=cap)
  steps = []
  for inside in dict.fromkeys(map(tuple, lengths)):
    rows = [sequence(n) for n in inside]
    for degree in degrees(devices):
      if sum(inside) > cap * degree:
        continue
      copies, size = devices // degree, len(inside)
      groups = tuple(
        Group(tuple(range(c * degree, (c + 1) * degree)), tuple(range(c * size, (c + 1) * size)))
        for c in range(copies)
      )
      plan = Plan(devices, inside * copies, limit, (groups,))
      run = functools.partial(executor, plan, params, rows * copies, extras)
      steps.append((inside, degree, run))
  if not steps:
    raise UserError(
      f"no list of lengths fits on {devices} devices with room for {cap} tokens each; give shorter "
      "ones"
    )
  exchanges = [
    (degree, *exchange(executor.mesh, degree, mib))
    for degree in degrees(devices)[1:]
    for mib in exchange_mib
  ]
  times = _fastest([run for *_, run in (*steps, *exchanges)], repeats)
  return Measurements(
    tuple(Step(inside, degree, next(times)) for inside, degree, _ in steps),
    tuple(Exchange(degree, mib, next(times)) for degree, mib, _ in exchanges),
  )


def exchange(mesh: Mesh, degree: int, mib: float) -> tuple[float, Callable]:
  """An all-to-all of an array of ``mib`` on each device, in all groups of ``degree`` at once.

  Returns:
    The array's size in MiB, rounded to what divides, and the call to time.
  """
  grid = np.array(mesh.devices.flat).reshape(-1, degree)
  groups = Mesh(grid, ("group", "seq"), axis_types=(AxisType.Auto,) * 2)
  width = max(1, round(mib * MIB / 4 / degree))
  spec = PartitionSpec(("group", "seq"))
  # [tokens of a shard, heads] -> [all tokens, heads of a device]
  run = jax.jit(
    jax.shard_map(
      lambda x: jax.lax.all_to_all(x, "seq", split_axis=1, concat_axis=0, tiled=True),
      mesh=groups, in_specs=spec, out_specs=spec,
    )
  )  # fmt: skip
  x = jax.jit(
    lambda: jnp.zeros((grid.size * width, degree), jnp.float32),
    out_shardings=NamedSharding(groups, spec),
  )()
  return width * degree * 4 / MIB, functools.partial(run, x)


def _fastest(runs: Sequence[Callable], repeats: int) -> Iterator[float]:
  """Milliseconds of the fastest of ``repeats`` runs of each.

  They take turns, so that what else the machine does for a while does not fall on one of them
  alone; a round before them compiles.
  """
  best = [float("inf")] * len(runs)
  for turn in range(repeats + 1):
    for index, run in enumerate(runs):
      start = time.perf_counter()
      jax.block_until_ready(run())
      if turn:
        best[index] = min(best[index], 1e3 * (time.perf_counter() - start))
  return iter(best)
