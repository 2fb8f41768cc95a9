# SPDX-License-Identifier: Apache-2.0
"""Who gets the tokens of a step: chunked prefill that never stalls a decoding request.

One step may compute ``budget`` tokens. The rules, all deterministic and on the host:

1. every decoding slot takes ``width`` tokens (1, or the nodes of a draft tree);
2. the prompt that is being read takes whole chunks of what is left, until it is read;
3. then the next of the queue, first come first served, if a slot is free.

``budget >= slots * width + chunk``: the decoding slots always fit, and so does a chunk; nobody
starves. A chunk that a prompt fills in part is charged whole: that is what it computes. At most one
prompt is partly read between steps, because the oldest is read to its end first.

Source: Sarathi-Serve (arXiv 2403.02310, Algorithm 3). Of its rules those on pages are not here: a
slot holds ``capacity`` positions from the start, so nothing is ever preempted.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class Reading:
  """A prompt on its way into a slot: ``done`` of its ``length`` tokens are read."""

  id: int
  slot: int
  length: int
  done: int


@dataclasses.dataclass(frozen=True)
class Chunk:
  """``count`` tokens from ``start`` on of the prompt of request ``id``.

  ``first``: the prompt's first chunk (it may start behind tokens that needn't be read); ``last``:
  its last one, after which the request sits in ``slot``.
  """

  id: int
  slot: int
  start: int
  count: int
  first: bool
  last: bool


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one step computes: ``decode``, the slots that take a pass; then ``chunks``, in order."""

  decode: tuple[int, ...]
  chunks: tuple[Chunk, ...]
  tokens: int  # charged, at most the budget


class Scheduler:
  """The queue, the slots and the rules of the module's docstring.

  Args:
    slots, width, chunk, budget: see there. queue: how many may wait.
    skip: ``skip(id, slot) -> n``: tokens of the prompt that need not be read (n < its length),
      asked when a request gets a slot.
  """

  def __init__(
    self,
    *,
    slots: int,
    width: int,
    chunk: int,
    budget: int,
    queue: int,
    skip: Callable[[int, int], int] = lambda id, slot: 0,
  ):
    if budget < slots * width + chunk:
      raise ValueError(f"budget {budget} < slots {slots} * width {width} + chunk {chunk}")
    self.width, self.chunk, self.budget, self.bound, self._skip = width, chunk, budget, queue, skip
    self.queue: collections.OrderedDict[int, int] = collections.OrderedDict()  # id -> length
    self.free: collections.deque[int] = collections.deque(range(slots))  # longest free first
    self.decoding: dict[int, int] = {}  # slot -> id, oldest first
    self.reading: Reading | None = None

  @property
  def full(self) -> bool:
    return len(self.queue) >= self.bound

  @property
  def idle(self) -> bool:
    return not self.queue and not self.decoding and self.reading is None

  def submit(self, id: int, length: int) -> None:
    """Puts a request of ``length`` prompt tokens at the end of the queue."""
    if self.full:
      raise ValueError(f"the queue holds {self.bound} requests, its bound")
    self.queue[id] = length

  def release(self, id: int) -> int | None:
    """Forgets a finished or cancelled request, wherever it is; returns the slot it decoded in."""
    if self.queue.pop(id, None) is not None:
      return None
    if self.reading is not None and self.reading.id == id:
      self.free.appendleft(self.reading.slot)
      self.reading = None
      return None
    slot = next(slot for slot, other in self.decoding.items() if other == id)
    del self.decoding[slot]
    self.free.append(slot)
    return slot

  def plan(self) -> Plan:
    """The next step. Prompts that it reads to their end decode from the step after it on."""
    decode = tuple(self.decoding)
    used, chunks = self.width * len(decode), []
    while used + self.chunk <= self.budget:
      first = self.reading is None
      if first and not (self.queue and self.free):
        break
      if first:
        id, length = self.queue.popitem(last=False)
        slot = self.free.popleft()
        self.reading = Reading(id, slot, length, self._skip(id, slot))
      r = self.reading
      count = min(self.chunk, r.length - r.done)
      last = r.done + count == r.length
      chunks.append(Chunk(r.id, r.slot, r.done, count, first, last))
      used, r.done = used + self.chunk, r.done + count
      if last:
        self.decoding[r.slot], self.reading = r.id, None
    return Plan(decode, tuple(chunks), used)
