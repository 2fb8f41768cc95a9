# SPDX-License-Identifier: Apache-2.0
"""Early-exit self-drafting, fixed (LayerSkip) and chosen each round (DEL)."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import VOCAB, target
from universal import SAMPLERS, plain

from jaxdec.decoding import generate
from jaxdec.decoding.executables import compilations
from jaxdec.decoding.sampling import request_keys
from jaxdec.drafting import DynamicExit, EarlyExit
from jaxdec.drafting.base import Accepted, Context, Prompt, Target, TargetOutput
from jaxdec.drafting.dynamic_exit import ExitStatistics, choose, measured_cost
from jaxdec.drafting.early_exit import round_cost, speculate, verify_from_exit
from jaxdec.errors import UserError
from jaxdec.models import Decoder, LayerConfig
from tests.decoding.targets import target as any_target

PROMPTS = tuple(
  tuple(int(x) for x in np.random.default_rng(3).integers(0, VOCAB, n)) for n in (5, 11, 2)
)
FIXED = EarlyExit(exit=2, num_drafts=3)
DYNAMIC = DynamicExit(max_drafts=4, widths=(2,))


def decode(drafter, sampler="greedy", tokens=21, prompts=PROMPTS, seed=5, **kwargs):
  t = target()
  return generate(
    t.model, t.params, [list(p) for p in prompts], max_new_tokens=tokens,
    sampler=SAMPLERS[sampler], drafter=drafter, stop=None, seed=seed, **kwargs,
  )  # fmt: skip


@pytest.mark.parametrize(
  ("drafter", "sampler"),
  [
    (FIXED, "greedy"),
    (DYNAMIC, "sampled"),
    pytest.param(FIXED, "sampled", marks=pytest.mark.slow),
    pytest.param(DYNAMIC, "greedy", marks=pytest.mark.slow),
    pytest.param(DynamicExit(max_drafts=4), "greedy", marks=pytest.mark.slow),
  ],
)
def test_lossless(drafter, sampler):
  assert decode(drafter, sampler).tokens == plain(sampler, PROMPTS, 21)


@pytest.mark.slow
def test_lossless_in_a_window():
  """Attention that forgets (layer 1 sees 5 positions, fewer than prompt and drafts together)."""
  t = windowed()
  prompt = [[3, 1, 4, 1, 5, 9, 2, 6]]
  run = functools.partial(generate, t.model, t.params, prompt, max_new_tokens=20, stop=None)
  expected = run()
  assert run(drafter=EarlyExit(exit=2, num_drafts=7)).tokens == expected.tokens


@functools.cache
def windowed():
  t = target()
  layers = list(t.model.config.layers)
  layers[1] = LayerConfig(dataclasses.replace(layers[1].mixer, window=5), layers[1].mlp)
  return Target(Decoder(dataclasses.replace(t.model.config, layers=tuple(layers))), t.params, None)


def test_all_layers_draft_the_target_itself():
  """Exit L: every draft is accepted, sampled ones too, since they share the target's noise."""
  out = decode(EarlyExit(exit=3, num_drafts=3), "sampled")
  assert out.stats.tokens_per_step == 4.0
  assert out.tokens == plain("sampled", PROMPTS, 21)


def context_of(t, prompt, sampler=SAMPLERS["greedy"]):
  """Context after reading all of ``prompt`` but its last token, the root."""
  tokens = jnp.asarray([prompt], jnp.int32)
  length = tokens.shape[1] - 1
  state = t.model.init_state(1, 64)
  positions = jnp.arange(length)[None]
  state = t.model.apply(
    {"params": t.params}, tokens[:, :-1], state, positions, method="extend"
  ).state
  return Context(
    root=tokens[:, -1],
    length=jnp.asarray([length]),
    history=jnp.pad(tokens, ((0, 0), (0, 32))),
    target=Target(t.model, t.params, state),
    sampler=sampler,
    keys=request_keys(0, 1),
  )


@functools.partial(jax.jit, static_argnums=(0, 3))
def both_passes(make, tokens, exit, room):
  """The tree drafted by ``exit`` layers, the verify pass from there, and the whole verify pass."""
  context = context_of(make(), tokens)
  tree = speculate(context, exit, 3, room, room, lambda x, p: jnp.argmax(x, -1).astype(jnp.int32))
  t = context.target
  whole = t.model.apply(
    {"params": t.params}, tree.tokens, t.state, tree.topology, method="verify", capture=(0, 1, 2, 3)
  )
  return tree, verify_from_exit(tree, context, (0, 1, 2, 3)), whole


@pytest.mark.parametrize("make", [target, windowed])
def test_verify_from_the_exit_is_the_whole_verify(make):
  """Logits, hidden states, streams and pending keys of every layer, for every exit; one program."""
  tokens = tuple(PROMPTS[1])
  for exit in (1, 2, 3):
    _, ours, whole = both_passes(make, tokens, jnp.int32(exit), 6)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5)
  assert both_passes._cache_size() == 1 + (make is windowed)


def test_drafts_are_those_of_the_first_layers_alone():
  """A model cut off after the exit, reading the text again for every draft, says the same."""
  t, exit = target(), 2
  tokens = list(PROMPTS[1])
  tree, *_ = both_passes(target, tuple(tokens), jnp.int32(exit), 6)
  cut = Decoder(dataclasses.replace(t.model.config, layers=t.model.config.layers[:exit]))
  text = jnp.concatenate([jnp.asarray([tokens]), tree.tokens[:, 1:]], axis=1)
  best = jnp.argmax(jax.jit(cut.apply)({"params": t.params}, text).logits[0], -1)
  assert best[len(tokens) - 1 : -1].tolist() == tree.tokens[0, 1:].tolist()


def test_choice_is_the_best_of_all():
  rng = np.random.default_rng(0)
  for head in (0.0, 1.3):
    for _ in range(50):
      alpha, exits, layers = rng.uniform(0.01, 0.99, 3).astype(np.float32), (1, 2, 4), 6
      rate = {
        (d, e): sum(float(a) ** i for i in range(d + 1)) / (d * (e + head) + layers + head)
        for (e, a), d in itertools.product(zip(exits, alpha), range(9))
      }
      j, d = choose(jnp.asarray(alpha), exits, layers, 8, head)
      best = max(rate.values())
      assert rate[int(d), exits[int(j)]] == pytest.approx(best, rel=1e-5)


def test_hopeless_exits_are_not_used():
  j, d = choose(jnp.asarray([0.01, 0.01]), (1, 2), 6, 8)
  assert (int(j), int(d)) == (0, 0)  # plain decoding; ties go to the shorter draft, earlier exit


def test_forced_choice_is_the_fixed_drafter(monkeypatch):
  from jaxdec.drafting import dynamic_exit

  exits = (1, 2)
  monkeypatch.setattr(dynamic_exit, "choose", lambda *_: (jnp.int32(1), jnp.int32(3)))
  # A discount of its own, since executables are kept by drafter.
  ours = decode(DynamicExit(exits=exits, max_drafts=4, widths=(2,), stopping=False, discount=0.5))
  fixed = decode(FIXED)
  assert ours.tokens == fixed.tokens
  assert ours.stats.row_steps == fixed.stats.row_steps
  chosen = np.asarray(ours.drafter_state.chosen)
  assert chosen[1, 3] == chosen.sum() == max(fixed.stats.row_steps)
  cost = measured_cost(ours.drafter_state, exits, 3)
  assert cost == chosen.sum() * round_cost(3, 2, 3) == chosen.sum() * (3 * 2 + 3)


def statistics(drafter, rows, accepted_count, seed=0):
  """State before and after ``observe`` on made-up streams; ``rows`` real nodes a text."""
  t = target()
  streams = jax.random.normal(jax.random.key(seed), (2, 2, rows, 32))
  tokens = jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (2, rows)))
  context = context_of(t, PROMPTS[0])
  context = context.replace(length=jnp.asarray([4, 7]), keys=request_keys(0, 2))
  from jaxdec.drafting.tree import chain

  tree = chain(jnp.zeros(2, jnp.int32), jnp.zeros((2, rows - 1), jnp.int32))
  accepted = Accepted(None, jnp.asarray(accepted_count), None, tokens)
  before = ExitStatistics(
    jnp.asarray([3.0, 5.0]), jnp.float32(9.0), jnp.asarray([2.0, 4.0]), jnp.asarray([1.0, 0.5]),
    jnp.int32(2), jnp.zeros((2, rows), jnp.int32),
  )  # fmt: skip
  output = TargetOutput(None, tuple(streams))
  after = jax.jit(lambda *args: drafter.observe({}, *args, context))(before, tree, accepted, output)
  return before, after, streams, tokens


def test_statistics_count_only_rows_of_right_context():
  drafter, count = DynamicExit(exits=(1, 2), max_drafts=4, discount=0.9), [3, 0]
  before, after, streams, tokens = statistics(drafter, 5, count)
  t = target()
  for j in range(2):
    hits = trials = sure = 0
    for i in range(3):  # of the first text; the second one is done
      logits = t.model.apply(
        {"params": t.params}, streams[j, 0, i], method=lambda m, x: m.unembed(m.final_norm(x))
      )
      hit = int(jnp.argmax(logits)) == int(tokens[0, i])
      hits, trials, sure = hits + hit, trials + 1, sure + hit * float(jax.nn.softmax(logits).max())
    np.testing.assert_allclose(after.matched[j], 0.9 * before.matched[j] + hits, rtol=1e-6)
    np.testing.assert_allclose(after.hit_sum[j], 0.9 * before.hit_sum[j] + sure, rtol=1e-5)
  np.testing.assert_allclose(after.trials, 0.9 * 9 + 3)
  assert int(after.rounds) == 3


def test_a_look_every_other_round():
  drafter = DynamicExit(exits=(1, 2), max_drafts=4, interval=3)
  before, after, *_ = statistics(drafter, 5, [3, 2])
  np.testing.assert_array_equal(after.matched, before.matched)  # round 2 of 0, 3, 6, ...
  assert int(after.rounds) == 3


def test_threshold_waits_for_both_classes():
  def threshold(matched, trials):
    return ExitStatistics(
      jnp.asarray([matched]), jnp.float32(trials), jnp.asarray([0.8 * matched]),
      jnp.asarray([0.2 * (trials - matched)]), jnp.int32(0), jnp.zeros((1, 2), jnp.int32),
    ).threshold[0]  # fmt: skip

  assert threshold(10.0, 13.0) == 0
  assert threshold(3.0, 13.0) == 0
  np.testing.assert_allclose(threshold(6.0, 12.0), 0.5, rtol=1e-6)


def test_unsure_drafts_end_a_draft():
  """A threshold no draft reaches: each row keeps the unsure draft and stops."""
  context = context_of(target(), PROMPTS[0])
  args = context, 2, 2, 5, 5, lambda x, p: jnp.argmax(x, -1).astype(jnp.int32)
  draft = jax.jit(lambda threshold: speculate(*args, threshold))
  assert draft(1.1).valid[0].tolist() == [True, True, False, False, False, False]
  assert bool(jnp.all(draft(0.0).valid))


def test_first_estimates_are_the_prompts():
  """alpha after ``start``: how often a cut-off model agrees with the target on the prompt."""
  t, text = target(), np.random.default_rng(0).integers(0, VOCAB, 40)
  tokens = jnp.zeros((1, 64), jnp.int32).at[0, :40].set(text)
  prompt = Prompt(tokens, jnp.asarray([40]), jnp.asarray([0]))
  state = jax.jit(lambda prompt: DYNAMIC.start({}, (), prompt, None, t))(prompt)
  best = jnp.argmax(t.model.apply({"params": t.params}, tokens[:, :40]).logits[0], -1)
  for j, exit in enumerate((1, 2)):
    cut = Decoder(dataclasses.replace(t.model.config, layers=t.model.config.layers[:exit]))
    ours = jnp.argmax(cut.apply({"params": t.params}, tokens[:, :40]).logits[0], -1)
    assert int(state.matched[j]) == int(jnp.sum((ours == best)[-32:]))
  assert int(state.trials) == 32


def test_one_program_for_all_choices():
  """Several exits and lengths are used by the loop compiled already; so it is lossless with all."""
  decode(DYNAMIC, "sampled")
  before = compilations()["decode"]
  chosen = np.zeros((2, 5))
  for seed in range(4):
    chosen += np.asarray(decode(DYNAMIC, "sampled", seed=seed).drafter_state.chosen)
  assert np.sum(chosen > 0) > 2, chosen
  assert compilations()["decode"] == before


def test_statistics_go_on_from_an_earlier_text():
  first = decode(DYNAMIC, "sampled").drafter_state
  second = decode(DYNAMIC, "sampled", drafter_state=first).drafter_state
  assert int(second.rounds) > int(first.rounds) > 0


def test_mistakes_are_explained():
  with pytest.raises(UserError, match=r"exit must lie in 1\.\.3"):
    decode(EarlyExit(exit=4))
  with pytest.raises(UserError, match=r"exits must ascend within 1\.\.3"):
    decode(DynamicExit(exits=(2, 1)))
  with pytest.raises(UserError, match="num_drafts >= 1"):
    EarlyExit(num_drafts=0)
  with pytest.raises(UserError, match="max_drafts >= 1"):
    DynamicExit(max_drafts=0)
  model, params = any_target("hybrid")
  with pytest.raises(UserError, match="softmax attention in every layer"):
    generate(model, params, [[1, 2]], max_new_tokens=3, drafter=EarlyExit(exit=1))
