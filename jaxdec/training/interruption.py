# SPDX-License-Identifier: Apache-2.0
"""What makes a run stop and go on: signals, and data that knows where it is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np


class Stop:
  """Turns SIGTERM and the first Ctrl-C into a request to stop after the step under way.

  With several processes, all must stop after the same step, so JAX's preemption service decides
  (``jax.distributed.initialize`` has it listen for SIGTERM) and no handler is set here.
  """

  def __enter__(self) -> Stop:
    self._asked = False
    self._old = {}
    # Signal handlers belong to the main thread; elsewhere (a notebook's worker) none is set.
    main = threading.current_thread() is threading.main_thread()
    if main and jax.process_count() == 1:
      for name in (signal.SIGTERM, signal.SIGINT):
        self._old[name] = signal.signal(name, self._ask)
    return self

  def _ask(self, number, frame):
    del frame
    if number == signal.SIGINT and self._asked:
      raise KeyboardInterrupt
    self._asked = True

  def requested(self, step: int) -> bool:
    """Whether to stop after ``step``; the same answer on every process."""
    if jax.process_count() == 1:
      return self._asked
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def __exit__(self, *unused):
    for name, handler in self._old.items():
      signal.signal(name, handler)


class Replayable:
  """Gives a plain iterable a position: how many batches were read."""

  def __init__(self, data: Iterable[Mapping[str, np.ndarray]]):
    self._data, self._iterator, self._read = data, None, 0

  def __iter__(self) -> Iterator:
    return self

  def __next__(self):
    if self._iterator is None:
      self._iterator = iter(self._data)
    batch = next(self._iterator)
    self._read += 1
    return batch

  def get_state(self) -> dict[str, int]:
    return {"read": self._read}

  def set_state(self, state: Mapping[str, int]) -> None:
    self._iterator, self._read = iter(self._data), 0
    for _ in range(int(state["read"])):
      next(self)
