# SPDX-License-Identifier: Apache-2.0
"""Drafters by name: what ``generate(drafter=...)`` and the command line accept."""

from __future__ import annotations

from collections.abc import Callable

from jaxdec.drafting.base import Drafter
from jaxdec.errors import UserError, nearest

_FACTORIES: dict[str, Callable[[], Drafter | None]] = {}


def register(name: str, factory: Callable[..., Drafter | None]) -> None:
  """Adds a built-in drafter; ``factory(**options)`` makes one, defaults included."""
  _FACTORIES[name] = factory


def names() -> tuple[str, ...]:
  """Names that ``get`` knows, in order of registration."""
  return tuple(_FACTORIES)


def get(spec: str | Drafter | None, **options) -> Drafter | None:
  """The drafter meant by ``spec``: an object (returned as it is), a name, or None / ``"none"``.

  Raises:
    UserError: unknown name (the nearest one is suggested) or an option the drafter doesn't have.
  """
  if spec is None or isinstance(spec, Drafter):
    return spec
  if not isinstance(spec, str):
    raise UserError(f"drafter must be a name or a Drafter object, got {type(spec).__name__}")
  if spec not in _FACTORIES:
    raise UserError(
      f"unknown drafter {spec!r}{nearest(spec, _FACTORIES)}; known: {', '.join(_FACTORIES)}"
    )
  try:
    return _FACTORIES[spec](**options)
  except TypeError as error:
    raise UserError(
      f"drafter {spec!r} can't be built by name from options {options or 'none'}: {error}"
    ) from error
