# SPDX-License-Identifier: Apache-2.0
"""Stopping a chain by the law it is drawn from: lossless, as its threshold says, passes skipped."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import VOCAB, init, random_batch, randomized, replace, run, target
from universal import forced_logits, start

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting.base import Context, Target
from jaxdec.drafting.checkpoint import from_config, load_drafter, save_drafter, to_config
from jaxdec.drafting.eagle3 import Eagle3
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.stop_early import StopEarly, fit_stopping, law_features, logistic
from jaxdec.drafting.vocabulary import DraftVocabulary
from jaxdec.errors import UserError
from jaxdec.lm import LM


@functools.cache
def stopping():
  """A random EAGLE-3 under a head fitted to it."""
  t = target()
  base = Eagle3.for_target(t.model.config, num_heads=4)
  params = randomized(init(base, t), scale=0.5)
  batch = random_batch(3, rows=4, length=24)
  head = fit_stopping(base, params, t, [(batch, run(t, batch, base.capture))], greedy=False)
  return StopEarly(drafter=base), {"drafter": params, "head": head}


def test_text_is_the_targets_own():
  drafter, params = stopping()
  t = target()
  options = dict(max_new_tokens=20, sampler=Sampler(1.0), stop=None, seed=4)
  prompts = [[1, 2, 3, 4, 5], [7, 8]]
  plain = generate(t.model, t.params, prompts, **options)
  drafter = replace(drafter, threshold=0.97, widths=(2, 3))
  out = generate(t.model, t.params, prompts, drafter=drafter, drafter_params=params, **options)
  assert out.tokens == plain.tokens


def test_threshold_by_hand():
  """Chances of the laws that drafting meets; rows stop on their own, passes when all have."""
  drafter, params = stopping()
  t, rows = target(), 5
  rng = np.random.default_rng(1)
  text = np.pad(rng.integers(0, VOCAB, (rows, 9)), ((0, 0), (0, 6)))
  state, root = start(drafter.drafter, params["drafter"], t, text, [8] * rows)
  context = Context(root=root, length=jnp.full(rows, 8), history=text, target=t, sampler=None)

  @functools.partial(jax.jit, static_argnums=0)
  def propose(drafter):
    return drafter.propose(params, state, context, None)[0]

  whole = jax.device_get(propose(replace(drafter, threshold=1.0)))
  assert whole.valid.all()
  plain = jax.jit(lambda: drafter.drafter.propose(params["drafter"], state, context, None)[0])()
  np.testing.assert_array_equal(whole.tokens, plain.tokens)
  text[:, 9:13] = whole.tokens[:, 1:]
  laws = forced_logits(drafter.drafter, params["drafter"], t, text, [8] * rows, 4)
  chances = [
    jax.nn.sigmoid(law_features(law, k) @ params["head"]["kernel"] + params["head"]["bias"])
    for k, law in enumerate(laws, 1)
  ]
  risk = 1 - np.cumprod(np.stack(chances, 1), axis=1)
  threshold = float(np.median(risk[:, 1]))
  tree = jax.device_get(propose(replace(drafter, threshold=threshold)))
  drafts = 1 + np.sum(risk[:, :-1] <= threshold, axis=1)
  np.testing.assert_array_equal(tree.valid.sum(1), 1 + drafts)
  assert len(set(drafts.tolist())) > 1
  for row in range(rows):
    np.testing.assert_array_equal(
      tree.tokens[row, : drafts[row] + 1], whole.tokens[row, : drafts[row] + 1]
    )
  shortest = jax.device_get(propose(replace(drafter, threshold=0.0)))
  np.testing.assert_array_equal(shortest.valid.sum(1), 2)
  assert not shortest.tokens[:, 2:].any()  # no pass was made: its logits are zeros


@pytest.mark.parametrize("vocabulary", [None, DraftVocabulary(range(0, VOCAB, 2), VOCAB)])
def test_it_is_stored_whole(vocabulary, tmp_path):
  """Drafter, head, threshold and widths come back, to the bit, where a folder is a drafter."""
  drafter, params = stopping()
  t = target()
  if vocabulary is not None:
    base = Eagle3.for_target(t.model.config, num_heads=4, vocabulary=vocabulary)
    drafter, params = StopEarly(drafter=base), {**params, "drafter": init(base, t)}
  drafter = replace(drafter, threshold=0.97, widths=(2, 3))
  save_drafter(tmp_path, drafter, params, t)
  loaded, read = LM(t.model, t.params).drafter(tmp_path)
  assert loaded == drafter
  assert jax.tree.structure(read) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, read, params)
  other = Target(t.model, jax.tree.map(lambda x: x + 1, t.params), None)
  with pytest.raises(UserError, match=r"stop_early drafter .* other weights"):
    load_drafter(tmp_path, other)
  with pytest.raises(UserError, match=r"kind 'eagle4' \(did you mean 'eagle'"):
    from_config({**to_config(drafter), "drafter": {"kind": "eagle4"}})


def test_logistic_regression():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4000, 4)) * [1, 5, 0.2, 1] + [0, 3, 0, 2]
  kernel, bias = np.array([1.0, -0.3, 2.0, 0.0]), 0.7
  p = 1 / (1 + np.exp(-(x @ kernel + bias)))
  found, constant = logistic(x, p, np.ones(len(x)), ridge=1e-9)
  np.testing.assert_allclose(found, kernel, atol=1e-3)
  assert constant == pytest.approx(bias, abs=1e-3)


def test_settings():
  drafter, _ = stopping()
  bushy = StaticTree.from_paths([(0,), (1,)])
  with pytest.raises(UserError, match="chain"):
    StopEarly(drafter=replace(drafter.drafter, tree=bushy))
  with pytest.raises(UserError, match="threshold"):
    replace(drafter, threshold=2.0)
