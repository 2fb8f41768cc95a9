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
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

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
      if kind in KINDS:
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
    groups, group = _pairs(x.attributes), 2
  else:
    groups = replica_groups(x.attributes, module.partitions)
    group = groups.shape[1]
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


# -- groups and mesh axes --------------------------------------------------------------------------

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


def _pairs(attributes: str) -> np.ndarray:
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
