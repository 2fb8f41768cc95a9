# SPDX-License-Identifier: Apache-2.0
"""A profiler trace of a few steps, for XProf or Perfetto (``jax.profiler``)."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax


class ProfileWindow:
  """Traces the steps ``start <= step < stop`` of a run; a context manager.

  The device is idle when the trace begins and when it ends, so the trace holds these steps and no
  others. Only the first process writes one.

  Args:
    window: ``(start, stop)``, steps counted from 1; None: never.
    folder: where the trace goes.
  """

  def __init__(self, window: tuple[int, int] | None, folder: pathlib.Path | None):
    self._window = window if jax.process_index() == 0 else None
    self._folder, self._last, self._tracing = folder, None, False

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[list[Any]]:
    """Around one step; what is put into the list is waited for at the window's edges."""
    if self._window is None:
      yield []
      return
    start, stop = self._window
    # A run resumed inside its window traces what is left of it.
    if start <= step < stop and not self._tracing:
      jax.block_until_ready(self._last)
      jax.profiler.start_trace(str(self._folder))
      self._tracing = True
    result: list[Any] = []
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      yield result
    self._last = result
    if self._tracing and step + 1 >= stop:
      self._stop()

  def _stop(self) -> None:
    jax.block_until_ready(self._last)
    jax.profiler.stop_trace()
    self._tracing, self._window, self._last = False, None, None

  def __enter__(self) -> ProfileWindow:
    return self

  def __exit__(self, *unused) -> None:
    if self._tracing:  # the run ended inside the window
      self._stop()
