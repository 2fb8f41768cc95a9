# SPDX-License-Identifier: Apache-2.0
"""One way to choose an implementation, for every op.

``implementation`` is ``"auto"``, a name, or a sequence of names tried in order:

* ``"auto"`` takes the best implementation for the platform and always ends in plain XLA.
* a name fails loudly: ``NotImplementedError`` says which condition failed and what to use.
* a sequence takes the first that can run; if none can, an ``ExceptionGroup`` holds every reason.

A backend module refuses by raising ``Unsupported(reason)``, at trace time and before it does work.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.manual import vary_alike

NAMES = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")
_AUTO = {"tpu": ("mosaic_tpu", "xla"), "gpu": ("mosaic_gpu", "xla")}


class Unsupported(NotImplementedError):
  """This implementation can't run this call; the message says why, in one sentence."""


@dataclasses.dataclass(frozen=True)
class Target:
  """What programs are traced for: a platform, its generation, and whether kernels are interpreted.

  ``generation`` (``"v5e"``, ...) only guides block sizes; None: this machine's.
  """

  platform: str
  generation: str | None = None
  interpret: Any = False


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target(
  platform: str, *, generation: str | None = None, interpret: Any = False
) -> Iterator[None]:
  """Traces programs for ``platform`` (``"cpu"``, ``"gpu"``, ``"tpu"``) whatever this machine has.

  For compiling ahead of time for a TPU on a laptop, and with ``interpret=True`` (or
  ``pltpu.InterpretParams(...)``) for running TPU kernels on a CPU. It acts where an op is traced:
  a function that was jitted and traced outside of it stays as it was.
  """
  if platform not in ("cpu", "gpu", "tpu"):
    raise ValueError(f"target: platform is 'cpu', 'gpu' or 'tpu', got {platform!r}.")
  token = _target.set(Target(platform, generation, interpret))
  try:
    yield
  finally:
    _target.reset(token)


def current_target() -> Target:
  """The target set by ``target``, else the platform of jax's default device."""
  if (chosen := _target.get()) is not None:
    return chosen
  device = jax.config.jax_default_device
  platform = getattr(device, "platform", device) or jax.default_backend()
  return Target({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform))


def require_tpu(op: str) -> Any:
  """For a ``mosaic_tpu`` backend: the interpret flag to use, or ``Unsupported`` off a TPU."""
  now = current_target()
  if now.platform != "tpu":
    raise Unsupported(
      f"{op}: mosaic_tpu runs on TPUs and this program is traced for {now.platform!r}; use "
      "implementation='xla', or pallas_kernels.target('tpu', interpret=True) to interpret it."
    )
  return now.interpret


@dataclasses.dataclass(frozen=True)
class Op:
  """The implementations of one op, imported when first asked for.

  Attributes:
    name: the public name.
    package: the package with one module per implementation; each has a function ``name``.
    configs: name of implementation -> class of its block sizes (those that have any).
  """

  name: str
  package: str
  configs: Mapping[str, type] = dataclasses.field(default_factory=dict)

  def function(self, implementation: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{self.package}.{implementation}"), self.name)

  def __call__(
    self, *args: Any, implementation: str | Sequence[str] = "auto", config: Any = None, **kwargs
  ) -> Any:
    """Runs the first implementation that accepts the call."""
    names = self._candidates(implementation, config)
    args = vary_alike(*args)  # a default, such as a state of zeros, is of the inputs' type
    refusals: list[Exception] = []
    for name in names:
      mine = self.configs.get(name)
      try:
        own = config if mine is not None and isinstance(config, mine) else None
        return self.function(name)(*args, config=own, **kwargs)
      except Unsupported as refusal:
        if len(names) == 1:
          raise
        refusals.append(refusal)
    raise ExceptionGroup(f"{self.name}: none of {', '.join(names)} can run this call", refusals)

  def _candidates(self, implementation: str | Sequence[str], config: Any) -> tuple[str, ...]:
    if isinstance(implementation, str) and implementation == "auto":
      names = _AUTO.get(current_target().platform, ("xla",))
      if config is not None:  # block sizes belong to one implementation, and so choose it
        names = tuple(n for n in NAMES if isinstance(config, self.configs.get(n, ())))
    else:
      names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
      if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
          f"{self.name}: unknown implementation {name!r}{hint}; use 'auto' or one or more of "
          f"{', '.join(NAMES)}."
        )
    if config is not None and not any(isinstance(config, self.configs.get(n, ())) for n in names):
      known = ", ".join(f"{_path(c)} ({n})" for n, c in self.configs.items()) or "none"
      raise ValueError(
        f"{self.name}: config {_path(type(config))} is for none of the implementations asked for "
        f"({', '.join(names) or implementation}); the configs of this op are: {known}."
      )
    return names


def _path(cls: type) -> str:
  """With its module: every op has an ``XLAConfig``."""
  return f"{cls.__module__}.{cls.__qualname__}"
