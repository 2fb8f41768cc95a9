# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: how they find each other, and how they end together.

``initialize`` comes first in a program, before any array exists. Where the processes and the first
of them are found:

- *Cloud TPU* (TPU VMs, GKE): asked of the machine, nothing to set;
- *SLURM*, under ``srun`` with more than one task: from SLURM's variables, nothing to set;
- *explicitly*: ``coordinator``, ``num_processes`` and ``process_id``, as arguments or in the
  environment (``JAXDEC_COORDINATOR``, ``JAXDEC_NUM_PROCESSES``, ``JAXDEC_PROCESS_ID``, or JAX's
  ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``);
- nothing of that: one process, and nothing is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jaxdec.errors import UserError

Launch = Literal["none", "explicit", "slurm", "cloud_tpu"]

# Setting -> the variables it may stand in, the first one found counts.
VARIABLES = {
  "coordinator": ("JAXDEC_COORDINATOR", "JAX_COORDINATOR_ADDRESS"),
  "num_processes": ("JAXDEC_NUM_PROCESSES", "JAX_NUM_PROCESSES"),
  "process_id": ("JAXDEC_PROCESS_ID", "JAX_PROCESS_ID"),
  "start_timeout": ("JAXDEC_START_TIMEOUT",),
  "heartbeat_timeout": ("JAXDEC_HEARTBEAT_TIMEOUT",),
}


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """How the processes of a run find each other; None: from the environment.

  Attributes:
    coordinator: ``host:port`` of process 0. num_processes: of the whole run. process_id: which of
      them this is, from 0.
    start_timeout: seconds in which all processes must have come; 300 by default.
    heartbeat_timeout: seconds after which a silent process counts as dead and the others end
      themselves; 100 by default. Longer than any pause of a healthy process.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  start_timeout: int | None = None
  heartbeat_timeout: int | None = None

  def resolve(self, environ: Mapping[str, str] | None = None) -> DistributedConfig:
    """The same with what is missing taken from the environment.

    Raises:
      UserError: a value that can't be, or only some of the three settings of an explicit start
        where neither SLURM nor Cloud TPU knows the others.
    """
    environ = os.environ if environ is None else environ
    found: dict[str, Any] = {}
    for name, variables in VARIABLES.items():
      value = getattr(self, name)
      variable = next((v for v in variables if environ.get(v)), None)
      if value is None and variable is not None:
        value = environ[variable]
        if name != "coordinator":
          if not value.isdecimal():
            raise UserError(f"{variable} must be a whole number, got {value!r}")
          value = int(value)
      found[name] = value
    settings = DistributedConfig(**{"start_timeout": 300, "heartbeat_timeout": 100, **{
      name: value for name, value in found.items() if value is not None}})  # fmt: skip
    settings._check(environ)
    return settings

  def _check(self, environ: Mapping[str, str]) -> None:
    explicit = {"coordinator": self.coordinator, "num_processes": self.num_processes,
                "process_id": self.process_id}  # fmt: skip
    missing = [name for name, value in explicit.items() if value is None]
    if 0 < len(missing) < 3 and detect(environ) == "none":
      flags = [f"--{name.replace('_', '-')} (or {VARIABLES[name][0]})" for name in missing]
      given = ", ".join(name for name in explicit if name not in missing)
      raise UserError(
        f"several processes need coordinator, num_processes and process_id, got only {given}; "
        f"give {' and '.join(flags)} too, or none of them for one process"
      )
    host, _, port = (self.coordinator or "h:1").rpartition(":")
    if not host or not port.isdecimal():
      raise UserError(
        f"coordinator is written host:port, such as 10.0.0.2:1234, got {self.coordinator!r}"
      )
    count, index = self.num_processes, self.process_id
    if count is not None and count < 1:
      raise UserError(f"num_processes must be at least 1, got {count}")
    if index is not None and not 0 <= index < (count or index + 1):
      raise UserError(
        f"process_id must be in 0..{(count or 1) - 1} (num_processes={count}), got {index}"
      )
    for name in ("start_timeout", "heartbeat_timeout"):
      if getattr(self, name) < 1:
        raise UserError(f"{name} must be at least 1 second, got {getattr(self, name)}")


def detect(environ: Mapping[str, str] | None = None) -> Launch:
  """``slurm`` or ``cloud_tpu`` where one of them can tell who the processes are, else ``none``."""
  environ = os.environ if environ is None else environ
  # Read by JAX too: all of them are there only in a step started by srun.
  names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
  slurm = [environ.get(f"SLURM_{name}") for name in names]
  if all(slurm) and int(environ["SLURM_NTASKS"]) > 1:
    return "slurm"
  if "tpu" not in (environ.get("JAX_PLATFORMS") or "tpu") or not _on_tpu_vm():
    return "none"
  # Hosted notebooks name one worker, themselves; TPU VMs outside GKE name none here.
  several = "," in environ.get("TPU_WORKER_HOSTNAMES", ",")
  several |= int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
  return "cloud_tpu" if several else "none"


def _on_tpu_vm() -> bool:
  """JAX's own judgement (TPU chips and libtpu are there), so that the two agree."""
  from jax._src import cloud_tpu_init

  return cloud_tpu_init.running_in_cloud_tpu_vm


def initialize(config: DistributedConfig | None = None) -> Launch:
  """Joins this process to its run, where there are several; a second call changes nothing.

  On CPUs collectives go through Gloo (TCP). Afterwards a process that dies takes the others with
  it: whoever waits for it in a collective is ended within ``heartbeat_timeout`` seconds, with
  JAX's message that another task died. ``fail_fast`` does the same for errors in Python.

  Returns:
    How the processes were found.

  Raises:
    UserError: incomplete or contradictory settings, arrays that exist already, no coordinator or
      too few processes within ``start_timeout``, or another number of processes elsewhere.
  """
  settings = (config or DistributedConfig()).resolve()
  how: Launch = "none" if settings.coordinator is None else "explicit"
  if how == "none" or None in (settings.num_processes, settings.process_id):
    how = detect()
  if how == "none" or settings.num_processes == 1:
    return "none"
  if jax.distributed.is_initialized():
    _same_as_before(settings)
    return how
  if jax.config.jax_cpu_collectives_implementation in (None, "none"):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  _connect(settings)
  _agree_on_count(settings)
  return how


def _same_as_before(settings: DistributedConfig) -> None:
  here = (jax.process_count(), jax.process_index())
  for name, value, before in zip(
    ("num_processes", "process_id"), (settings.num_processes, settings.process_id), here
  ):
    if value not in (None, before):
      raise UserError(
        f"this process already belongs to a run with {name}={before}, and now {name}={value} is "
        "asked for; a process can join one run"
      )


def _connect(settings: DistributedConfig) -> None:
  """JAX's start, in a thread: where it gives up itself, it aborts the process without a word."""
  failure: list[BaseException] = []

  def start():
    try:
      jax.distributed.initialize(
        settings.coordinator,
        settings.num_processes,
        settings.process_id,
        # Ours is the shorter one.
        initialization_timeout=settings.start_timeout + 600,
        heartbeat_timeout_seconds=settings.heartbeat_timeout,
      )
    except BaseException as error:
      failure.append(error)

  thread = threading.Thread(target=start, daemon=True)
  thread.start()
  thread.join(min(10, settings.start_timeout))
  if thread.is_alive():
    index, count = settings.process_id, settings.num_processes
    who = "this process" if index is None else f"process {index} of {count}"
    print(
      f"jaxdec: {who} waits for the others, {settings.start_timeout} s at most",
      file=sys.stderr, flush=True,
    )  # fmt: skip
    thread.join(settings.start_timeout - 10)
  if thread.is_alive():
    why = _why_alone(settings)
    _disown()
    raise UserError(why)
  if failure:
    if "must be called before" in str(failure[0]):
      raise UserError(
        "arrays or devices were used before the processes were joined; call "
        "jaxdec.parallel.distributed.initialize first of all"
      ) from failure[0]
    raise failure[0]


def _why_alone(settings: DistributedConfig) -> str:
  address, seconds = settings.coordinator, settings.start_timeout
  if address is None:
    return (
      f"not all processes of the run came within {seconds} s; start the same command on every "
      "host, or raise JAXDEC_START_TIMEOUT"
    )
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
  except OSError as error:
    return (
      f"no coordinator answers at {address} ({error}) after {seconds} s; start process 0 there, "
      "and let the others reach that port"
    )
  return (
    f"the coordinator at {address} is there, but not all {settings.num_processes} processes came "
    f"within {seconds} s; start each process_id from 0 to {settings.num_processes - 1} once, all "
    "with the same num_processes"
  )


def _state():
  from jax._src import distributed

  return distributed.global_state


def _disown() -> None:
  """JAX must not wait at exit for processes that never came."""
  state = _state()
  state.client = state.service = None


def _agree_on_count(settings: DistributedConfig) -> None:
  """Every process tells how many it believes in; JAX itself would wait for those who don't exist.

  Sent: a few bytes through the coordinator.
  """
  state = _state()
  count, index, key = state.num_processes, state.process_id, "jaxdec/num_processes/{}"
  state.client.key_value_set(key.format(index), str(count))
  for other in range(1, count) if index == 0 else (0,):
    wait = 1000 * settings.start_timeout
    theirs = int(state.client.blocking_key_value_get(key.format(other), wait))
    if theirs != count:
      raise UserError(
        f"process {index} was started with num_processes={count} and process {other} with "
        f"num_processes={theirs}; give all the same"
      )


@contextlib.contextmanager
def fail_fast() -> Iterator[None]:
  """Ends this process at once where the block raises and there are others.

  Python's own exit would wait for the others to finish, while they wait for this one in a
  collective. Ended, it is missed, and they end too. In a run of one process nothing changes.

  The exit code is 2 for a ``UserError``, else 1; after an interruption 130.
  """
  try:
    yield
  except BaseException as error:
    index, count = _state().process_id, _state().num_processes
    if count == 1 or not jax.distributed.is_initialized() or isinstance(error, SystemExit):
      raise
    code = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
    if code == 1:
      traceback.print_exc()
    what = " ".join(str(error).split()) if code == 2 else type(error).__name__
    advice = "" if code == 2 else (
      "; it stops here, and with it the others, of which one may have died first; start all of "
      "them again with the same command to go on from the last checkpoint"
    )  # fmt: skip
    print(f"jaxdec: process {index} of {count}: {what}{advice}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if index == 0:
      time.sleep(1)  # the coordinator lives here: the others' own words come first
    os._exit(code)


def to_host(tree: Any) -> Any:
  """The tree with whole arrays on every host, one leaf after the other.

  Communicates: each leaf that no process holds whole, from all to all.
  """
  from jax.experimental import multihost_utils

  def one(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
      return leaf
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

  return jax.tree.map(one, tree)


def gather_texts(text: str) -> list[str]:
  """Every process's text, in process order. Communicates the longest one from each to all."""
  if jax.process_count() == 1:
    return [text]
  from jax.experimental import multihost_utils

  raw = np.frombuffer(text.encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.asarray(raw.size)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: raw.size] = raw
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [bytes(row[:size]).decode() for row, size in zip(rows, sizes)]
