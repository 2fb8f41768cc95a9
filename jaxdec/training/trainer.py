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
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from jaxdec.errors import UserError
from jaxdec.parallel import mesh as mesh_lib
from jaxdec.parallel import rules as rules_lib
from jaxdec.training.checkpoints import Checkpoints
from jaxdec.training.metrics import MetricsWriter, Progress, clock, human, peak_flops
from jaxdec.training.optimizers import OptimizerConfig, global_norm, make_optimizer, schedule
from jaxdec.training.run_folder import RunFolder, to_json
from jaxdec.training.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 (all that remain)."""

  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  seq: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
  """How a task is trained.

  Attributes:
    work_dir: the run's folder; None keeps nothing (no checkpoints, no metrics file).
    steps: optimizer steps in all. seed: of the initial parameters and of every step's ``rng``.
    optimizer: see ``OptimizerConfig``.
    accumulate: gradients of this many slices of each batch are averaged before a step.
    log_every: steps between reports; None: about 20 reports a run.
    eval_every: steps between evaluations; None: only after the last step. Without evaluation data
      there is none.
    checkpoint_every: steps between checkpoints; the last step is always saved.
    keep: how many checkpoints stay on disk.
    mesh: devices along ``data``, ``fsdp``, ``tensor``, ``seq``.
    tensorboard: also write TensorBoard files (needs ``tensorboardX``).
    progress: print reports.
  """

  work_dir: str | None = None
  steps: int = 1000
  seed: int = 0
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  accumulate: int = 1
  log_every: int | None = None
  eval_every: int | None = None
  checkpoint_every: int = 500
  keep: int = 2
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  tensorboard: bool = False
  progress: bool = True

  def __post_init__(self):
    for name in ("steps", "accumulate", "log_every", "eval_every", "checkpoint_every", "keep"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")


@struct.dataclass
class TrainState:
  """Everything a step changes."""

  step: jax.Array
  params: Any
  optimizer: Any


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What ``Trainer.train`` leaves behind.

  Attributes:
    params: trained parameters, still on the mesh.
    step: steps done; fewer than configured only if ``interrupted``.
    interrupted: a SIGTERM or Ctrl-C came; the state was saved, the same call resumes.
    metrics: last evaluation (or last report, without evaluation data).
  """

  params: Any
  step: int
  interrupted: bool
  metrics: dict[str, Any]


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
    rules: where parameters lie on the mesh.
    extra: further JSON-able settings that identify the run (where the data came from).
  """

  def __init__(
    self,
    task: Task,
    config: TrainerConfig,
    *,
    data: Iterable[Mapping[str, np.ndarray]],
    eval_data: Iterable[Mapping[str, np.ndarray]] | Callable[[], Iterable] | None = None,
    rules: rules_lib.Rules = rules_lib.DEFAULT,
    extra: Mapping[str, Any] | None = None,
  ):
    self.task = task
    self.config = config
    self.rules = rules
    self.mesh = mesh_lib.make_mesh(**dataclasses.asdict(config.mesh))
    self._data = data if hasattr(data, "get_state") else _Replayable(data)
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
    self._batch_sharding = rules_lib.batch_sharding(self.mesh, rules)
    key = jax.random.key(config.seed)
    self._init_key, self._step_key = jax.random.split(key)
    self._layout()

  # -- state -----------------------------------------------------------------------------------

  def _layout(self):
    """Abstract parameters and optimizer state with their shardings; nothing is computed."""
    boxed = jax.eval_shape(self.task.init, self._init_key)
    params_sharding = rules_lib.shardings(boxed, self.rules, self.mesh)
    params = nn.unbox(boxed)
    optimizer = jax.eval_shape(self._optimizer.init, params)
    optimizer_sharding = rules_lib.like_parameters(optimizer, params, params_sharding, self.mesh)
    self.shardings = TrainState(self._replicated, params_sharding, optimizer_sharding)
    self.abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, optimizer),
      self.shardings,
    )

  def init_state(self) -> TrainState:
    """Step 0, made in place on the mesh."""

    def init(key):
      params = nn.unbox(self.task.init(key))
      return TrainState(jnp.zeros((), jnp.int32), params, self._optimizer.init(params))

    with self._context():
      return jax.jit(init, out_shardings=self.shardings)(self._init_key)

  def place_frozen(self) -> Any:
    """The task's frozen arrays on the mesh."""
    frozen = self.task.frozen
    layout = rules_lib.shardings(frozen, self.rules, self.mesh)

    def put(leaf, sharding):
      if not rules_lib.is_boxed(leaf):
        placed = getattr(leaf, "sharding", None)
        if isinstance(placed, NamedSharding) and placed.mesh == self.mesh:
          return leaf
        return jax.device_put(leaf, sharding)
      return jax.device_put(leaf.value, sharding)

    return jax.tree.map(put, frozen, layout, is_leaf=rules_lib.is_boxed)

  def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows as part of the global batch."""
    return {
      name: jax.make_array_from_process_local_data(self._batch_sharding, np.asarray(value))
      for name, value in batch.items()
    }

  def _context(self) -> contextlib.ExitStack:
    """The mesh and the logical rules, for every trace."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(self.mesh))
    stack.enter_context(nn.logical_axis_rules(self.rules.flax()))
    return stack

  # -- compiled functions ------------------------------------------------------------------------

  def _gradients(self, params, frozen, batch, key):
    grad = jax.value_and_grad(self.task.loss, has_aux=True)
    slices = self.config.accumulate
    if slices == 1:
      (loss, metrics), gradients = grad(params, frozen, batch, key)
      return loss, metrics, gradients

    # Strided slices keep every slice spread over all batch shards.
    batch = jax.tree.map(
      lambda x: x.reshape(x.shape[0] // slices, slices, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def body(total, item):
      index, part = item
      (loss, metrics), gradients = grad(params, frozen, part, jax.random.fold_in(key, index))
      weight = metrics.pop("weight", jnp.ones((), jnp.float32))
      new = jax.tree.map(lambda x: x * weight, (loss, metrics, gradients))
      return jax.tree.map(jnp.add, total, (weight, new)), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(lambda: grad(params, frozen, first, key))
    (loss, metrics), gradients = shapes
    weighted = "weight" in metrics
    metrics.pop("weight", None)
    zero = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      (jax.ShapeDtypeStruct((), jnp.float32), (loss, metrics, gradients)),
    )
    (weight, sums), _ = jax.lax.scan(body, zero, (jnp.arange(slices), batch))
    loss, metrics, gradients = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), sums)
    return loss, {**metrics, "weight": weight} if weighted else metrics, gradients

  def step_fn(self, state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
    """One optimizer step; pure, for ``jit``."""
    key = jax.random.fold_in(self._step_key, state.step)
    loss, metrics, gradients = self._gradients(state.params, frozen, batch, key)
    updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, **metrics, "grad_norm": global_norm(gradients)}
    metrics["learning_rate"] = jnp.asarray(self._schedule(state.step), jnp.float32)
    return TrainState(state.step + 1, params, optimizer), metrics

  def compile(self, batch: Mapping[str, np.ndarray]) -> Callable:
    """The compiled step for batches shaped like this one; checks sizes before compiling."""
    rules_lib.check_batch(batch, self.mesh, self.rules, split=self.config.accumulate)
    return jax.jit(self.step_fn, donate_argnums=0, out_shardings=(self.shardings, self._replicated))

  def evaluate(self, params: Any, frozen: Any, step: int = 0) -> dict[str, Any]:
    """Averages ``task.evaluate`` over the held-out batches; ``{}`` where there are none."""
    if self._eval_data is None:
      return {}
    if not hasattr(self, "_evaluate"):
      self._evaluate = jax.jit(self.task.evaluate, out_shardings=self._replicated)
    batches = self._eval_data() if callable(self._eval_data) else self._eval_data
    if self._eval_start is not None:
      batches.set_state(self._eval_start)
    sums: dict[str, np.ndarray] = {}
    total = 0.0
    with self._context():
      for index, batch in enumerate(batches):
        rules_lib.check_batch(batch, self.mesh, self.rules)
        key = jax.random.fold_in(self._init_key, index)  # the same noise at every evaluation
        metrics = jax.device_get(self._evaluate(params, frozen, self.place_batch(batch), key))
        weight = float(metrics.pop("weight", 1.0))
        total += weight
        for name, value in metrics.items():
          sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64) * weight
    if not total:
      raise UserError("the evaluation data holds no labelled token; give longer or more text")
    return self.task.summarize({name: value / total for name, value in sums.items()})

  # -- the loop ----------------------------------------------------------------------------------

  def train(self) -> TrainResult:
    """Runs, or resumes, to the last step.

    SIGTERM or Ctrl-C ends it after the step under way: the state is saved and the result says
    ``interrupted``; a second Ctrl-C stops at once.

    Raises:
      UserError: the work directory holds another run; sizes that do not divide; data that ends.
      UserError: also where the loss is not finite; the last checkpoint is from before.
    """
    folder = None
    if self.config.work_dir is not None:
      folder = RunFolder(self.config.work_dir, self.resolved)
    try:
      return self._train(folder)
    finally:
      if folder is not None:
        folder.close()

  def _train(self, folder: RunFolder | None) -> TrainResult:
    config = self.config
    progress = Progress(config.steps, enabled=config.progress)
    checkpoints = writer = None
    try:
      start = 0
      if folder is not None:
        checkpoints = Checkpoints(folder.path / "checkpoints", keep=config.keep)
        start = checkpoints.latest or 0
      if start:
        params, optimizer, position = checkpoints.restore(
          start, self.abstract.params, self.abstract.optimizer
        )
        step = jax.device_put(jnp.asarray(start, jnp.int32), self._replicated)
        state = TrainState(step, params, optimizer)
        self._data.set_state(position)
        progress.line(f"resumed {config.work_dir} at step {start} of {config.steps}")
      else:
        state = self.init_state()
      if folder is not None:
        writer = MetricsWriter(folder.path, tensorboard=config.tensorboard, resume_step=start)
      with _Stop() as stop:
        return self._loop(state, start, checkpoints, writer, progress, stop)
    finally:
      progress.close()
      if writer is not None:
        writer.close()
      if checkpoints is not None:
        checkpoints.close()

  def _loop(self, state, start, checkpoints, writer, progress, stop) -> TrainResult:
    config = self.config
    frozen = self.place_frozen()
    log_every = config.log_every or max(1, math.ceil(config.steps / 20))
    last: dict[str, Any] = {}
    reports = _Reports(self, writer, progress)
    step_fn = shape = None
    interrupted = False
    for step in range(start + 1, config.steps + 1):
      batch = self._next(step)
      if shape is None:
        step_fn, shape = self.compile(batch), _shape(batch)
        reports.start(state.params, batch, start)
      elif _shape(batch) != shape:
        raise UserError(
          f"batch {step} has shapes {_shape(batch)}, the first one had {shape}; every batch must "
          "have the same"
        )
      with self._context():
        state, metrics = step_fn(state, frozen, self.place_batch(batch))
      # The numbers of the step before: this one is still running.
      reports.add(step, metrics)
      done = step == config.steps
      if step % log_every == 0 or done:
        reports.request(step)
      progress.step(step)
      interrupted = stop.requested(step) and not done
      evaluates = done or (config.eval_every is not None and step % config.eval_every == 0)
      saves = done or interrupted or step % config.checkpoint_every == 0
      if evaluates or saves:
        reports.flush()  # a state that is not finite must not be saved
      if checkpoints is not None and saves:
        checkpoints.save(step, state.params, state.optimizer, self._data.get_state())
      if interrupted:
        break
      if evaluates and self._eval_data is not None:
        before = time.perf_counter()
        last = self.evaluate(state.params, frozen, step)
        reports.evaluated(step, last, time.perf_counter() - before)
    reports.flush()
    step = int(state.step)
    if start >= config.steps:
      last = self.evaluate(state.params, frozen, step)
      progress.line(f"{config.work_dir} is already finished ({start} steps)")
    if interrupted:
      kept = "saved; the same command resumes" if checkpoints is not None else "nothing is kept"
      progress.line(f"interrupted after step {step} of {config.steps}: {kept}")
    return TrainResult(state.params, step, interrupted, last or reports.last)

  def _next(self, step):
    try:
      return next(self._data)
    except StopIteration:
      raise UserError(
        f"the training data ended before step {step} of {self.config.steps}; repeat the data or "
        "train for fewer steps"
      ) from None


class _Reports:
  """Collects device-side metrics and fetches them one step late, so the device never waits."""

  def __init__(self, trainer: Trainer, writer: MetricsWriter | None, progress: Progress):
    self._trainer, self._writer, self._progress = trainer, writer, progress
    self._window: list[dict[str, jax.Array]] = []
    self._ready: tuple[int, list] | None = None
    self.last: dict[str, Any] = {}

  def start(self, params, batch, step):
    tokens = batch.get("tokens", next(iter(batch.values())))
    self._tokens = int(np.prod(tokens.shape[:2])) * jax.process_count()
    length = tokens.shape[1] if tokens.ndim > 1 else 1
    self._flops = self._trainer.task.flops_per_token(params, length)
    self._time, self._step = time.perf_counter(), step
    self._begin, self._first = self._time, None

  def add(self, step, metrics):
    if self._window:
      # One step of slack bounds how far the host runs ahead.
      jax.block_until_ready(self._window[-1]["loss"])
    if self._first is None and step > self._step + 1:
      # From here on no step compiles, so rates leave the first step out.
      self._first = time.perf_counter() - self._begin
      self._progress.line(f"compiled and ran the first step in {clock(self._first)}")
      self._time, self._step = time.perf_counter(), step - 1
    if self._ready is not None:
      self._emit()
    self._window.append(metrics)

  def request(self, step):
    """Report the window that ends here, once its numbers have arrived."""
    self._ready, self._window = (step, self._window), []

  def flush(self):
    if self._ready is not None:
      self._emit()
    elif self._window:
      self._check(jax.device_get(self._window[-1]))

  def _check(self, metrics):
    if not np.isfinite(metrics["loss"]):
      raise UserError(
        f"the loss is {float(metrics['loss'])}; lower the learning rate or clip harder, and resume "
        "from the last checkpoint"
      )

  def _emit(self):
    step, window = self._ready
    self._ready = None
    rows = jax.device_get(window)
    now = time.perf_counter()
    for row in rows:
      self._check(row)
    names = ["loss", *(name for name in rows[0] if name not in ("loss", "weight"))]
    values = {name: np.mean([row[name] for row in rows], axis=0) for name in names}
    values["learning_rate"] = rows[-1]["learning_rate"]
    spent, steps = now - self._time, step - self._step
    shown: dict[str, Any] = dict(values)
    if steps > 0 and spent > 0 and self._first is not None:
      rate = self._tokens * steps / spent
      devices = self._trainer.mesh.devices
      peak = peak_flops(devices.flat[0])
      values["tokens_per_second"] = rate
      values["model_flops_per_second"] = rate * self._flops
      shown[""] = f"{human(rate)} tok/s"
      if peak is None:
        shown["model"] = human(rate * self._flops, "FLOP/s")
      else:
        values["mfu"] = rate * self._flops / (peak * devices.size)
        shown["MFU"] = f"{values['mfu']:.1%}"
      shown["eta"] = clock((self._trainer.config.steps - step) * spent / steps)
      self._time, self._step = now, step
    self.last = values
    if self._writer is not None:
      self._writer.write(step, "train", values)
    self._progress.report(step, shown)

  def evaluated(self, step, values, seconds):
    self._time += seconds  # evaluation is no training time
    if self._writer is not None:
      self._writer.write(step, "eval", values)
    self._progress.report(step, {"eval:": "", **values})


class _Stop:
  """Turns SIGTERM and the first Ctrl-C into a request to stop after the step under way.

  With several processes, all must stop after the same step, so JAX's preemption service decides
  (``jax.distributed.initialize`` has it listen for SIGTERM) and no handler is set here.
  """

  def __enter__(self) -> _Stop:
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


class _Replayable:
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


def _shape(batch: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {name: tuple(np.shape(value)) for name, value in batch.items()}
