# SPDX-License-Identifier: Apache-2.0
"""A small decoder as drafter: rollback of its own state, all three ways to draw, rule ratio."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.decoding.sampling import request_keys
from jaxdec.drafting import DraftModel
from jaxdec.errors import UserError
from tests.decoding.chi_square import chi_square_p
from tests.decoding.targets import target

PROMPTS = [[1, 2, 3, 4, 1], [5]]
PLAIN = Sampler(temperature=1.0)
OPTIONS = dict(max_new_tokens=25, stop=None, seed=2)


@pytest.mark.parametrize("kind", ["linear"])
def test_self_draft_is_always_accepted(kind):
  """Every draft is right, step after step, only if the draft state keeps up with the target's."""
  model, params = target(kind)
  plain = generate(model, params, PROMPTS, sampler=PLAIN, **OPTIONS)
  out = generate(
    model,
    params,
    PROMPTS,
    sampler=PLAIN,
    **OPTIONS,
    drafter=DraftModel(model=model, num_drafts=3),
    drafter_params=params,
  )
  assert out.tokens == plain.tokens
  assert out.stats.tokens_per_step == 4.0


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_rollback_after_rejections(kind):
  """Another model's drafts are often rejected; what is accepted is what a draft model without any
  state, rereading the whole text for every draft, would have got accepted.
  """
  model, params = target("attention")
  draft, draft_params = target(kind, seed=1)
  plain = generate(model, params, PROMPTS, sampler=PLAIN, **OPTIONS)
  out = generate(
    model,
    params,
    PROMPTS,
    sampler=PLAIN,
    **OPTIONS,
    drafter=DraftModel(model=draft, num_drafts=3),
    drafter_params=draft_params,
  )
  assert out.tokens == plain.tokens
  # Expected acceptance, recomputed without any cache: walk the emitted text in passes.
  forward = jax.jit(lambda t: draft.apply({"params": draft_params}, t).logits)
  steps = []
  keys = request_keys(2, 2)
  for row, prompt in enumerate(PROMPTS):
    text = [*prompt, *plain.tokens[row]]
    end = len(text)
    at = len(prompt)  # the root
    while at < end - 1:
      guess, drafted = text[: at + 1], 0
      for _ in range(3):
        padded = jnp.asarray([guess + [0] * (40 - len(guess))])
        logits = forward(padded)[:, len(guess) - 1]
        token = int(PLAIN.draw(logits, keys[row : row + 1], jnp.asarray([len(guess)]))[0])
        if len(guess) >= end or token != text[len(guess)]:
          break
        guess.append(token)
        drafted += 1
      steps.append(min(drafted + 1, end - 1 - at))
      at += steps[-1]
  assert sum(out.stats.row_steps) == len(steps)
  assert out.stats.tokens_per_step == pytest.approx(np.mean(steps))
  assert 1.0 < out.stats.tokens_per_step < 4.0


def test_greedy_drafts_keep_the_output():
  model, params = target()
  draft, draft_params = target(seed=1)
  for sampler in (Sampler(), PLAIN):
    plain = generate(model, params, PROMPTS, sampler=sampler, **OPTIONS)
    out = generate(
      model,
      params,
      PROMPTS,
      sampler=sampler,
      **OPTIONS,
      drafter_params=draft_params,
      drafter=DraftModel(model=draft, num_drafts=2, draws="greedy"),
    )
    assert out.tokens == plain.tokens


def test_ratio_gives_the_targets_law():
  vocab, batch = 4, 4096
  model, params = target(vocab=vocab)
  draft, draft_params = target(vocab=vocab, seed=1)
  texts = np.stack(np.meshgrid(*[range(vocab)] * 3, indexing="ij"), -1).reshape(-1, 3)
  full = jnp.asarray([[1, 3, *t] for t in texts.tolist()])
  log_p = PLAIN.log_probs(model.apply({"params": params}, full).logits)
  log_p = jnp.take_along_axis(log_p[:, 1:4], full[:, 2:, None], -1).sum((1, 2))
  law = np.exp(np.asarray(log_p, np.float64))
  drafter = DraftModel(model=draft, num_drafts=2, draws="sampled")
  seen = np.zeros(64)
  for seed in range(4):
    out = generate(
      model,
      params,
      [[1, 3]] * batch,
      max_new_tokens=3,
      sampler=PLAIN,
      stop=None,
      seed=seed,
      drafter=drafter,
      drafter_params=draft_params,
      rule="ratio",
    )
    seen += np.bincount(np.asarray(out.tokens) @ [16, 4, 1], minlength=64)
  assert chi_square_p(seen, law) > 1e-4
  assert out.stats.tokens_per_step > 1.1


def test_ratio_needs_sampled_drafts():
  model, params = target()
  with pytest.raises(UserError, match="ratio"):
    generate(
      model,
      params,
      PROMPTS,
      sampler=PLAIN,
      rule="ratio",
      drafter=DraftModel(model=model),
      drafter_params=params,
      **OPTIONS,
    )
  with pytest.raises(UserError, match="draws"):
    DraftModel(model=model, draws="lucky")
