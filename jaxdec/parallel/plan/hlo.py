# SPDX-License-Identifier: Apache-2.0
"""Reads optimised HLO text: instructions, and how many times each computation runs.

XLA's own cost analysis counts the body of a ``while`` once. A scan over layers is one, so here
every computation carries the product of the trip counts of the loops around it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_ITEM_BITS = {
  "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
  "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array. ``space`` is XLA's memory space: 0 for HBM, others are on the chip."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without the padding of tiled layouts."""
    bits = _ITEM_BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
    return (self.size * bits + 7) // 8

  def __str__(self):
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction. ``shapes`` are the arrays of its result, a tuple flattened."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str
  root: bool

  @property
  def bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  @property
  def op_name(self) -> str:
    """Where it comes from in the traced program."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  def called(self, key: str) -> list[str]:
    """Computations named by an attribute such as ``calls`` or ``body``."""
    found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
    return re.findall(r"[\w.\-]+", found[1]) if found else []


@dataclasses.dataclass(frozen=True)
class Computation:
  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    return next(x for x in reversed(self.instructions.values()) if x.root)

  def operand(self, instruction: Instruction, index: int) -> Instruction:
    return self.instructions[instruction.operands[index]]

  def of(self, *opcodes: str) -> Iterator[Instruction]:
    return (x for x in self.instructions.values() if x.opcode in opcodes)


@dataclasses.dataclass(frozen=True)
class Module:
  """A program. ``runs`` and ``inside`` are what ``parse`` worked out.

  Attributes:
    partitions: devices.
    runs: computation -> times it runs in one execution. Both branches of a conditional count.
    callers: computation -> the (last) fusion, call or asynchronous start that runs it, and where.
    fused: computations that are the body of a fusion: their values stay on the chip.
    unknown_loops: loops whose trip count could not be read; they count once.
  """

  computations: dict[str, Computation]
  entry: str
  partitions: int
  runs: dict[str, int]
  callers: dict[str, tuple[Computation, Instruction]]
  fused: frozenset[str]
  unknown_loops: tuple[str, ...]


_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%?([\w.\-]+)")
_LINE = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COMMENT = re.compile(r"/\*.*?\*/")


def parse(text: str) -> Module:
  """The module that ``compiled.as_text()`` prints."""
  computations: dict[str, Computation] = {}
  current: dict[str, Instruction] | None = None
  entry = ""
  for line in text.splitlines():
    if current is None:
      if (head := _HEAD.match(line)) is not None:
        current = {}
        computations[head[2]] = Computation(head[2], current)
        entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      current = None
    elif (instruction := _instruction(line)) is not None:
      current[instruction.name] = instruction
  partitions = re.search(r"num_partitions=(\d+)", text[:20000])
  return Module(
    computations, entry, int(partitions[1]) if partitions else 1, *_runs(computations, entry)
  )


def _instruction(line: str) -> Instruction | None:
  start = _LINE.match(line)
  if start is None:
    return None
  # Kernels are embedded in the attributes as megabytes of base64: look no further than needed.
  rest = line[start.end() :]
  end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
  result, rest = rest[:end], rest[end:].lstrip()
  opened = rest.find("(")
  closed = _balanced(rest, opened)
  inner = _COMMENT.sub("", rest[opened + 1 : closed - 1])
  opcode = rest[:opened]
  names = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inner))
  if not names and opcode not in ("constant", "parameter"):  # printed without percent signs
    names = tuple(_NAME.findall(re.sub(r"\w+\[[^\]]*\](\{[^}]*\})?", "", inner)))
  return Instruction(
    start[2], opcode, shapes(result), names, inner, rest[closed:], root=start[1] is not None
  )


def shapes(text: str) -> tuple[Shape, ...]:
  """The arrays in the text of a (tuple) shape, in order."""
  found = []
  for dtype, dims, layout in _SHAPE.findall(_COMMENT.sub("", text)):
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    found.append(Shape(dtype, sizes, int(space[1]) if space else 0))
  return tuple(found)


def _balanced(text: str, start: int) -> int:
  """The index after the parenthesis that closes the one at ``start``."""
  depth = 0
  for found in re.finditer(r"[()]", text[start:]):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return start + found.end()
  return len(text)


# -- how often each computation runs ---------------------------------------------------------------

# The scalar functions of reductions and sorts are no work of their own.
_CALLERS = ("fusion", "call", "conditional", "custom-call", "async-start", "call-start")
_CALLS = ("calls", "branch_computations", "true_computation", "false_computation", "to_apply")


def _runs(computations: dict[str, Computation], entry: str):
  runs = dict.fromkeys(computations, 0)
  callers: dict[str, tuple[Computation, Instruction]] = {}
  fused: set[str] = set()
  unknown: list[str] = []

  def visit(name: str, times: int) -> None:
    here = computations[name]
    runs[name] += times
    for x in here.instructions.values():
      if x.opcode == "while":
        trips = trip_count(computations, here, x)
        if trips is None:
          unknown.append(x.name)
        for body in x.called("body"):
          visit(body, times * (1 if trips is None else trips))
      elif x.opcode in _CALLERS:
        for callee in (c for key in _CALLS for c in x.called(key) if c in computations):
          callers[callee] = here, x
          if x.opcode == "fusion":
            fused.add(callee)
          visit(callee, times)

  visit(entry, 1)
  return runs, callers, frozenset(fused), tuple(dict.fromkeys(unknown))


def trip_count(
  computations: dict[str, Computation], caller: Computation, loop: Instruction
) -> int | None:
  """Trips of a ``while``: XLA's annotation, else read from a counter compared with a constant.

  The compilers of CPUs and GPUs annotate (``known_trip_count``), that of TPUs doesn't.
  """
  known = re.search(r'known_trip_count[^}]*?"n":\s*"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  try:
    condition = computations[loop.called("condition")[0]]
    body = computations[loop.called("body")[0]]
    test = condition.root
    initial = caller.operand(loop, 0)

    def outside(index: int) -> int:
      return _constant(caller, caller.operand(initial, index))

    def value(x: Instruction) -> int | None:
      """A number of the condition; None for the counter itself, whose index goes to ``counter``."""
      x = _through_copies(condition, x)
      if x.opcode == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", x.attributes)[1])
        if _step(body, index):
          counter.append(index)
          return None
        return outside(index)
      return _constant(condition, x)

    counter: list[int] = []
    if test.opcode == "fusion":  # the comparison, alone in a fusion of its parameters
      inside = computations[test.called("calls")[0]]
      order = [int(inside.operand(inside.root, i).literal) for i in (0, 1)]
      left, right = (value(condition.operand(test, i)) for i in order)
      test = inside.root
    else:
      left, right = value(condition.operand(test, 0)), value(condition.operand(test, 1))
    direction = re.search(r"direction=(\w+)", test.attributes)[1]
    start, step = outside(counter[0]), _step(body, counter[0])
  except (KeyError, IndexError, TypeError, ValueError, StopIteration):
    return None
  if left is None and right is not None and direction in ("LT", "LE", "NE") and step > 0:
    return max(0, -(-(right + (direction == "LE") - start) // step))
  if left is None and right is not None and direction in ("GT", "GE") and step < 0:
    return max(0, -(-(start + (direction == "GE") - right) // -step))
  return None


def _through_copies(where: Computation, x: Instruction) -> Instruction:
  while x.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
    x = where.operand(x, 0)
  return x


def _constant(where: Computation, x: Instruction) -> int:
  x = _through_copies(where, x)
  if x.opcode != "constant":
    raise ValueError(x.opcode)
  return int(re.sub(r"[{}\s]", "", x.literal))


def _step(body: Computation, index: int) -> int | None:
  """What a trip adds to an element of the loop's tuple; None for any other than a counter."""
  if body.root.opcode != "tuple":
    return None
  x = _through_copies(body, body.operand(body.root, index))
  if x.opcode not in ("add", "subtract"):
    return None
  parts = [_through_copies(body, body.operand(x, i)) for i in (0, 1)]
  own = [p for p in parts if p.opcode == "get-tuple-element"]
  constant = [p for p in parts if p.opcode == "constant"]
  if len(own) != 1 or len(constant) != 1 or f"index={index}" not in own[0].attributes:
    return None
  step = int(constant[0].literal)
  return -step if x.opcode == "subtract" else step
