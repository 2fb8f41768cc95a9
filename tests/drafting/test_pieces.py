# SPDX-License-Identifier: Apache-2.0
"""Losses by pieces of the slots are the plain ones: value, gradients, metrics, accuracy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from toy_target import VOCAB, init, random_batch, randomized, run, target

from jaxdec.drafting import pieces
from jaxdec.drafting.base import Target
from jaxdec.drafting.eagle3 import Eagle3
from jaxdec.drafting.medusa import Medusa
from jaxdec.drafting.objectives import Term
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.training.tasks.distill import Distill
from pallas_kernels.testing import COMPILE_ONCE

KEPT = DraftVocabulary((0, 1, 2, 5, 6, 9, 11, 12, 17, 20, 22), VOCAB)
MIXED = (Term("soft"), Term("lk", 0.5), Term("hard", 0.3), Term("smooth_l1", 2.0))


class Unordered(Medusa):
  """Depths whose slots don't say where they lie share no law."""

  def examples(self, *args, **kwargs):
    for example in super().examples(*args, **kwargs):
      yield example.replace(start=None)


def numbers(drafter, length=19):
  """Loss, metrics, gradients, rank table; without the target's logits."""
  t = target()
  batch = random_batch(3, rows=2, length=length)
  batch["loss_mask"] = batch["loss_mask"].at[0, 7:9].set(0)
  params = randomized(init(drafter, t), scale=0.5)
  output = run(t, batch, drafter.capture).replace(logits=None)

  def everything(params, target_params):
    t_ = Target(t.model, target_params, None)
    loss = lambda p: drafter.loss(p, t_, output, batch, None)  # noqa: E731
    return jax.value_and_grad(loss, has_aux=True)(params), drafter.accuracy(
      params, t_, output, batch
    )

  return jax.jit(everything, compiler_options=COMPILE_ONCE)(params, t.params)


@pytest.mark.parametrize(
  ("kind", "options"),
  [
    (Eagle3, {"vocabulary": KEPT, "objective": MIXED}),
    (Medusa, {"objective": "kl", "normalize": "global"}),
    (Unordered, {"objective": MIXED}),
  ],
)
@pytest.mark.parametrize("slots", [3, 9])
def test_pieces_change_nothing(monkeypatch, kind, options, slots):
  """Three slots a row leave a last piece that isn't full; nine are two pieces."""
  drafter = kind.for_target(target().model.config, num_heads=3, **options)
  monkeypatch.setattr("jaxdec.drafting.trained.OVERLAP_STRIDE", 1)
  plain = numbers(drafter)
  monkeypatch.setattr(pieces, "SLOTS", 1)
  monkeypatch.setattr(pieces, "LOGITS", 2 * slots * VOCAB)
  cut = numbers(drafter)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), plain, cut)


def test_logits_of_all_slots_never_exist(monkeypatch):
  """No array in the training step is as large as one depth's logits, the target's included."""
  t, length, heads = target(), 64, 3
  drafter = Eagle3.for_target(t.model.config, num_heads=heads, hidden_dim=8)
  batch = random_batch(0, rows=2, length=length)
  task = Distill(drafter, t.model, t.params)
  params = init(drafter, t)

  def largest():
    step = jax.jit(jax.grad(lambda p, f: task.loss(p, f, batch, None)[0]))
    text = step.lower(params, task.frozen).compile().as_text()
    return f"f32[2,{length - 1 - 1},{VOCAB}]" in text or f"f32[2,{length},{VOCAB}]" in text

  assert largest()  # the search finds them where they are
  monkeypatch.setattr(pieces, "SLOTS", 1)
  monkeypatch.setattr(pieces, "LOGITS", 2 * 8 * VOCAB)
  assert not largest()


def test_pieces_of_a_batch():
  """At least ``SLOTS`` slots, more where the vocabulary is small, and one a row if all fails."""
  assert pieces._size(2, 2**22) == pieces.SLOTS // 2
  assert pieces._size(1, 16) == pieces.LOGITS // 16
  assert pieces._size(10**9, 16) == 1
