# SPDX-License-Identifier: Apache-2.0
"""Steps whose loss or gradients are not finite: found on the device, and never kept.

The compiled step itself puts the old state back, bit for bit, so a bad step cannot reach the next
one, nor a checkpoint. The host learns of it one step late, from a few bytes that are on their way
while the next step runs, and then stops (``nan_policy="stop"``) or goes on (``"skip"``).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxdec.errors import UserError
from jaxdec.parallel.rules import path_name


@struct.dataclass
class Health:
  """How a step went. ``bad``: one flag per gradient leaf, in the order of the tree's leaves."""

  finite: jax.Array
  loss: jax.Array
  grad_norm: jax.Array
  bad: jax.Array


def examine(loss: jax.Array, gradients: Any) -> Health:
  """Whether loss and gradient norm are finite; the norm is over all leaves, in float32."""
  squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients)]
  norm = jnp.sqrt(sum(squares))
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  return Health(finite, loss, norm, ~jnp.isfinite(jnp.stack(squares)))


def keep_if(finite: jax.Array, new: Any, old: Any) -> Any:
  """``new`` after a step that went well, else ``old``, bit for bit."""
  return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)


@jax.jit
def _bad(tree: Any) -> list[jax.Array]:
  return [~jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]


class Guard:
  """Judges each step once its successor is under way.

  Args:
    policy: ``stop`` or ``skip``. max_skips: how many steps in a row may be skipped.
    params: the tree that names the leaves.
  """

  def __init__(self, policy: Literal["stop", "skip"], max_skips: int, params: Any):
    self._policy, self._max_skips = policy, max_skips
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    self._names = [path_name(path) for path, _ in paths]
    self._pending: tuple[int, Health] | None = None
    self._in_a_row = 0

  def add(self, step: int, health: Health, params: Any) -> None:
    """Judges the step before this one.

    Args:
      params: the newest parameters; read only to name what is wrong.

    Raises:
      UserError: a step that was not finite, under ``stop`` or once too often.
    """
    for leaf in jax.tree.leaves(health):
      leaf.copy_to_host_async()
    self.flush(params)
    self._pending = (step, health)

  def flush(self, params: Any) -> None:
    """Judges the last step too; waits for it."""
    if self._pending is None:
      return
    (step, health), self._pending = self._pending, None
    if bool(np.asarray(health.finite)):
      self._in_a_row = 0
      return
    self._in_a_row += 1
    if self._policy == "skip" and self._in_a_row <= self._max_skips:
      return
    raise UserError(self._sentence(step, jax.device_get(health), params))

  def _sentence(self, step: int, health: Health, params: Any) -> str:
    parts = [f"step {step}: the loss is {float(health.loss):.6g}"]
    wrong = [name for name, bad in zip(self._names, jax.device_get(_bad(params))) if bad]
    if wrong:
      parts.append(f"the parameter {_first(wrong, self._names)} is not finite")
    else:
      wrong = [name for name, bad in zip(self._names, health.bad) if bad]
      if wrong:
        parts.append(f"the gradient of {_first(wrong, self._names)} is not finite")
    if self._policy == "skip":
      parts.append(f"{self._in_a_row} steps in a row were like it (max_skips={self._max_skips})")
    advice = "lower the learning rate or clip harder, and resume from the last checkpoint"
    if self._policy == "stop":
      advice += "; nan_policy='skip' leaves such steps out"
    return f"{', '.join(parts)}; {advice}"


def _first(wrong: list[str], names: list[str]) -> str:
  more = f" (and {len(wrong) - 1} more of {len(names)})" if len(wrong) > 1 else ""
  return f"{wrong[0]!r}{more}"
