# SPDX-License-Identifier: Apache-2.0
"""Every collective of a compiled program: kind, payload, mesh axes, runs per step, origin.

What one execution does is counted, not what the text says: an instruction in the body of a scan
over layers runs once a layer, and the TPU compiler prints an asynchronous collective several times
(in the fusion that starts it, in those that overlap with it, and in the one that ends it), of which
the start is the collective. Channel ids don't help there: those of ``shard_map`` share one.

Bytes are those a device sends over its links in the bandwidth-optimal algorithm, W devices a group:

  all-gather          (W-1)/W of the output      reduce-scatter   (W-1)/W of the input
  all-reduce          2 (W-1)/W of the input     all-to-all       (W-1)/W of the input
  collective-permute  the input

A program for several slices has one partition for each device of a slice. What crosses slices is a
``send`` to the runtime (and a ``recv``), of the kind that its attributes name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from jaxdec.parallel.plan.groups import axes_of, by_slice, pairs, replica_groups
from jaxdec.parallel.plan.hlo import Computation, Instruction, Module, Shape

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    kind: one of ``KINDS``. payload: the arrays a device ends up with.
    count: runs in one execution of the program.
    group: devices in a group, W. groups: one row of device numbers a group (permutes: the pairs).
    axes: mesh axes the groups span; ``?`` where they are no product of axes.
    bytes: what a device sends, each run.
    asynchronous: starts and ends are apart. overlapped: something is computed between.
    phase: ``forward``, ``recompute`` (of a rematerialised layer), ``backward`` or ``update``.
    layer: the module of the model it belongs to, as far as the metadata says.
  """

  kind: str
  payload: tuple[Shape, ...]
  count: int
  group: int
  groups: np.ndarray = dataclasses.field(repr=False, compare=False)
  axes: tuple[str, ...]
  bytes: int
  asynchronous: bool
  overlapped: bool
  phase: str
  layer: str
  op: str

  @property
  def total(self) -> int:
    """Bytes a device sends in one execution."""
    return self.bytes * self.count


def collectives(module: Module, mesh: Mesh) -> list[Collective]:
  """All collectives of ``module``, compiled for ``mesh``, in program order."""
  found = []
  for computation in module.computations.values():
    count = module.runs[computation.name]
    if not count:
      continue
    for x in computation.instructions.values():
      kind = x.opcode.removesuffix("-start")
      one = None
      if x.opcode == "send" and _TRANSFER in x.attributes:
        found.append(_between_slices(mesh, computation, x, count))
      elif kind in KINDS:
        one = _one(module, mesh, computation, x, kind, count)
        if one is not None and one.group > 1:  # over an axis of one device nothing is sent
          found.append(one)
  return found


def _one(module, mesh, computation, x: Instruction, kind, count) -> Collective | None:
  asynchronous = overlapped = False
  result = x.shapes
  operands = tuple(s for name in x.operands for s in computation.instructions[name].shapes)
  if x.opcode.endswith("-start"):
    asynchronous = True
    overlapped = _work_before_done(computation, x)
    if kind != "all-reduce":  # the tuple is (operands, results, contexts)
      result = x.shapes[len(operands) : 2 * len(operands)]
  caller = module.callers.get(computation.name)
  if computation.name in module.fused:
    targets = [y.attributes for y in computation.of("custom-call")]
    if any("AsyncCollectiveStart" in t for t in targets):
      asynchronous, overlapped = True, _fused_overlap(module, x)
    elif "async_collective_fusion_config" in x.attributes:
      return None  # the same collective going on, or ending
    elif kind == "all-reduce" and computation.root.bytes < x.bytes:
      kind, result = "reduce-scatter", computation.root.shapes  # reduced, and a slice kept
  elif caller is not None and caller[1].opcode.endswith("-start"):
    # A generic start; "call-start" on the SparseCore, which moves data beside the TensorCore.
    asynchronous, overlapped = True, _work_before_done(*caller)
  if kind == "collective-permute":
    groups, group = pairs(x.attributes), 2
  else:
    groups = replica_groups(x.attributes, module.partitions)
    group = groups.shape[1]
  if module.partitions < mesh.devices.size:
    groups = by_slice(mesh)[0][groups]
  named = x.op_name or _nearby_name(*(caller or (computation, x)))
  phase, layer, op = origin(named)
  return Collective(
    kind=kind,
    payload=result,
    count=count,
    group=group,
    groups=groups,
    axes=axes_of(groups, mesh),
    bytes=wire_bytes(kind, group, operands, result),
    asynchronous=asynchronous,
    overlapped=overlapped,
    phase=phase,
    layer=layer,
    op=op,
  )


_TRANSFER = "_xla_megascale_transfer_type"


def _between_slices(mesh: Mesh, computation: Computation, x: Instruction, count: int) -> Collective:
  kind = re.search(_TRANSFER + r'="(\w+)"', x.attributes)[1].lower().replace("_", "-")
  kind = "collective-permute" if kind == "one-to-one" else kind
  key = re.search(r'_xla_host_transfer_rendezvous="[^"]*"', x.attributes)[0]
  receives = [y for y in computation.of("recv") if key in y.attributes]
  groups = by_slice(mesh).T
  group = groups.shape[1]
  given = x.shapes[:1]
  phase, layer, op = origin(_nearby_name(computation, x))
  return Collective(
    kind=kind,
    payload=receives[0].shapes[:1] if receives else given,
    count=count,
    group=group,
    groups=groups,
    axes=axes_of(groups, mesh),
    bytes=wire_bytes(kind, group, given, receives[0].shapes[:1] if receives else given),
    asynchronous=True,
    overlapped=bool(receives) and _work_before_done(computation, receives[0]),
    phase=phase,
    layer=layer,
    op=op,
  )


def wire_bytes(kind: str, group: int, operands: Sequence[Shape], result: Sequence[Shape]) -> int:
  """What one device sends; see the module's table."""
  given, out = (sum(s.bytes for s in x) for x in (operands, result))
  if kind == "collective-permute":
    return given
  if kind == "all-gather":
    return out * (group - 1) // group
  if kind == "all-reduce":
    return 2 * given * (group - 1) // group
  return given * (group - 1) // group


# -- asynchrony ----------------------------------------------------------------------------------

_WORK = ("fusion", "convolution", "dot", "while", "call", "conditional")


def _work_before_done(computation: Computation, start: Instruction) -> bool:
  """Whether the schedule computes anything between a start and its done."""
  working = False
  begun = False
  for x in computation.instructions.values():
    if x is start:
      begun = True
    elif begun and x.opcode.endswith("-done") and start.name in x.operands:
      return working
    elif begun and (
      x.opcode in _WORK or (x.opcode == "custom-call" and "tpu_custom_call" in x.attributes)
    ):
      working = True
  return False


def _fused_overlap(module: Module, start: Instruction) -> bool:
  """Whether fusions that compute carry a started collective along."""
  chain = re.search(r'chain_id="(\d+)"', start.attributes)
  if chain is None:
    return False
  for name in module.fused:
    computation = module.computations[name]
    targets = [y.attributes for y in computation.of("custom-call")]
    if any("AsyncCollectiveStart" in t or "AsyncCollectiveDone" in t for t in targets):
      continue
    if any(chain[0] in x.attributes for x in computation.of(*KINDS)):
      return True
  return False


# -- origin --------------------------------------------------------------------------------------


def _nearby_name(computation: Computation, x: Instruction, hops: int = 4) -> str:
  """The name of ``x``, else of the nearest instruction that feeds it, else of one that it feeds.

  A collective that the compiler put in another's place (an all-reduce for a reduce-scatter, where
  a mesh axis lies along several dimensions of the torus) has lost its own.
  """
  if x.op_name:
    return x.op_name
  users: dict[str, list[str]] = {}
  for y in computation.instructions.values():
    for name in y.operands:
      users.setdefault(name, []).append(y.name)
  for neighbours in (lambda y: y.operands, lambda y: users.get(y.name, ())):
    front = [x]
    for _ in range(hops):
      front = [computation.instructions[n] for y in front for n in neighbours(y)]
      for y in front:
        if y.op_name and y.opcode not in ("parameter", "constant"):
          return y.op_name
  return ""


_NOISE = re.compile(
  r"while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|pjit|custom_vjp_call|"
  r"custom_jvp_call|custom_vjp_call_jaxpr|core_call|remat\d*|branch_\d+_fun|scan|"
  r"\w*\(.*\)|"
  r"(?:jit|jvp|vmap|transpose)\w*"
)


def origin(op_name: str) -> tuple[str, str, str]:
  """``(phase, layer, operation)`` from the path that JAX gives an operation.

  ``jit(step_fn)/transpose(jvp(Decoder))/stack/while/body/block_0/mixer/q/dot_general`` is
  ``("backward", "stack/block_0/mixer/q", "dot_general")``.
  """
  if not op_name:
    return "", "", ""
  parts = op_name.split("/")
  if "rematted_computation" in parts:
    phase = "recompute"
  elif "transpose(" in op_name:
    phase = "backward"
  elif "jvp(" in op_name:
    phase = "forward"
  else:
    phase = "update"
  path = [p for p in parts[:-1] if not _NOISE.fullmatch(p)]
  return phase, "/".join(path), parts[-1]
