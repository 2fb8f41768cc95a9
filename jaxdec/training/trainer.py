# SPDX-License-Identifier: Apache-2.0
"""The one trainer: any ``Task``, on one device or a mesh, interrupted anywhere without a trace.

A step is one compiled program whose state is donated. Data, parameters and optimizer state are
checkpointed together and every random number is keyed by the step, so a run that was killed and
resumed computes the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdec.errors import UserError
from jaxdec.parallel import mesh as mesh_lib
from jaxdec.parallel import rules as rules_lib
from jaxdec.parallel.batches import batch_share, check_agreement, place_batch
from jaxdec.parallel.sequence.config import SequenceConfig
from jaxdec.parallel.sequence.layout import zigzag_batch
from jaxdec.training import ema
from jaxdec.training.checkpoints import Checkpoints
from jaxdec.training.config import TrainerConfig
from jaxdec.training.gradients import as_gradients, loss_and_gradients
from jaxdec.training.guard import Guard, examine, keep_if
from jaxdec.training.interruption import Replayable, Stop
from jaxdec.training.metrics import MetricsWriter, Progress, weighted_mean
from jaxdec.training.optimizers import make_optimizer, schedule
from jaxdec.training.profile import ProfileWindow
from jaxdec.training.reports import Reports
from jaxdec.training.run_folder import RunFolder, to_json
from jaxdec.training.state import TrainResult, TrainState
from jaxdec.training.task import Task


class Trainer:
  """Trains a task.

  Args:
    task: what to learn.
    config: how.
    data: iterator of batches (dicts of arrays, this process's rows) with ``get_state`` and
      ``set_state`` (Grain's iterators), or an iterable that starts anew with each ``iter``; the
      latter is resumed by reading past what was consumed.
    eval_data: iterable of held-out batches, read from the start at each evaluation, or a function
      that returns one.
    rules: where parameters and batches lie on the mesh.
    mesh: the devices, instead of the local ones laid out by ``config.mesh``. Devices that can only
      be compiled for (``jaxdec.parallel.plan``) serve ``lower``, and need no ``data``.
    extra: further JSON-able settings that identify the run (where the data came from).
    inspect: called with the parameters (as they are evaluated) after every ``inspect_every`` steps
      and after the last; what it returns is reported as kind ``inspect``. Training goes on as if it
      had not been called.
  """

  def __init__(
    self,
    task: Task,
    config: TrainerConfig,
    *,
    data: Iterable[Mapping[str, np.ndarray]] | None = None,
    eval_data: Iterable[Mapping[str, np.ndarray]] | Callable[[], Iterable] | None = None,
    rules: rules_lib.Rules = rules_lib.DEFAULT,
    mesh: Mesh | None = None,
    extra: Mapping[str, Any] | None = None,
    inspect: Callable[[Any], Mapping[str, Any]] | None = None,
    inspect_every: int | None = None,
  ):
    self.task = task
    self.config = config
    self._inspect, self._inspect_every = inspect, inspect_every
    self.rules = rules
    self.mesh = mesh or mesh_lib.make_mesh(**dataclasses.asdict(config.mesh))
    self.sequence = _sequence(task, self.mesh, rules)
    self._data = data if hasattr(data, "get_state") else Replayable(data or ())
    self._eval_data = eval_data
    # An iterator is rewound to where it stood for every evaluation.
    self._eval_start = eval_data.get_state() if hasattr(eval_data, "get_state") else None
    self._optimizer = make_optimizer(config.optimizer, config.steps)
    self._schedule = schedule(config.optimizer, config.steps)
    self.resolved = {
      "trainer": to_json(config),
      "task": to_json(task.config),
      "rules": to_json(dict(rules.table)),
      "data": to_json(dict(extra or {})),
    }
    self._replicated = NamedSharding(self.mesh, PartitionSpec())
    key = jax.random.key(config.seed)
    self._init_key, self._step_key = jax.random.split(key)
    self._layout()

  @property
  def data(self) -> Any:
    """The training batches, with their position."""
    return self._data

  # -- state -----------------------------------------------------------------------------------

  def _layout(self):
    """Abstract parameters and optimizer state with their shardings; nothing is computed."""
    boxed = jax.eval_shape(self.task.init, self._init_key)
    params_sharding = rules_lib.shardings(boxed, self.rules, self.mesh)
    params = nn.unbox(boxed)
    state = jax.eval_shape(self._begin, params)
    optimizer = rules_lib.like_parameters(state.optimizer, params, params_sharding, self.mesh)
    average = None if state.ema is None else params_sharding
    memory = jax.tree.map(lambda _: self._replicated, state.memory)
    self.shardings = TrainState(self._replicated, params_sharding, optimizer, average, memory)
    self.abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, self.shardings
    )

  def _begin(self, params: Any) -> TrainState:
    """Step 0 with these parameters."""
    optimizer = self._optimizer.init(as_gradients(params, self.config.grad_dtype))
    average = None if self.config.ema is None else ema.begin(params)
    memory = getattr(self.task, "memory", None)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer, average, memory)

  def init_state(self) -> TrainState:
    """Step 0, made in place on the mesh."""

    def init(key):
      return self._begin(nn.unbox(self.task.init(key)))

    with self._context():
      return jax.jit(init, out_shardings=self.shardings)(self._init_key)

  def place_frozen(self) -> Any:
    """The task's frozen arrays on the mesh."""
    return rules_lib.place(self.task.frozen, self.rules, self.mesh)

  def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows as part of the global batch, in the layout of the sequence shards."""
    return place_batch(self._in_layout(batch), self.mesh, self.rules)

  def _in_layout(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    ways = rules_lib.length_ways(self.mesh, self.rules)
    if ways == 1 or self.sequence.layout == "contiguous":
      return batch
    return zigzag_batch(batch, ways)

  def _sharding_of(self, value) -> NamedSharding:
    return rules_lib.batch_sharding(self.mesh, self.rules, rank=min(np.ndim(value), 2))

  def global_rows(self, rows: int) -> int:
    """The rows of the global batch of which this process reads ``rows``."""
    return batch_share(self.mesh, self.rules).total(rows)

  def _check(self, batch: Mapping[str, Any], split: int = 1) -> None:
    """Sizes of the global batch of which this process has these rows."""
    shapes = {
      name: jax.ShapeDtypeStruct((self.global_rows(x.shape[0]), *x.shape[1:]), x.dtype)
      for name, x in batch.items()
    }
    rules_lib.check_batch(shapes, self.mesh, self.rules, split=split)

  def _context(self) -> contextlib.ExitStack:
    """The mesh and the logical rules, for every trace."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(self.mesh))
    stack.enter_context(nn.logical_axis_rules(self.rules.flax()))
    return stack

  # -- compiled functions ------------------------------------------------------------------------

  def _gradients(self, params, frozen, batch, key):
    settings = {"slices": self.config.accumulate, "grad_dtype": self.config.grad_dtype}
    return loss_and_gradients(self.task.loss, params, frozen, batch, key, **settings)

  def step_fn(self, state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
    """One optimizer step; pure, for ``jit``."""
    key = jax.random.fold_in(self._step_key, state.step)
    if state.memory is not None:
      batch = self.task.recall(state.memory, batch)
    loss, metrics, gradients = self._gradients(state.params, frozen, batch, key)
    health = examine(loss, gradients)
    updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema
    if average is not None:
      average = ema.follow(average, params, self.config.ema, state.step)
    memory = None if state.memory is None else self.task.remember(state.memory, metrics)
    new = TrainState(state.step, params, optimizer, average, memory)
    new = keep_if(health.finite, new, state).replace(step=state.step + 1)
    metrics = {"loss": loss, **metrics, "grad_norm": health.grad_norm, "health": health}
    metrics["learning_rate"] = jnp.asarray(self._schedule(state.step), jnp.float32)
    return new, metrics

  def compile(self, batch: Mapping[str, np.ndarray]) -> Callable:
    """The compiled step for batches shaped like this one; checks sizes before compiling."""
    self._check(batch, self.config.accumulate)
    return self._program()

  def _program(self) -> Callable:
    return jax.jit(self.step_fn, donate_argnums=0, out_shardings=(self.shardings, self._replicated))

  @property
  def abstract_frozen(self) -> Any:
    """Shapes and places of the task's frozen arrays."""
    frozen = self.task.frozen
    layout = rules_lib.shardings(frozen, self.rules, self.mesh)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(frozen), layout
    )

  def lower(self, batch: Mapping[str, Any], *, platform: str | None = None) -> jax.stages.Lowered:
    """The train step for a global batch of these shapes; nothing is placed or computed.

    Args:
      batch: arrays or ``ShapeDtypeStruct``s of *all* rows. platform: other than the default one.
    """
    rules_lib.check_batch(batch, self.mesh, self.rules, split=self.config.accumulate)
    batch = self._in_layout({name: np.zeros(x.shape, x.dtype) for name, x in batch.items()})
    batch = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding_of(x))
      for name, x in batch.items()
    }
    frozen = self.abstract_frozen  # outside the context, in which unboxing places arrays
    with self._context():
      traced = self._program().trace(self.abstract, frozen, batch)
      return traced.lower(lowering_platforms=(platform,) if platform else None)

  def evaluate(self, params: Any, frozen: Any) -> dict[str, Any]:
    """Averages ``task.evaluate`` over the held-out batches; ``{}`` where there are none."""
    if self._eval_data is None:
      return {}
    if not hasattr(self, "_evaluate"):
      self._evaluate = jax.jit(self.task.evaluate, out_shardings=self._replicated)
    batches = self._eval_data() if callable(self._eval_data) else self._eval_data
    if self._eval_start is not None:
      batches.set_state(self._eval_start)
    parts = []
    with self._context():
      for index, batch in enumerate(batches):
        self._check(batch)
        key = jax.random.fold_in(self._init_key, index)  # the same noise at every evaluation
        parts.append(jax.device_get(self._evaluate(params, frozen, self.place_batch(batch), key)))
    return self.task.summarize(weighted_mean(parts))

  # -- the loop ----------------------------------------------------------------------------------

  def train(self) -> TrainResult:
    """Runs, or resumes, to the last step.

    SIGTERM or Ctrl-C ends it after the step under way: the state is saved and the result says
    ``interrupted``; a second Ctrl-C stops at once.

    Raises:
      UserError: the work directory holds another run; sizes that do not divide; data that ends.
      UserError: also where loss or gradients are not finite; the last checkpoint is from before.
    """
    config, start, folder = self.config, 0, None
    checkpoints = writer = None
    with contextlib.ExitStack() as stack:

      def closing(thing):
        return stack.enter_context(contextlib.closing(thing))

      if config.work_dir is not None:
        folder = closing(RunFolder(config.work_dir, self.resolved))
        checkpoints = closing(Checkpoints(folder.path / "checkpoints", keep=config.keep))
        start = checkpoints.latest or 0
      state = self._restore(checkpoints, start) if start else self.init_state()
      if folder is not None:
        writer = closing(
          MetricsWriter(folder.path, tensorboard=config.tensorboard, resume_step=start)
        )
      progress = closing(Progress(config.steps, enabled=config.progress))
      if start:
        progress.line(f"resumed {config.work_dir} at step {start} of {config.steps}")
      trace = None if folder is None else folder.path / "profile"
      stop = stack.enter_context(Stop())
      profile = stack.enter_context(ProfileWindow(config.profile, trace))
      return self._loop(state, start, checkpoints, writer, progress, stop, profile)

  def _restore(self, checkpoints: Checkpoints, step: int) -> TrainState:
    """The state of a checkpoint; the data goes to where it stood."""
    saved, position = checkpoints.restore(step, self.abstract.saved())
    self._data.set_state(position)
    return TrainState(jax.device_put(jnp.asarray(step, jnp.int32), self._replicated), **saved)

  def _loop(self, state, start, checkpoints, writer, progress, stop, profile) -> TrainResult:
    config = self.config
    frozen = self.place_frozen()
    log_every = config.log_every or max(1, math.ceil(config.steps / 20))
    last: dict[str, Any] = {}
    reports = Reports(self, writer, progress)
    guard = Guard(config.nan_policy, config.max_skips, state.params)
    step_fn = shape = None
    interrupted = False
    for step in range(start + 1, config.steps + 1):
      batch = self._next(step)
      if shape is None:
        check_agreement(batch, self.mesh, self.rules)
        step_fn, shape = self.compile(batch), _shape(batch)
        reports.start(state.params, batch)
      elif _shape(batch) != shape:
        raise UserError(
          f"batch {step} has shapes {_shape(batch)}, the first one had {shape}; every batch must "
          "have the same"
        )
      with self._context(), profile.step(step) as result:
        state, metrics = step_fn(state, frozen, self.place_batch(batch))
        result.append(metrics["loss"])
      # Both look at the step before: this one is still running.
      health = metrics.pop("health")
      reports.add(step, metrics)
      guard.add(step, health, state.params)
      done = step == config.steps
      if step % log_every == 0 or done:
        reports.request(step)
      progress.step(step)
      interrupted = stop.requested(step) and not done
      evaluates = done or (config.eval_every is not None and step % config.eval_every == 0)
      inspects = self._inspect is not None and (
        done or (self._inspect_every is not None and step % self._inspect_every == 0)
      )
      saves = done or interrupted or step % config.checkpoint_every == 0
      if evaluates or saves or inspects:
        reports.flush()
        guard.flush(state.params)
      if checkpoints is not None and saves:
        checkpoints.save(step, state.saved(), self._data.get_state())
      if interrupted:
        break
      if evaluates and self._eval_data is not None:
        before = time.perf_counter()
        last = self.evaluate(state.evaluated, frozen)
        reports.evaluated(step, last, time.perf_counter() - before)
      if inspects:
        before = time.perf_counter()
        seen = dict(self._inspect(state.evaluated))
        reports.evaluated(step, seen, time.perf_counter() - before, kind="inspect")
    reports.flush()
    step = int(state.step)
    if start >= config.steps:
      last = self.evaluate(state.evaluated, frozen)
      progress.line(f"{config.work_dir} is already finished ({start} steps)")
    if interrupted:
      kept = "saved; the same command resumes" if checkpoints is not None else "nothing is kept"
      progress.line(f"interrupted after step {step} of {config.steps}: {kept}")
    return TrainResult(state.params, step, interrupted, last or reports.last, state.ema)

  def _next(self, step):
    try:
      return next(self._data)
    except StopIteration:
      raise UserError(
        f"the training data ended before step {step} of {self.config.steps}; repeat the data or "
        "train for fewer steps"
      ) from None


def _sequence(task: Task, mesh: Mesh, rules: rules_lib.Rules) -> SequenceConfig | None:
  """The task's sequence parallelism; refused is a mesh that splits sequences for a task without."""
  sequence = getattr(task, "sequence", None)
  ways = rules_lib.length_ways(mesh, rules)
  if ways > 1 and sequence is None:
    raise UserError(
      f"the mesh splits every sequence over {ways} devices, and the model has no sequence-parallel "
      "layers; give it sequence=SequenceConfig(), or use seq=1"
    )
  return sequence


def _shape(batch: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {name: tuple(np.shape(value)) for name, value in batch.items()}
