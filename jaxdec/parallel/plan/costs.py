# SPDX-License-Identifier: Apache-2.0
"""FLOPs and HBM bytes of one execution on one device, with loops counted as often as they run.

XLA's ``cost_analysis()`` counts a ``while`` body once and sees a Pallas kernel only through the
cost estimate that the kernel passes on; here both are multiplied by the trips of the loops around.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from jaxdec.parallel.plan.hlo import Computation, Instruction, Module, Shape


@dataclasses.dataclass(frozen=True)
class Costs:
  """Of one device, for one execution.

  Attributes:
    flops: of matrix products and kernels; elementwise work is not counted.
    kernel_flops: the part that Pallas kernels claim.
    bytes: between HBM and the chip, operands and results of every fused operation.
    kernels: names and runs of Pallas kernels. unpriced: those without a cost estimate.
  """

  flops: int
  kernel_flops: int
  bytes: int
  kernels: dict[str, int]
  unpriced: tuple[str, ...]


def costs(module: Module) -> Costs:
  """Counts the whole program."""
  flops = kernel_flops = moved = 0
  kernels: dict[str, int] = {}
  unpriced = []
  for computation in module.computations.values():
    runs = module.runs[computation.name]
    if not runs:
      continue
    for x in computation.instructions.values():
      if x.opcode == "convolution":
        flops += runs * convolution_flops(computation, x)
      elif x.opcode == "dot":
        flops += runs * dot_flops(computation, x)
      elif x.opcode == "custom-call" and '"tpu_custom_call"' in x.attributes:
        kernels[_kernel(x)] = kernels.get(_kernel(x), 0) + runs
        estimate = _estimate(x)
        if estimate is None:
          unpriced.append(_kernel(x))
        else:
          kernel_flops += runs * estimate[0]
      if computation.name not in module.fused:
        moved += runs * hbm_bytes(module, computation, x)
  return Costs(flops + kernel_flops, kernel_flops, moved, kernels, tuple(dict.fromkeys(unpriced)))


def _kernel(x: Instruction) -> str:
  """A kernel's name without the number and the transformations that XLA's name carries."""
  name = re.sub(r"\.\d+$", "", x.name)
  while wrapped := re.fullmatch(r"(?:jvp|transpose|vmap|checkpoint)_+(.+?)_+", name):
    name = wrapped[1]
  return name


def _estimate(x: Instruction) -> tuple[int, int] | None:
  found = re.search(r'"cost_estimate":\{([^}]*)\}', x.attributes)
  if found is None:
    return None
  numbers = dict(re.findall(r'"(\w+)":"?(\d+)"?', found[1]))
  return int(numbers.get("flops", 0)), int(numbers.get("bytes_accessed", 0))


def dot_flops(computation: Computation, x: Instruction) -> int:
  """2 x outputs x contracted length."""
  left = computation.operand(x, 0).shapes[0]
  dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
  contracted = [left.dims[int(d)] for d in dims[1].split(",") if d] if dims else []
  return 2 * x.shapes[0].size * math.prod(contracted)


def convolution_flops(computation: Computation, x: Instruction) -> int:
  """2 x multiply-adds that fall inside; TPU programs write matrix products as convolutions.

  Batch dimensions become spatial ones, dilated or padded so that most of the window lies outside
  (``window={size=2 pad=1_1}`` over two matrices): only positions inside are work.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
  kernel = computation.operand(x, 1).shapes[0]
  given, out = computation.operand(x, 0).shapes[0], x.shapes[0]
  window = _window(x.attributes)
  total = 2 * out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")]
  total *= kernel.dims[labels[2].index("i")]
  for d in range(sum(c.isdigit() for c in labels[2])):
    at = str(d)
    total *= _inside(
      given.dims[labels[1].index(at)],
      kernel.dims[labels[2].index(at)],
      out.dims[labels[3].index(at)],
      *(window.get(key, default)[d] if key in window else default[0] for key, default in _WINDOW),
    )
  return total


_WINDOW = (("stride", (1,)), ("pad", (0,)), ("lhs_dilate", (1,)), ("rhs_dilate", (1,)))


def _window(attributes: str) -> dict[str, list[int]]:
  """Numbers a dimension; of padding the low side."""
  text = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(f.split("=") for f in text[1].split()) if text else {}
  return {key: [int(v.split("_")[0]) for v in value.split("x")] for key, value in fields.items()}


def _inside(size: int, kernel: int, out: int, stride: int, pad: int, base: int, window: int) -> int:
  """(output, kernel) positions that meet a real input element, along one dimension."""
  if kernel == 1 and base == 1 and pad == 0:
    return out
  starts = np.arange(out, dtype=np.int64)[:, None] * stride - pad
  place = starts + np.arange(kernel, dtype=np.int64)[None] * window
  return int(((place >= 0) & (place % base == 0) & (place // base < size)).sum())


# -- bytes ---------------------------------------------------------------------------------------

_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional",
  "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "async-done",
  "async-update", "add-dependency",
}  # fmt: skip


def hbm_bytes(module: Module, computation: Computation, x: Instruction) -> int:
  """Reads and writes of HBM by one instruction; values placed on the chip are free.

  Of an array that is only sliced, the slice counts, and of one that is updated in place the update:
  a scan's stacked weights are not read whole in every trip.
  """
  if x.opcode in _FREE or x.opcode.endswith("-done"):
    return 0
  if x.opcode == "custom-call":
    estimate = _estimate(x)
    if estimate is not None:
      return estimate[1]
    if '"tpu_custom_call"' not in x.attributes:
      return 0  # allocations and markers
  if x.opcode == "fusion":
    return _fusion_bytes(module.computations[x.called("calls")[0]], computation, x)
  operands = [s for name in x.operands for s in computation.instructions[name].shapes]
  if x.opcode == "dynamic-slice":
    return 2 * _hbm(x.shapes)
  if x.opcode == "dynamic-update-slice":
    return 2 * _hbm(computation.operand(x, 1).shapes)
  if x.opcode.endswith("-start"):  # (destination, source, ...): the copies between the two
    return _hbm(x.shapes)
  return _hbm(operands) + _hbm(x.shapes)


def _hbm(shapes: tuple[Shape, ...] | list[Shape]) -> int:
  return sum(s.bytes for s in shapes if s.space == 0)


def _fusion_bytes(body: Computation, computation: Computation, x: Instruction) -> int:
  users: dict[str, list[Instruction]] = {}
  for y in body.instructions.values():
    for name in y.operands:
      users.setdefault(name, []).append(y)

  def read(name: str, whole: int) -> int:
    """Bytes of a value that its users touch, up to ``whole``."""
    total = 0
    for user in users.get(name, ()):
      if user.opcode in ("bitcast", "copy") and user is not body.root:
        total += read(user.name, whole)
      elif user.opcode == "dynamic-slice" and user.operands[0] == name:
        total += user.bytes
      elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        pass  # the rest of the array stays where it is
      else:
        return whole
    return min(total, whole)

  total = 0
  parameters = {int(y.literal): y for y in body.of("parameter")}
  for index, name in enumerate(x.operands):
    given = computation.instructions[name].shapes
    if len(given) == 1 and given[0].space == 0 and index in parameters:
      total += read(parameters[index].name, given[0].bytes)
  roots = [body.root]
  if body.root.opcode == "tuple":
    roots = [body.instructions[name] for name in body.root.operands]
  aliased = {int(i) for i in re.findall(r"\{(\d+)\}: \(\d+, \{\}\)", x.attributes)}
  for index, (root, shape) in enumerate(zip(roots, x.shapes)):
    if shape.space != 0 or (index in aliased and root.opcode == "parameter"):
      continue
    while root.opcode in ("bitcast", "copy") and root.operands:
      root = body.operand(root, 0)
    if root.opcode == "dynamic-update-slice":
      total += body.operand(root, 1).bytes
    else:
      total += shape.bytes
  return total
