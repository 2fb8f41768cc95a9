# SPDX-License-Identifier: Apache-2.0
"""A whole language-model run as one value: model, data, trainer, and how layers are split.

A configuration file is a Python file with ``get_config() -> Recipe``, or ``get_config(preset)``;
``jaxdec train`` runs it, ``jaxdec plan`` costs it on hardware that is not there.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.errors import UserError
from jaxdec.models import Decoder, DecoderConfig
from jaxdec.models.block_ffn import SparsityLosses
from jaxdec.parallel import batch_share, make_mesh
from jaxdec.parallel.sequence.config import SequenceConfig
from jaxdec.training.config import TrainerConfig
from jaxdec.training.tasks.language_model import LanguageModel
from jaxdec.training.trainer import Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """A language-model training run.

  Attributes:
    model: the decoder. trainer: steps, optimizer, mesh, checkpoints.
    batch_size: sequences per step, over all devices. seq_len: T.
    data: ``python_stdlib``, ``tfds:NAME``, or a folder (or file) of text.
    tokenizer: a model folder with tokenizer.json, or ``tiny`` for the embedded model's.
    eval_batches: held-out batches of each evaluation; 0: none.
    sequence: how layers compute where the mesh has several devices; None: left to XLA, which can
      partition no Pallas kernel.
    layout, remat, dtype, param_dtype: see ``Decoder``. z_loss, loss_chunk, sparsity: see
      ``LanguageModel``.
  """

  model: DecoderConfig
  trainer: TrainerConfig
  batch_size: int
  seq_len: int
  data: str = "python_stdlib"
  tokenizer: str = "tiny"
  eval_batches: int = 16
  sequence: SequenceConfig | None = SequenceConfig()  # noqa: RUF009 (frozen)
  layout: str = "scanned"
  remat: str = "none"
  dtype: str = "bfloat16"
  param_dtype: str = "float32"
  z_loss: float = 0.0
  loss_chunk: int | None = None
  sparsity: SparsityLosses | None = None

  def __post_init__(self):
    for name in ("batch_size", "seq_len"):
      if getattr(self, name) < 1:
        raise UserError(f"Recipe: {name} must be at least 1, got {getattr(self, name)}")
    if self.seq_len > self.model.max_length:
      raise UserError(
        f"seq_len={self.seq_len} is over the model's max_length={self.model.max_length}; shorten "
        "the sequences or raise max_length"
      )

  def decoder(self) -> Decoder:
    return Decoder(
      self.model,
      dtype=jnp.dtype(self.dtype),
      param_dtype=jnp.dtype(self.param_dtype),
      layout=self.layout,
      remat=self.remat,
      sequence=self.sequence,
    )

  def task(self) -> LanguageModel:
    return LanguageModel(
      self.decoder(), z_loss=self.z_loss, loss_chunk=self.loss_chunk, sparsity=self.sparsity
    )

  def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step reads, of all processes."""
    kinds = {"tokens": "int32", "segment_ids": "int32", "positions": "int32", "loss_mask": "bool"}
    shape = (self.batch_size, self.seq_len)
    return {name: jax.ShapeDtypeStruct(shape, np.dtype(kind)) for name, kind in kinds.items()}

  def make_trainer(self) -> Trainer:
    """The trainer with its data opened and tokenised; nothing is compiled.

    Raises:
      UserError: missing data, a tokenizer with more ids than the model, or a mesh that does not
        fit.
    """
    from jaxdec import lm
    from jaxdec.data import make_dataset, open_source, tokenize_documents
    from jaxdec.io.tokenizers import load_tokenizer

    folder = lm.TINY if self.tokenizer == "tiny" else self.tokenizer
    tokenizer = load_tokenizer(folder, model_vocab_size=self.model.vocab_size)
    mesh = make_mesh(**dataclasses.asdict(self.trainer.mesh))
    shape: dict[str, Any] = {"batch_size": self.batch_size, "seq_len": self.seq_len}
    reads = {**shape, "share": batch_share(mesh)}
    train = tokenize_documents(open_source(self.data, "train"), tokenizer)

    def held_out():
      corpus = tokenize_documents(open_source(self.data, "validation"), tokenizer)
      batches = make_dataset(corpus, shuffle=False, num_epochs=1, **reads)
      return itertools.islice(batches, self.eval_batches)

    return Trainer(
      self.task(),
      self.trainer,
      data=make_dataset(train, seed=self.trainer.seed, **reads),
      eval_data=held_out if self.eval_batches else None,
      mesh=mesh,
      extra={"source": self.data, "corpus": train.fingerprint, **shape},
    )


def load_recipe(path: str) -> Recipe:
  """The recipe of a configuration file: ``config.py``, or ``config.py:preset``.

  Raises:
    UserError: no such file, no ``get_config``, a preset it doesn't take, or another result.
  """
  file, _, preset = path.partition(":")
  if not Path(file).is_file():
    raise UserError(f"configuration {file!r} does not exist; give a Python file with get_config()")
  try:
    get_config = runpy.run_path(file).get("get_config")
  except UserError:
    raise
  except Exception as error:
    raise UserError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
  if not callable(get_config):
    raise UserError(f"{file} must define a function get_config() that returns a Recipe")
  takes = inspect.signature(get_config).parameters
  if preset and not takes:
    raise UserError(f"get_config() in {file} takes no preset, got {preset!r}; leave it out")
  if not preset and any(p.default is p.empty for p in takes.values()):
    raise UserError(f"get_config() in {file} needs a preset; write {file}:PRESET")
  try:
    recipe = get_config(preset) if preset else get_config()
  except UserError:
    raise
  except Exception as error:
    what = f"preset {preset!r} of {file}" if preset else file
    raise UserError(f"{what} cannot be made: {type(error).__name__}: {error}") from error
  if not isinstance(recipe, Recipe):
    raise UserError(
      f"get_config() in {file} must return a jaxdec.training.Recipe, got {type(recipe).__name__}"
    )
  return recipe
