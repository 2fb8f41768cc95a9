# SPDX-License-Identifier: Apache-2.0
"""The long-context distillation: a few steps with a split teacher are those on one device."""

from __future__ import annotations

import dataclasses

import jax
import pytest

import jaxdec
from experiments.distill_long import config, run
from jaxdec.distillation import make_drafter
from jaxdec.errors import UserError
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.training.tasks.distill import Distill


def test_long_sizes_fit_together():
  recipe = config.long()
  assert recipe.seq_len == recipe.model.max_length
  assert recipe.seq_len % recipe.trainer.mesh.seq == 0
  assert recipe.sequence == config.SEQUENCE


def test_a_plan_needs_no_weights_and_training_does():
  recipe = dataclasses.replace(config.long(), batch_size=1, seq_len=64)
  task = recipe.task()
  assert task.drafter.name == "hydra" and task.drafter.dim == recipe.model.dim
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(task.frozen))
  with pytest.raises(UserError, match="run it with `jaxdec distill`"):
    recipe.make_trainer()


def test_zigzag_rows_are_refused():
  lm = jaxdec.tiny()
  model = lm.model.clone(sequence=SequenceConfig(layout="zigzag"))
  with pytest.raises(UserError, match="distill with layout='contiguous'"):
    Distill(make_drafter(config.tiny(), lm.config), model, lm.params)


@pytest.mark.slow
def test_a_split_teacher_teaches_the_same(tmp_path):
  texts = tmp_path / "texts"
  texts.mkdir()
  for i in range(60):
    text = f"def f_{i}(x):\n  return x + {i}\n" * 8
    (texts / f"{i}.txt").write_text(text, encoding="utf-8")
  job = config.tiny(str(tmp_path / "split"))
  trainer = dataclasses.replace(job.trainer, steps=2)
  job = dataclasses.replace(
    job, trainer=trainer, data=str(texts), batch_size=1, seq_len=64, eval_batches=1
  )
  lm = jaxdec.tiny()
  split = run.run(job, lm)
  whole = run.run(run.on_one_device(job, str(tmp_path / "one_device")), lm)
  assert split.drafter == whole.drafter  # the same tree from the same accuracies
  for ours, theirs in zip(run.losses(str(tmp_path / "split")),
                          run.losses(str(tmp_path / "one_device")), strict=True):  # fmt: skip
    assert ours == pytest.approx(theirs, abs=1e-4)
