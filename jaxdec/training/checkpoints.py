# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoints: parameters, optimizer state and the position in the data, saved as one.

Layout: ``<work_dir>/checkpoints/<step>/{params, optimizer, ema, memory, data}``, ``ema`` and
``memory`` (the task's) only where there is one. A step appears under its final name only when all
of it is written, so an interrupted save leaves the previous one untouched.
"""

from __future__ import annotations

import base64
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.errors import UserError
from jaxdec.parallel.distributed import gather_texts


def _orbax():
  """Orbax v1, from where this version of Orbax keeps it; imported on first use (seconds)."""
  try:
    import orbax.checkpoint.v1 as ocp
  except ImportError:
    import orbax.checkpoint.experimental.v1 as ocp
  return ocp


def encode_state(state: Any) -> str:
  """An iterator state (bytes or JSON-able) as text."""
  if isinstance(state, bytes):
    return json.dumps({"bytes": base64.b64encode(state).decode()})
  return json.dumps({"json": state})


def decode_state(text: str) -> Any:
  """The inverse of ``encode_state``."""
  item = json.loads(text)
  return base64.b64decode(item["bytes"]) if "bytes" in item else item["json"]


def gather_states(text: str) -> list[str]:
  """Every process's text, in process order; one entry where all agree."""
  texts = gather_texts(text)
  return texts[:1] if len(set(texts)) == 1 else texts


def own_state(states: list[str]) -> Any:
  """This process's iterator state out of a checkpoint's list.

  Raises:
    UserError: the states differ by process and the number of processes has changed.
  """
  if len(states) == 1:
    return decode_state(states[0])
  if len(states) != jax.process_count():
    raise UserError(
      f"the checkpoint holds the data position of {len(states)} processes, and this run has "
      f"{jax.process_count()}; resume it on {len(states)} processes"
    )
  return decode_state(states[jax.process_index()])


@jax.jit
def _copy(tree: Any) -> Any:
  return jax.tree.map(jnp.copy, tree)


class Checkpoints:
  """Saves and restores the checkpoints of one run; a context manager."""

  def __init__(self, directory: pathlib.Path, *, keep: int = 2):
    ocp = _orbax()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    context = ocp.Context()
    context.checkpointables.registry = registry
    self._manager = ocp.training.Checkpointer(
      directory,
      context=context,
      # The trainer alone decides when to save; every call of ``save`` saves.
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )

  @property
  def latest(self) -> int | None:
    """Last completely saved step; None where there is none."""
    latest = self._manager.latest
    return None if latest is None else latest.step

  def save(self, step: int, state: dict[str, Any], data: Any) -> None:
    """Saves in the background; returns once the arrays may be overwritten (donated).

    Args:
      state: trees of arrays by name. data: this process's iterator state.
    """
    if self.latest == step:
      return
    if jax.default_backend() == "cpu":
      # A host copy of a CPU array may be the array itself, which the next step overwrites.
      state = _copy(state)
    position = {"states": gather_states(encode_state(data))}
    self._manager.save_checkpointables_async(step, {**state, "data": position}, force=True)

  def restore(self, step: int, state: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The trees of ``save``, and this process's iterator state, at ``step``.

    Args:
      state: abstract trees by name (``ShapeDtypeStruct`` with shardings).
    """
    loaded = self._manager.load_checkpointables(step, {**state, "data": None})
    return {name: loaded[name] for name in state}, own_state(loaded["data"]["states"])

  def close(self) -> None:
    """Waits for the save under way."""
    self._manager.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *unused) -> None:
    self.close()


def load_params(work_dir: str | pathlib.Path, step: int | None = None, *, ema: bool = False) -> Any:
  """The trained parameters of a run, as host arrays.

  Args:
    work_dir: the run's folder. step: which checkpoint; None: the last.
    ema: their average (``TrainerConfig.ema``) instead.

  Raises:
    UserError: no such folder, no such checkpoint in it, or no average in that.
  """
  root = pathlib.Path(work_dir).absolute()
  folder = root / "checkpoints"
  if not root.is_dir():
    raise UserError(f"no folder {str(work_dir)!r}; give the work_dir of a finished training run")
  steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
  if not steps or (step is not None and step not in steps):
    what = "no checkpoint" if not steps else f"no checkpoint of step {step}, only of {steps}"
    raise UserError(f"{str(work_dir)!r} holds {what}; give the work_dir of a training run")
  ocp = _orbax()
  path = folder / str(steps[-1] if step is None else step)
  name = "ema" if ema else "params"
  saved = ocp.checkpointables_metadata(path).metadata
  if name not in saved:
    raise UserError(
      f"{str(work_dir)!r} was trained without ema and holds no average; load it with ema=False, or "
      "train with TrainerConfig(ema=0.999)"
    )
  # Asked for as NumPy arrays, so that the mesh it was saved from need not exist here.
  abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), saved[name])
  return ocp.load_checkpointables(path, {name: abstract})[name]
