# SPDX-License-Identifier: Apache-2.0
"""SpecDec++: stopping keeps the law, saves passes, and follows its threshold."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.decoding.sampling import request_keys
from jaxdec.drafting.base import Context, Prompt, Target
from jaxdec.drafting.specdec import SpecDec
from jaxdec.drafting.stopping import acceptance_logit
from jaxdec.errors import UserError
from tests.decoding.chi_square import chi_square_p
from tests.decoding.targets import target

PROMPTS = [[1, 2, 3, 4, 1], [5]]
OPTIONS = dict(max_new_tokens=25, stop=None, seed=2)
SAMPLED = Sampler(temperature=1.0)


@functools.cache
def drafter_of(kind="attention", vocab=13, seed=1, eos=(), **options):
  """A random draft model whose head says very different things of different tokens."""
  model, params = target(kind, vocab, seed, eos=eos)
  drafter = SpecDec(model=model, **{"num_drafts": 4, "num_blocks": 1, **options})
  head = drafter.init_params(jax.random.key(3))["head"]
  head = jax.tree.map(lambda x: 4 * x, head)
  return drafter, {"model": params, "head": head}


@pytest.mark.parametrize(
  ("kind", "sampler", "options"),
  [
    ("attention", Sampler(), {}),
    ("attention", SAMPLED, {"widths": (2, 3)}),
    ("hybrid", SAMPLED, {}),
  ],
)
def test_text_is_the_targets_whatever_the_head_says(kind, sampler, options):
  model, params = target()
  plain = generate(model, params, PROMPTS, sampler=sampler, **OPTIONS)
  drafter, draft_params = drafter_of(kind, **options)
  out = generate(
    model, params, PROMPTS, sampler=sampler, drafter=drafter, drafter_params=draft_params, **OPTIONS
  )
  assert out.tokens == plain.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropping(SpecDec):
  """The mistake: the draft that ends the round is dropped for being what it is."""

  def propose(self, params, state, context, rng):
    tree, _, state = self.draft(params, state, context)
    bad = tree.tokens[:, 1:] % 2 == 1
    ok = jnp.cumprod(~bad, axis=1).astype(bool) & tree.valid[:, 1:]
    return tree.replace(valid=tree.valid.at[:, 1:].set(ok)), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoppingAfter(SpecDec):
  """The same rule, but the draft that ends the round is kept."""

  def propose(self, params, state, context, rng):
    tree, _, state = self.draft(params, state, context)
    bad = tree.tokens[:, 1:-1] % 2 == 1
    ok = jnp.cumprod(~bad, axis=1).astype(bool) & tree.valid[:, 2:]
    return tree.replace(valid=tree.valid.at[:, 2:].set(ok)), state


@pytest.mark.parametrize("kind", [SpecDec, StoppingAfter, Dropping])
def test_ratio_keeps_the_law_unless_a_draft_is_dropped_for_its_value(kind):
  """Four tokens under rule ``ratio`` against the exact law; the negative control must fail."""
  vocab, batch = 4, 4096
  model, params = target(vocab=vocab)
  drafter, draft_params = drafter_of(vocab=vocab, num_drafts=3, draws="sampled", threshold=0.3)
  drafter = kind(**{f.name: getattr(drafter, f.name) for f in dataclasses.fields(drafter)})
  texts = np.stack(np.meshgrid(*[range(vocab)] * 4, indexing="ij"), -1).reshape(-1, 4)
  full = jnp.asarray([[1, 3, *t] for t in texts.tolist()])
  log_p = SAMPLED.log_probs(model.apply({"params": params}, full).logits)
  log_p = jnp.take_along_axis(log_p[:, 1:5], full[:, 2:, None], -1).sum((1, 2))
  law = np.exp(np.asarray(log_p, np.float64))
  seen = np.zeros(256)
  for seed in range(4):
    out = generate(
      model, params, [[1, 3]] * batch, max_new_tokens=4, sampler=SAMPLED, stop=None, seed=seed,
      drafter=drafter, drafter_params=draft_params, rule="ratio",
    )  # fmt: skip
    seen += np.bincount(np.asarray(out.tokens) @ [64, 16, 4, 1], minlength=256)
  p = chi_square_p(seen, law)
  assert p < 1e-6 if kind is Dropping else p > 1e-4
  if kind is SpecDec:
    assert out.stats.tokens_per_step > 1.2


def round_of(drafter, params, batch=2, prompt=5):
  """One round from a random text: tree, chances, state."""
  text = jnp.asarray(np.random.default_rng(0).integers(0, drafter.vocab_size, (batch, prompt + 1)))
  lengths = jnp.full(batch, prompt)
  context = Context(
    root=text[:, prompt], length=lengths, history=jnp.pad(text, ((0, 0), (0, 58))), target=None,
    sampler=SAMPLED, keys=request_keys(0, batch),
  )  # fmt: skip

  @jax.jit
  def run(params):
    state = drafter.init_state(batch, 64)
    prompt_ = Prompt(context.history, lengths, context.root)
    state = drafter.start(params, state, prompt_, None, Target(None, None, None))
    return drafter.draft(params, state, context)

  tree, chances, state = jax.device_get(run(params))
  return tree, chances, state, context


def test_threshold_by_hand():
  """Chances are the head's on the state that has just read the draft; one draft of delay."""
  drafter, params = drafter_of(num_drafts=7, threshold=1.0)
  batch = 6
  whole, chances, state, context = round_of(drafter, params, batch)
  assert whole.valid.all()
  np.testing.assert_array_equal(state.length, 5 + 7)
  model = drafter.model
  full = np.concatenate([context.history[:, :6], whole.tokens[:, 1:]], axis=1)
  hidden = model.apply({"params": params["model"]}, jnp.asarray(full)).hidden[:, 6:-1]
  expected = jax.nn.sigmoid(acceptance_logit(params["head"], hidden))
  np.testing.assert_allclose(chances[:, :-1], expected, atol=1e-5)
  counts = set()
  for threshold in (0.0, 0.3, 0.7):
    tree, _, state, _ = round_of(dataclasses.replace(drafter, threshold=threshold), params, batch)
    survival = np.cumprod(chances[:, :-1], axis=1)
    drafts = np.minimum(2 + np.sum(1 - survival <= threshold, axis=1), 7)
    np.testing.assert_array_equal(tree.valid.sum(axis=1), 1 + drafts)
    for row in range(batch):
      n = drafts[row] + 1
      np.testing.assert_array_equal(tree.tokens[row, :n], whole.tokens[row, :n])
    np.testing.assert_array_equal(state.length, 5 + drafts.max())  # passes end with the last row
    counts |= set(drafts.tolist())
    assert threshold or set(drafts) == {2}
  assert len(counts) > 2


def test_a_drafted_end_of_text_ends_the_round():
  drafter, params = drafter_of(num_drafts=7, threshold=1.0)
  whole, *_ = round_of(drafter, params, 6)
  eos = int(whole.tokens[0, 3])
  stopping, _ = drafter_of(num_drafts=7, threshold=1.0, eos=(eos,))
  tree, *_ = round_of(stopping, params, 6)
  for row in range(6):
    where = np.flatnonzero(whole.tokens[row, 1:] == eos)
    assert tree.valid[row].sum() == 1 + (where[0] + 1 if len(where) else 7)


def test_settings():
  model, _ = target()
  with pytest.raises(UserError, match="threshold"):
    SpecDec(model=model, threshold=1.5)
  with pytest.raises(UserError, match="widths"):
    SpecDec(model=model, num_drafts=3, widths=(6,))
