# SPDX-License-Identifier: Apache-2.0
"""Acceptance while training: measured with the real tree, and the training does not notice."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "drafting"))
from toy_target import VOCAB, init, randomized, target

from jaxdec.data import Corpus
from jaxdec.data.mixture import Mixture
from jaxdec.decoding import generate
from jaxdec.distillation import Corpora, DistillConfig, distill, held_out
from jaxdec.drafting.kinds import KINDS
from jaxdec.drafting.static_tree import expected_tokens, greedy_tree
from jaxdec.errors import UserError
from jaxdec.models import Decoder, stack_layers
from jaxdec.models.flops import per_token
from jaxdec.training import OptimizerConfig, TrainerConfig, read_metrics
from jaxdec.training.acceptance import Acceptance, held_out_prompts
from jaxdec.training.tasks.distill import Distill, measure_accuracy


def corpus(seed, labels=False):
  rng = np.random.default_rng(seed)
  ids = [rng.integers(0, VOCAB, n) for n in rng.integers(4, 40, 12)]
  marks = [np.arange(len(x)) >= 3 for x in ids] if labels else None
  return Corpus.from_token_lists(ids, labels=marks)


CORPORA = Corpora(corpus(0), corpus(1))
SETTINGS = {"batch_size": 2, "seq_len": 16, "num_nodes": 5, "eval_batches": 2}


def config(folder, **options):
  return DistillConfig(
    drafter="medusa", options={"num_heads": 2}, **{**SETTINGS, **options},
    trainer=TrainerConfig(
      steps=5, work_dir=str(folder), progress=False, log_every=1, eval_every=2,
      optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    ),
  )  # fmt: skip


@functools.cache
def measured():
  t = target()
  task = Distill(KINDS["medusa"].for_target(t.model.config, num_heads=2), t.model, t.params)
  return task, randomized(init(task.drafter, t))


def inspector(task, prompts=None, **options):
  prompts = held_out_prompts(CORPORA.validation, 3) if prompts is None else prompts
  batches = functools.partial(held_out, CORPORA, DistillConfig(**SETTINGS))
  return Acceptance(task, prompts, batches, **{"num_nodes": 5, "max_new_tokens": 8, **options})


def test_it_is_what_decoding_with_the_best_tree_gives():
  task, params = measured()
  seen = inspector(task)(params)
  accuracy = measure_accuracy(task, params, held_out(CORPORA, DistillConfig(**SETTINGS)))
  tree = greedy_tree(accuracy, 5)
  assert seen["simulated_tokens_per_step"] == pytest.approx(expected_tokens(tree, accuracy))
  np.testing.assert_allclose(seen["top1_by_depth"], accuracy[:, 0])
  t = target()
  stats = generate(
    t.model, t.params, held_out_prompts(CORPORA.validation, 3), max_new_tokens=8,
    drafter=dataclasses.replace(task.drafter, tree=tree), drafter_params=params,
  ).stats  # fmt: skip
  assert seen["tokens_per_step"] == stats.tokens_per_step
  assert seen["accepted_by_depth"].tolist() == list(stats.accepted_by_depth)
  assert 1 + sum(seen["accepted_by_depth"]) == pytest.approx(seen["tokens_per_step"])


def test_targets_in_the_layout_of_training_decode_too():
  """Layers stacked for the scan, parameters boxed with their axis names."""
  task = measured()[0]
  t = target()
  shapes = jax.eval_shape(
    Decoder(t.model.config, layout="scanned").init, jax.random.key(0), np.zeros((1, 2), np.int32)
  )["params"]
  stacked = jax.tree.map(
    lambda box, leaf: box.replace_boxed(leaf), shapes, stack_layers(t.params, t.model.config),
    is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))  # fmt: skip
  scanned = Distill(task.drafter, Decoder(t.model.config, layout="scanned"), stacked)
  a, b = inspector(task), inspector(scanned)
  for x, y in zip(*(jax.tree.leaves(i.target()[1]) for i in (a, b)), strict=True):
    np.testing.assert_array_equal(x, y)
  assert b.target()[0] == t.model


def test_training_does_not_notice(tmp_path):
  t = target()
  plain = distill(t.model, t.params, None, config(tmp_path / "plain"), CORPORA)
  watched = distill(
    t.model, t.params, None,
    config(tmp_path / "watched", acceptance_every=2, acceptance_prompts=3, acceptance_tokens=8),
    CORPORA,
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, plain.params, watched.params)
  assert plain.drafter == watched.drafter
  rows = [read_metrics(tmp_path / name) for name in ("plain", "watched")]
  names = ("step", "kind", "loss", "grad_norm", "top1")
  kept = [[{n: r.get(n) for n in names} for r in run if r["kind"] != "inspect"] for run in rows]
  assert kept[0] == kept[1]
  seen = read_metrics(tmp_path / "watched", "inspect")
  assert [row["step"] for row in seen] == [2, 4, 5]
  for row in seen:
    assert 1 <= row["tokens_per_step"] <= 3 and len(row["accepted_by_depth"]) >= 1
    assert row["simulated_tokens_per_step"] >= 1 and len(row["top1_by_depth"]) == 2
  # The last one is the finished drafter's.
  described = watched.drafter
  stats = generate(
    t.model, t.params, held_out_prompts(CORPORA.validation, 3), max_new_tokens=8,
    drafter=described, drafter_params=watched.params,
  ).stats  # fmt: skip
  assert seen[-1]["tokens_per_step"] == stats.tokens_per_step
  assert read_metrics(tmp_path / "plain", "inspect") == []


@pytest.mark.parametrize("teacher", ["cached", "streamed"])
def test_teachers_by_name(tmp_path, teacher, capsys):
  """A run through ``distill``: trains, evaluates, and leaves no thread behind."""
  import threading

  t = target()
  done = distill(t.model, t.params, None, config(tmp_path / "run", teacher=teacher), CORPORA)
  assert done.result.step == 5 and done.drafter is not None
  if teacher == "cached":
    online = Distill(done.drafter, t.model, t.params)
    apart = Distill(done.drafter, t.model, t.params, runs_target=False)
    flops = [task.flops_per_token(done.params, 16) for task in (online, apart)]
    c = t.model.config
    assert flops[0] - flops[1] == per_token(c, 16).forward - 2.0 * c.dim * c.vocab_size
    assert "teacher states of" in capsys.readouterr().out
    assert (tmp_path / "run-teacher" / "teacher.json").is_file()
  assert "teacher" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["cached", "streamed"])
def test_a_run_that_died_goes_on_to_the_same_bits(tmp_path, teacher):
  t = target()
  steps = []

  def dies():
    steps.append(1)
    if len(steps) == 4:
      raise RuntimeError("lost")

  def job(name):
    made = config(tmp_path / name, teacher=teacher, acceptance_every=3, acceptance_tokens=4)
    return dataclasses.replace(made, trainer=dataclasses.replace(made.trainer, checkpoint_every=2))

  whole = distill(t.model, t.params, None, job("whole"), CORPORA)
  with pytest.raises(RuntimeError, match="lost"):
    distill(t.model, t.params, None, job("cut"), CORPORA, watch=dies)
  resumed = distill(t.model, t.params, None, job("cut"), CORPORA)
  jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
  seen = [read_metrics(tmp_path / name, "inspect") for name in ("whole", "cut")]
  assert seen[0] == seen[1] and [row["step"] for row in seen[0]] == [3, 5]


def test_prompts_are_the_beginnings_of_documents():
  plain, marked = corpus(1), corpus(2, labels=True)
  assert held_out_prompts(plain, 2, max_tokens=5) == [plain[i][:5].tolist() for i in range(2)]
  assert held_out_prompts(marked, 4) == [marked[i][:3].tolist() for i in range(4)]
  mixed = held_out_prompts(Mixture((plain, marked), (1, 1)), 3, max_tokens=5)
  assert mixed == [plain[0][:5].tolist(), marked[0][:3].tolist(), plain[1][:5].tolist()]
  assert held_out_prompts(plain, 2, max_tokens=5) == held_out_prompts(plain, 2, max_tokens=5)


def test_mistakes(tmp_path):
  with pytest.raises(UserError, match="no document to prompt with"):
    held_out_prompts(Corpus.from_token_lists([]), 2)
  with pytest.raises(UserError, match="reads 512 at most"):
    inspector(measured()[0], max_new_tokens=600)
  for options, complaint in (
    ({"teacher": "offline"}, "teacher must be online, streamed or cached"),
    ({"acceptance_every": 0}, "acceptance_every must be at least 1"),
  ):
    with pytest.raises(UserError, match=complaint):
      DistillConfig(**options)
  with pytest.raises(UserError, match="teacher='cached' needs a folder"):
    DistillConfig(teacher="cached")
