# SPDX-License-Identifier: Apache-2.0
"""DFlash: blocks against a context; anchors, both label conventions, the context's reach."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import VOCAB, batch_of, loss_of, run, target
from universal import Universal, forced_logits

from jaxdec.decoding import generate
from jaxdec.drafting.dflash import DFlash, context_layers
from jaxdec.errors import UserError


class TestDFlash(Universal):
  kind = DFlash
  options = {"num_layers": 2}  # noqa: RUF012

  @pytest.mark.parametrize("weighting", ["power", "dpace"])
  def test_loss_by_hand(self, weighting):
    """From the logits that decoding computes: weights ``exp(-(k-1)/gamma)``, one mean over all."""
    decay = math.exp(-1 / 4) if weighting == "power" else 1.0
    drafter, t = self.make(weighting=weighting, depth_decay=decay), target()
    params, length, depths = self.params(drafter), 10, drafter.num_heads
    text = np.random.default_rng(0).integers(0, VOCAB, length)
    mask = np.ones(length)
    mask[6] = 0  # no block begins at 5 or 6, and earlier ones end before 6
    slots = length - 2
    served = forced_logits(
      drafter, params, t, np.tile(np.append(text, [0] * depths), (slots, 1)),
      np.arange(1, slots + 1), depths,
    )  # fmt: skip
    losses, weights = [], []
    for slot in range(slots):
      through, probs = 1.0, []
      for k in range(1, depths + 1):
        if slot + 1 + k >= length or not all(mask[slot + 1 : slot + 2 + k]):
          break
        log_q = jax.nn.log_softmax(jnp.asarray(served[k - 1][slot]))[text[slot + 1 + k]]
        losses.append(-float(log_q))
        weights.append(math.exp(-(k - 1) / 4))
        through *= 0.5 * math.exp(float(log_q)) + 0.5
        probs.append(through)
      if weighting == "dpace" and probs:
        weights[-len(probs) :] = np.cumsum(probs[::-1])[::-1]
    batch = batch_of([text], loss_mask=[mask])
    loss, _ = loss_of(drafter, params, t, run(t, batch, drafter.capture), batch)
    np.testing.assert_allclose(loss, np.average(losses, weights=weights), rtol=2e-5)


class TestDFlashFromAnchor(Universal):
  kind = DFlash
  options = {"labels": "from_anchor", "anchor_group": 4}  # noqa: RUF012


@functools.cache
def blocks_of(labels):
  """``(batch, features, tokens) -> states [B,A,C,D]`` of the blocks at all anchors."""
  case = TestDFlash if labels == "same_position" else TestDFlashFromAnchor
  drafter, t = case.make(), target()
  params = case.params(drafter)
  text = np.random.default_rng(5).integers(0, VOCAB, (1, 10))
  batch = batch_of(text)
  output = run(t, batch, drafter.capture)

  @jax.jit
  def states(features, anchors):
    slots = drafter.anchors(batch, None)[0]
    changed = {**batch, "tokens": anchors}
    return drafter._blocks(params, t, output.replace(features=features), changed, slots)[0]

  return states, output.features, batch["tokens"]


@pytest.mark.parametrize("labels", ["same_position", "from_anchor"])
def test_what_a_block_sees(labels):
  """The context strictly before its anchor, and all of itself; no other block."""
  states, features, tokens = blocks_of(labels)
  base = states(features, tokens)
  moved = states(tuple(f.at[:, 5].add(1.0) for f in features), tokens)
  changed = np.any(np.asarray(moved != base), axis=-1)  # [A, C]
  assert not changed[:5].any()  # blocks with anchors up to 5
  assert changed[5:].all()  # anchors from 6: every slot of the block
  other = states(features, tokens.at[:, 4].set((tokens[0, 4] + 1) % VOCAB))
  changed = np.any(np.asarray(other != base), axis=-1)
  assert changed[3].all() and not np.delete(changed, 3, axis=0).any()


def test_anchors_are_drawn_without_replacement():
  drafter = TestDFlash.make(num_anchors=6)
  mask = np.ones((2, 16))
  mask[0, 4:] = 0  # leaves the anchors 1 and 2, slots 0 and 1
  batch = batch_of(np.zeros((2, 16)), loss_mask=mask)
  draw = jax.jit(lambda rng: drafter.anchors(batch, rng))
  seen = set()
  for seed in range(40):
    slots, weights = draw(jax.random.key(seed))
    slots, weights = np.asarray(slots), np.asarray(weights)
    assert all(len(set(row)) == 6 for row in slots.tolist())
    assert set(slots[0][weights[0][0] > 0]) == {0, 1}  # all there are, the rest doesn't count
    assert weights[0][1].sum() == 6
    np.testing.assert_array_equal(weights[1][0], (slots[0] == 0) * 1.0)
    seen |= set(slots[1].tolist())
  assert seen == set(range(14))
  slots, _ = drafter.anchors(batch, None)
  np.testing.assert_array_equal(slots[0], np.round(np.linspace(0, 13, 6)))


def test_only_the_context_is_cached():
  """After decoding every layer holds one key per token the target has read, and no draft's."""
  drafter, t = TestDFlash.make(mask_token=7), target()
  params = TestDFlash.params(drafter)
  assert "mask" not in params
  prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
  out = generate(
    t.model, t.params, prompts, max_new_tokens=9, drafter=drafter, drafter_params=params, stop=None
  )
  assert out.tokens == generate(t.model, t.params, prompts, max_new_tokens=9, stop=None).tokens
  assert len(out.drafter_state.layers) == 2
  for layer in out.drafter_state.layers:
    np.testing.assert_array_equal(layer.length, [11, 13])


def test_settings():
  assert context_layers(36) == (2, 10, 18, 26, 34)
  assert context_layers(8) == (2, 3, 4, 5, 6)
  for layers in range(1, 12):
    chosen = context_layers(layers)
    assert list(chosen) == sorted(set(chosen)) and chosen[0] >= 1 and chosen[-1] <= layers
  config = target().model.config
  assert DFlash.for_target(config, num_heads=15).block_size == 16
  assert DFlash.for_target(config, labels="from_anchor").block_size == 7
  for wrong in (
    {"labels": "next"}, {"loss_fraction": 0.5}, {"num_anchors": 0}, {"num_layers": 0},
  ):  # fmt: skip
    with pytest.raises(UserError, match=next(iter(wrong))):
      DFlash.for_target(config, **wrong)
