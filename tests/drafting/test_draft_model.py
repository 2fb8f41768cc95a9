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


def test_shared_noise_matches_at_least_as_often_as_its_bound():
  """One draft per step: matched in (1 - TV) / (1 + TV) of cases or more, with noise of its own in
  ``sum p q`` of them."""
  vocab, batch = 5, 8192
  model, params = target(vocab=vocab)
  # Flat laws with much in common.
  params = jax.tree.map(lambda x: 0.5 * x, params)
  draft_params = jax.tree.map(
    lambda x, y: 0.2 * x + 0.4 * y, params, target(vocab=vocab, seed=1)[1]
  )
  texts = jnp.asarray([[1, 3, t] for t in range(vocab)])
  read = lambda m, w: np.asarray(  # noqa: E731
    jax.nn.softmax(m.apply({"params": w}, texts).logits), np.float64
  )
  p, q = read(model, params), read(model, draft_params)
  first = p[0, 1]  # of the token the prompt ends in; the draft is the one after it
  p, q = p[:, 2], q[:, 2]
  distance = 0.5 * np.abs(p - q).sum(-1)
  bound = first @ ((1 - distance) / (1 + distance))
  independent, best = first @ (p * q).sum(-1), first @ (1 - distance)
  rates = {}
  for draws in ("shared", "sampled"):
    out = generate(
      model,
      params,
      [[1, 3]] * batch,
      max_new_tokens=3,
      sampler=PLAIN,
      stop=None,
      seed=4,
      drafter=DraftModel(model=model, num_drafts=1, draws=draws),
      drafter_params=draft_params,
    )
    rates[draws] = np.mean(np.asarray(out.stats.row_steps) == 1)  # two tokens in one step
  error = 4 * np.sqrt(0.25 / batch)
  assert bound - error < rates["shared"] < best + error
  assert abs(rates["sampled"] - independent) < error
  assert rates["sampled"] + error < bound  # so the bound says something


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
