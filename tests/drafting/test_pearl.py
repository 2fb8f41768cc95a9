# SPDX-License-Identifier: Apache-2.0
"""PEARL: the text of plain decoding, in the rounds of a sequential simulation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.decoding.sampling import request_keys
from jaxdec.drafting import Pearl
from jaxdec.drafting.base import Context
from jaxdec.errors import UserError
from tests.decoding.targets import target

PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5], [7, 8, 9, 10] * 5]  # ragged, one of length 1
GREEDY, SAMPLED = Sampler(), Sampler(temperature=1.0)
NEW, WIDTH = 25, 64
OPTIONS = dict(max_new_tokens=NEW, stop=None, seed=2)


def near(kind: str):
  """A draft model that often agrees with the target: the target with weights disturbed."""
  model, params = target(kind)
  noise = target(kind, seed=1)[1]
  return model, jax.tree.map(lambda x, y: 0.8 * x + 0.2 * y, params, noise)


def run(kind="attention", drafter=None, draft_params=None, prompts=PROMPTS, **options):
  model, params = target(kind)
  return generate(
    model, params, prompts, drafter=drafter, drafter_params=draft_params, **{**OPTIONS, **options}
  )


@functools.cache
def plain(kind, sampler):
  return run(kind, sampler=sampler).tokens


def simulate(draft, draft_params, gamma, sampler, prompt, new, key) -> list[int]:
  """Tokens emitted per round, by the paper's description: lists, one row, no cache at all.

  ``new`` is what the target emits, as rule match has it.
  """
  next_token = _next_token(draft, sampler)
  text, rounds, d = [*prompt, new[0]], [], []
  while (begin := len(text)) < len(prompt) + len(new):
    ahead = []
    for _ in range(gamma):
      read = [*text, *d, *ahead]
      ahead.append(
        int(next_token(draft_params, np.array(read + [0] * (WIDTH - len(read))), key, len(read)))
      )
    right = True
    for judged in [*d, ahead[0]]:
      if len(text) == len(prompt) + len(new):
        break
      truth = new[len(text) - len(prompt)]
      text.append(truth)
      right = judged == truth
      if not right:
        break
    d = ahead[1:] if right else []
    rounds.append(len(text) - begin)
  return rounds


@functools.cache
def _next_token(model, sampler):
  @jax.jit
  def next_token(params, tokens, key, length):
    logits = model.apply({"params": params}, tokens[None]).logits[:, length - 1]
    return sampler.draw(logits, key[None], length[None])[0]

  return lambda params, tokens, key, length: next_token(params, tokens, key, jnp.int32(length))


@pytest.mark.parametrize(
  "kind, sampler, gamma, prompts",
  [
    ("attention", SAMPLED, 3, PROMPTS),
    pytest.param("linear", SAMPLED, 3, PROMPTS, marks=pytest.mark.slow),
    ("hybrid", GREEDY, 2, PROMPTS),
    ("attention", GREEDY, 1, PROMPTS[:1]),
  ],
)
def test_text_is_plain_decodings_and_rounds_are_the_papers(kind, sampler, gamma, prompts):
  """That every round is as long as the simulation's says that the draft model's state is right
  after every outcome of a round: its drafts are those of rereading everything."""
  draft, draft_params = near(kind)
  drafter = Pearl(model=draft, num_drafts=gamma)
  out = run(kind, drafter, draft_params, prompts, sampler=sampler)
  assert out.tokens == plain(kind, sampler)[: len(prompts)]
  keys = request_keys(2, 3)
  rounds = [
    simulate(draft, draft_params, gamma, sampler, prompt, new, keys[i])
    for i, (prompt, new) in enumerate(zip(prompts, out.tokens))
  ]
  assert out.stats.row_steps == tuple(map(len, rounds))
  by_depth = [[n > d for row in rounds for n in row] for d in range(1, gamma)]
  assert out.stats.accepted_by_depth == pytest.approx([sum(x) / len(x) for x in by_depth])
  # There were rejections, and blocks that passed whole.
  assert {1, gamma} <= {n for row in rounds for n in row[:-1]}


def test_the_target_as_its_own_draft_model_never_leaves_post():
  model, params = target("attention")
  drafter = Pearl(model=model, num_drafts=3)
  out = run(drafter=drafter, draft_params=params, sampler=SAMPLED)
  assert out.tokens == plain("attention", SAMPLED)
  assert out.stats.row_steps == (1 + 8,) * 3  # of 24 tokens, in PRE 1, then 3 a round
  # A stop inside a block, and budgets that end there.
  stop = out.tokens[0][6]
  want = [t[: t.index(stop) + 1] if stop in t else t for t in out.tokens]
  assert run(drafter=drafter, draft_params=params, sampler=SAMPLED, stop=stop).tokens == want
  for new in (1, 2, 3, 4, 6):
    short = run(drafter=drafter, draft_params=params, sampler=SAMPLED, max_new_tokens=new)
    assert short.tokens == [t[:new] for t in out.tokens]


class Wrong(Pearl):
  """With the target's weights: any token but the target's."""

  def _draw(self, context, logits, position):
    token, law = super()._draw(context, logits, position)
    return (token + 1) % self.vocab_size, law


def test_wrong_drafts_cost_nothing_but_time():
  model, params = target("attention")
  out = run(drafter=Wrong(model=model, num_drafts=3), draft_params=params, sampler=SAMPLED)
  assert out.tokens == plain("attention", SAMPLED)
  assert out.stats.tokens_per_step == 1.0


def test_the_target_need_not_wait_for_the_draft_model():
  """What a round verifies takes no product of matrices to make; what it drafts does."""
  model, params = target("attention")
  drafter = Pearl(model=model, num_drafts=3)
  zeros = jnp.zeros(2, jnp.int32)
  context = Context(
    root=zeros, length=zeros + 1, history=jnp.zeros((2, 32), jnp.int32), target=None, sampler=GREEDY
  )

  def program(part):
    propose = lambda *args: part(*drafter.propose(*args, context, None))  # noqa: E731
    return jax.jit(propose).lower(params, drafter.init_state(2, 32)).as_text()

  assert "dot_general" not in program(lambda tree, state: tree)
  assert "dot_general" in program(lambda tree, state: state.ahead)


def test_mistakes_are_named():
  model, params = target("attention")
  with pytest.raises(UserError, match="judged by rule 'match'"):
    Pearl(model=model, draws="sampled")
  with pytest.raises(UserError, match="num_drafts >= 1"):
    Pearl(model=model, num_drafts=0)
  with pytest.raises(UserError, match="rule 'ratio'"):
    run(drafter=Pearl(model=model), draft_params=params, sampler=SAMPLED, rule="ratio")
