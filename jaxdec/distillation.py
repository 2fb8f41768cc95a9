# SPDX-License-Identifier: Apache-2.0
"""Distilling a drafter from a decoder, start to finish: data, training, tree, files.

The library call behind ``jaxdec distill``; the demo calls it twice.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxdec.data import Corpus, Share
from jaxdec.data.mixture import Mixture, load_data, make_batches
from jaxdec.drafting.base import Params
from jaxdec.drafting.kinds import KINDS
from jaxdec.drafting.lora import LoRA
from jaxdec.drafting.trained import TrainedDrafter
from jaxdec.errors import UserError, nearest
from jaxdec.parallel import batch_share, make_mesh
from jaxdec.parallel.distributed import to_host
from jaxdec.training import Trainer, TrainerConfig
from jaxdec.training.acceptance import Acceptance, held_out_prompts
from jaxdec.training.tasks.distill import Distill, finish
from jaxdec.training.tasks.medusa2 import Medusa2
from jaxdec.training.teachers import Cache, Cached, States, Streamed
from jaxdec.training.trainer import TrainResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
  """What is distilled, on what.

  Attributes:
    drafter: medusa, hydra, hydra++ or eagle3. options: fields of that drafter.
    data: text (``jaxdec.data.open_source``), a JSONL file of conversations
      (``jaxdec.data.chat``), a folder of ``jaxdec regenerate``; or a mixture of them, such as
      ``"0.7*answers + 0.3*python_stdlib"``. Of conversations and answers only what the assistant
      says is learned.
    batch_size, seq_len: of the training batches.
    num_nodes: size of the static tree chosen from the measured accuracies, root included; a drafter
      that grows its own dynamic tree keeps it.
    eval_batches: held-out batches of every evaluation and of the tree's measurement.
    trainer: steps, optimizer, mesh, folder.
    teacher: where the target's states come from: ``online`` (inside the step), ``streamed`` (a
      program that runs ahead) or ``cached`` (written to disk once; long documents are then cut at
      the same places in every epoch); see ``jaxdec.training.teachers``.
    teacher_dtype: of streamed and cached states. teacher_ahead: batches streamed ahead.
    teacher_folder: of the cache; None: the run's folder with ``-teacher`` at its end.
    acceptance_every: steps between measurements of what is accepted, by decoding
      ``acceptance_prompts`` held-out prompts with the tree the drafter would get now; None: none.
      See ``jaxdec.training.acceptance``. acceptance_tokens: decoded for each prompt.
    joint: Medusa-2: once the heads are trained, in the run's folder with ``-heads`` at its end, the
      target learns with them for as many steps again, by a LoRA; ``kl`` and ``hard`` hold it in
      place (``jaxdec.training.tasks.medusa2``). What results is another model, beside its heads.
    lora: which of the target's layers learn, at what rank, with ``joint``.
  """

  drafter: str = "hydra"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  data: str = "python_stdlib"
  batch_size: int = 8
  seq_len: int = 256
  num_nodes: int = 16
  eval_batches: int = 8
  trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
  teacher: Literal["online", "streamed", "cached"] = "online"
  teacher_dtype: Literal["float32", "bfloat16"] = "float32"
  teacher_ahead: int = 2
  teacher_folder: str | None = None
  acceptance_every: int | None = None
  acceptance_prompts: int = 8
  acceptance_tokens: int = 64
  joint: Literal["kl", "hard"] | None = None
  lora: LoRA = LoRA()  # noqa: RUF009 (frozen)

  def __post_init__(self):
    if self.joint is not None:
      self._check_joint()
    if self.teacher not in ("online", "streamed", "cached"):
      raise UserError(f"teacher must be online, streamed or cached, got {self.teacher!r}")
    if self.teacher == "cached" and not (self.teacher_folder or self.trainer.work_dir):
      raise UserError("teacher='cached' needs a folder; give teacher_folder, or trainer.work_dir")
    for name in ("acceptance_every", "acceptance_prompts", "acceptance_tokens"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")

  def _check_joint(self):
    if self.joint not in ("kl", "hard"):
      raise UserError(f"joint must be 'kl', 'hard' or None, got {self.joint!r}")
    if self.drafter != "medusa":
      raise UserError(
        f"joint training tunes a model with Medusa heads, got drafter={self.drafter!r}; use medusa"
      )
    if self.teacher != "online" or self.acceptance_every is not None:
      raise UserError(
        "with joint the model itself changes at every step, so its states can't come from "
        "elsewhere and no drafter is measured on it meanwhile; use teacher='online' and "
        "acceptance_every=None"
      )


@dataclasses.dataclass(frozen=True)
class Distilled:
  """A trained drafter (None where the run was interrupted), its parameters, and how it went.

  ``target``: parameters of the model it drafts for, where that learned too (``joint``).
  """

  drafter: TrainedDrafter | None
  params: Params
  result: TrainResult
  seconds: float
  target: Params | None = None


@dataclasses.dataclass(frozen=True)
class Corpora:
  """Tokenised training and held-out text."""

  train: Corpus | Mixture
  validation: Corpus | Mixture


def load_corpora(data: str, tokenizer: Any) -> Corpora:
  """Both splits of ``DistillConfig.data``, tokenised; text is kept on disk for the next run."""
  return Corpora(*(load_data(data, split, tokenizer) for split in ("train", "validation")))


def make_drafter(config: DistillConfig, target: Any) -> TrainedDrafter:
  """The untrained drafter for the decoder configuration ``target``.

  Raises:
    UserError: unknown drafter, or an option it doesn't have.
  """
  if config.drafter not in KINDS:
    raise UserError(
      f"unknown drafter {config.drafter!r}{nearest(config.drafter, KINDS)}; distill one of "
      f"{', '.join(KINDS)}"
    )
  kind = KINDS[config.drafter]
  fields = [f.name for f in dataclasses.fields(kind)]
  for name in config.options:
    if name not in fields:
      raise UserError(f"drafter {config.drafter!r} has no option {name!r}{nearest(name, fields)}")
  return kind.for_target(target, **config.options)


class _Watched:
  """A data iterator that tells how many batches it gave; its state is the iterator's own."""

  def __init__(self, data: Any, watch: Callable[[], None]):
    self._data, self._watch = data, watch
    self.get_state, self.set_state = data.get_state, data.set_state

  def __iter__(self):
    return self

  def __next__(self):
    self._watch()
    return next(self._data)

  def close(self) -> None:
    """Ends what runs ahead."""
    if hasattr(self._data, "close"):
      self._data.close()


def make_trainer(
  model: Any,
  params: Any,
  corpora: Corpora,
  config: DistillConfig,
  watch: Callable[[], None] = lambda: None,
  heads: Params | None = None,
) -> tuple[Trainer, Distill | Medusa2]:
  """The trainer and its task; nothing of it is compiled yet. A cached teacher writes its states.

  ``heads``: where joint training starts; None: a drafter is trained for the model as it is.
  """
  drafter = make_drafter(config, model.config)
  if heads is None:
    task = Distill(drafter, model, params, runs_target=config.teacher != "cached")
  else:
    task = Medusa2(drafter, model, params, heads, lora=config.lora, keep=config.joint)
  mesh = make_mesh(**dataclasses.asdict(config.trainer.mesh))
  share = batch_share(mesh)
  shape = {"batch_size": config.batch_size, "seq_len": config.seq_len}
  settings = {**shape, "seed": config.trainer.seed, "share": share}
  extra = {"source": config.data, "corpus": corpora.train.fingerprint, **shape}
  if config.teacher != "online":
    extra["teacher"] = [config.teacher, config.teacher_dtype]
  if config.teacher == "cached":
    settings["random_cuts"] = False
  inspect = None
  if config.acceptance_every is not None:
    prompts = held_out_prompts(corpora.validation, config.acceptance_prompts)
    inspect = Acceptance(
      task, prompts, lambda: held_out(corpora, config, Share()),
      num_nodes=config.num_nodes, max_new_tokens=config.acceptance_tokens,
    )  # fmt: skip
  trainer = Trainer(
    task,
    config.trainer,
    data=_Watched(_with_teacher(corpora, config, task, mesh, settings), watch),
    eval_data=functools.partial(held_out, corpora, config, share),
    mesh=mesh,
    extra=extra,
    inspect=inspect,
    inspect_every=config.acceptance_every,
  )
  return trainer, task


def _with_teacher(
  corpora: Corpora, config: DistillConfig, task: Distill, mesh: Any, settings: Mapping[str, Any]
) -> Any:
  """The training batches, with the target's states where they don't come from the step itself."""
  batches = make_batches(corpora.train, **settings)
  if config.teacher == "online":
    return batches
  states = States(task, mesh, config.teacher_dtype)
  if config.teacher == "streamed":
    return Streamed(batches, states, config.teacher_ahead)
  folder = config.teacher_folder or Path(config.trainer.work_dir).with_name(
    f"{Path(config.trainer.work_dir).name}-teacher"
  )
  cache = Cache(folder, states, config.seq_len)
  cache.fill(
    lambda: itertools.islice(make_batches(corpora.train, **settings), config.trainer.steps)
  )
  return Cached(batches, cache)


def held_out(corpora: Corpora, config: DistillConfig, share: Share | None = None):
  """The evaluation batches, the same ones every time."""
  batches = make_batches(
    corpora.validation, batch_size=config.batch_size, seq_len=config.seq_len, shuffle=False,
    num_epochs=1, share=share,
  )  # fmt: skip
  return itertools.islice(batches, config.eval_batches)


def distill(
  model: Any,
  params: Any,
  tokenizer: Any,
  config: DistillConfig,
  corpora: Corpora | None = None,
  *,
  watch: Callable[[], None] = lambda: None,
) -> Distilled:
  """Trains (or resumes) a drafter and saves it into ``config.trainer.work_dir``, if there is one.

  The folder then works as ``generate(drafter=folder)``. The target's parameters don't change; with
  ``config.joint`` the folder's ``target`` is the model that the drafter is for.

  Args:
    model, params: the target, in either layout.
    tokenizer: the target's.
    corpora: what ``load_corpora`` returned, for callers that train several drafters.
    watch: called before every step.
  """
  begin = time.perf_counter()
  corpora = load_corpora(config.data, tokenizer) if corpora is None else corpora
  heads = None
  if config.joint is not None:
    first = distill(model, params, tokenizer, _heads_first(config), corpora, watch=watch)
    if first.drafter is None:
      return first
    heads = to_host(first.params)
  trainer, task = make_trainer(model, params, corpora, config, watch, heads)
  try:
    result = trainer.train()
  finally:
    trainer.data.close()
  if result.interrupted:
    return Distilled(None, result.params, result, time.perf_counter() - begin)
  facts = {
    "data": config.data, "steps": result.step, "batch_size": config.batch_size,
    "seq_len": config.seq_len,
  }  # fmt: skip
  batches, folder = held_out(corpora, config, Share()), config.trainer.work_dir
  saved: dict[str, Any] = {"num_nodes": config.num_nodes, "extra": facts}
  if config.joint is None:
    drafter = finish(task, result.params, batches, folder, **saved)
    return Distilled(drafter, result.params, result, time.perf_counter() - begin)
  found = task.finish(result.params, batches, folder, tokenizer=tokenizer, **saved)
  drafter, target, heads = found
  return Distilled(drafter, heads, result, time.perf_counter() - begin, target)


def _heads_first(config: DistillConfig) -> DistillConfig:
  """The heads' own run, before the joint one."""
  work_dir = config.trainer.work_dir
  if work_dir is not None:
    folder = Path(work_dir)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
      raise UserError(  # now, not when the heads are done
        f"work_dir {work_dir!r} holds files that are no training run (no config.json); give a new "
        "folder"
      )
    work_dir = str(folder.with_name(f"{folder.name}-heads"))
  trainer = dataclasses.replace(config.trainer, work_dir=work_dir)
  return dataclasses.replace(config, joint=None, trainer=trainer)


def seconds_per_step(model: Any, params: Any, corpora: Corpora, config: DistillConfig) -> float:
  """How long one training step takes here, compilation apart: the better of two after a first."""
  import jax

  trainer, _ = make_trainer(model, params, corpora, config)
  state, batches = trainer.init_state(), make_batches(
    corpora.train, batch_size=config.batch_size, seq_len=config.seq_len
  )  # fmt: skip
  frozen, batch = trainer.place_frozen(), next(batches)
  step, best = trainer.compile(batch), float("inf")
  for i in range(3):
    begin = time.perf_counter()
    with trainer._context():
      state, metrics = step(state, frozen, trainer.place_batch(batch))
    jax.block_until_ready((state, metrics))
    if i:
      best = min(best, time.perf_counter() - begin)
  return best
