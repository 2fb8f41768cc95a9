# SPDX-License-Identifier: Apache-2.0
"""The decode loop end to end: speculation changes nothing but the number of passes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, compilations, generate, loop
from jaxdec.decoding.cache import bucket, capacity_for
from jaxdec.decoding.sampling import request_keys
from jaxdec.decoding.verify import Match
from jaxdec.models import Decoder
from jaxdec.models.prefill import read_prompt
from tests.decoding.chi_square import chi_square_p
from tests.decoding.targets import Letters, Scripted, script, target

PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5], [7, 8, 9, 10] * 5]  # ragged, one of length 1
GREEDY, PLAIN = Sampler(), Sampler(temperature=1.0)
NEW = 21


def run(kind="attention", prompts=PROMPTS, **options):
  model, params = target(kind)
  return generate(
    model, params, prompts, **{"max_new_tokens": NEW, "stop": None, "seed": 3, **options}
  )


@pytest.mark.parametrize(
  "kind, sampler",
  [
    ("attention", GREEDY),
    ("attention", PLAIN),
    ("linear", PLAIN),
    ("hybrid", GREEDY),
    pytest.param("recurrent", PLAIN, marks=pytest.mark.slow),
  ],
)
def test_speculation_equals_plain_decoding_token_for_token(kind, sampler):
  plain = run(kind, sampler=sampler)
  assert [len(t) for t in plain.tokens] == plain.lengths == [NEW] * 3
  assert plain.stats.tokens_per_step == 1.0 and plain.stats.accepted_by_depth == ()
  for drafter in (Scripted("chain"), Scripted("wrong"), Scripted("tree", drafts=8, depth=3)):
    out = run(kind, sampler=sampler, drafter=drafter, drafter_params=script(PROMPTS, plain))
    assert out.tokens == plain.tokens, drafter
    stats = out.stats
    assert stats.tokens_per_step == pytest.approx(1 + sum(stats.accepted_by_depth))
    assert sum(stats.row_steps) * stats.tokens_per_step == pytest.approx(3 * (NEW - 1))
    if drafter.kind == "chain":  # an oracle: every pass gives depth + 1 tokens
      assert stats.tokens_per_step == 4.0 and stats.target_passes == (NEW - 1) // 4
    if drafter.kind == "wrong":
      assert stats.tokens_per_step == 1.0
    if drafter.kind == "tree":
      assert 1.2 < stats.tokens_per_step < 5


def test_plain_decoding_equals_recomputing_the_whole_text():
  """Against the stateless forward pass: no cache, no padding, no loop."""
  model, params = target("hybrid")
  out = run("hybrid", sampler=PLAIN)
  keys = request_keys(3, 3)
  forward = jax.jit(lambda t: model.apply({"params": params}, t).logits)
  for i, prompt in enumerate(PROMPTS):
    text = [*prompt, *out.tokens[i]]
    logits = forward(jnp.asarray([text + [0] * (48 - len(text))]))[0]
    at = jnp.arange(len(prompt), len(text))
    drawn = PLAIN.draw(logits[None, at - 1], keys[i : i + 1], at[None])
    assert drawn[0].tolist() == out.tokens[i]


def test_low_precision_differs_at_near_ties_only():
  """In bfloat16 every emitted token is within rounding of the plain forward pass's best."""
  float_model, params = target()
  model = Decoder(float_model.config, dtype=jnp.bfloat16)
  options = dict(max_new_tokens=NEW, stop=None)
  plain = generate(model, params, PROMPTS, **options)
  out = generate(
    model, params, PROMPTS, **options, drafter=Scripted(), drafter_params=script(PROMPTS, plain)
  )
  forward = jax.jit(lambda t: model.apply({"params": params}, t).logits)
  for prompt, new in zip(PROMPTS, out.tokens):
    text = [*prompt, *new]
    logits = np.asarray(forward(jnp.asarray([text + [0] * (48 - len(text))]))[0])
    for t in range(len(prompt), len(text)):
      row = logits[t - 1]
      # Half a dozen roundings of 2^-8, relative to the size of the logits.
      assert row.max() - row[text[t]] <= 6 * 2**-8 * np.abs(row).max()


def test_rows_do_not_see_their_neighbours():
  together = run(sampler=PLAIN, seed=[4, 5, 6])
  for i, seed in enumerate([4, 5, 6]):
    assert run(sampler=PLAIN, prompts=[PROMPTS[i]], seed=seed).tokens[0] == together.tokens[i]
  order = [2, 0, 1]
  moved = run(
    sampler=PLAIN, prompts=[PROMPTS[i] for i in order], seed=[[4, 5, 6][i] for i in order]
  )
  assert moved.tokens == [together.tokens[i] for i in order]
  assert run(sampler=PLAIN, seed=[4, 5, 7]).tokens[:2] == together.tokens[:2]
  assert run(sampler=PLAIN, seed=[4, 5, 7]).tokens[2] != together.tokens[2]


@pytest.mark.parametrize(
  "kind",
  ["attention", "linear", "hybrid", pytest.param("recurrent", marks=pytest.mark.slow)],
)
def test_state_equals_a_fresh_prefill_after_every_step(kind):
  model, params = target(kind)
  plain = run(kind, sampler=PLAIN)
  drafter = Scripted("tree", drafts=8, depth=3)
  lengths = jnp.asarray([len(p) for p in PROMPTS], jnp.int32)
  capacity = 64
  history = np.zeros((3, capacity), np.int32)
  for i, prompt in enumerate(PROMPTS):
    history[i, : len(prompt)] = prompt
  request = loop.Request(request_keys(3, 3), lengths + NEW - 1, jnp.full(8, -1, jnp.int32))
  state, output = loop.prefill(
    params, jnp.asarray(history), lengths, model=model, chunk=16, capture=(), keep=None
  )
  static = dict(model=model, drafter=drafter, sampler=PLAIN)
  carry = loop.begin(
    params,
    script(PROMPTS, plain),
    state,
    output,
    None,
    jnp.asarray(history),
    lengths,
    request,
    **static,
    warm=False,
  )
  fresh = jax.jit(
    lambda tokens, n: read_prompt(
      model, params, model.init_state(3, capacity), tokens, n, chunk=16
    )[0]
  )
  for step in range(1, 7):
    carry = loop.decode(
      carry,
      params,
      script(PROMPTS, plain),
      request,
      np.int32(step),
      np.zeros(3, bool),
      **static,
      rule=Match(),
    )
    want = fresh(carry.history, carry.length)
    np.testing.assert_array_equal(carry.state.length, carry.length)
    for got_layer, want_layer in zip(carry.state.layers, want.layers):
      for a, b in zip(jax.tree.leaves(got_layer), jax.tree.leaves(want_layer)):
        for row in range(3):
          got_row, want_row = np.asarray(a[row]), np.asarray(b[row])
          if capacity in got_row.shape:  # slots beyond the length hold no meaning
            axis = got_row.shape.index(capacity)
            kept = range(int(carry.length[row]))
            got_row, want_row = got_row.take(kept, axis), want_row.take(kept, axis)
          np.testing.assert_allclose(got_row, want_row, atol=2e-5, rtol=1e-4)
  assert int(carry.length.max()) > int(lengths.max()) + 6  # it did speculate


def test_random_chain_accepts_as_theory_says():
  """U4: uniform drafts match with probability 1/V each: 1 + 1/V + 1/V^2 + 1/V^3."""
  vocab, batch = 4, 64
  model, params = target(vocab=vocab)

  class Uniform(Scripted):
    def propose(self, params, state, context, rng):
      tree, state = super().propose(params, state, context, rng)
      drafts = jax.random.randint(rng, tree.tokens[:, 1:].shape, 0, vocab)
      return tree.replace(tokens=tree.tokens.at[:, 1:].set(drafts)), state

  out = generate(
    model,
    params,
    [[1, 2]] * batch,
    max_new_tokens=100,
    sampler=PLAIN,
    stop=None,
    drafter=Uniform("chain"),
    drafter_params=jnp.zeros((batch, 192), jnp.int32),
  )
  expected = sum(vocab**-i for i in range(4))
  error = 0.75 / np.sqrt(sum(out.stats.row_steps))  # sd of the accepted length is about 0.7
  assert abs(out.stats.tokens_per_step - expected) < 5 * error


def test_sequences_have_the_targets_law():
  """64 texts of three tokens, enumerated, against draws with and without speculation."""
  vocab, batch = 4, 4096
  model, params = target(vocab=vocab)
  prompt = [1, 3]
  texts = np.stack(np.meshgrid(*[range(vocab)] * 3, indexing="ij"), -1).reshape(-1, 3)
  full = jnp.asarray([[*prompt, *t] for t in texts.tolist()])
  sampler = Sampler(temperature=1.0, top_p=0.95)
  log_p = sampler.log_probs(model.apply({"params": params}, full).logits)
  law = np.exp(
    np.asarray(jnp.take_along_axis(log_p[:, 1:4], full[:, 2:, None], -1).sum((1, 2)), np.float64)
  )
  assert law.sum() == pytest.approx(1, abs=1e-5)
  counts = {}
  for name, drafter in (
    ("plain", None),
    ("tree", Scripted("tree", drafts=5, depth=2, vocab=vocab)),
  ):
    seen = np.zeros(64)
    for seed in range(2):
      out = generate(
        model,
        params,
        [prompt] * batch,
        max_new_tokens=3,
        sampler=sampler,
        stop=None,
        seed=seed,
        drafter=drafter,
        drafter_params=jnp.zeros((batch, 64), jnp.int32),
      )
      seen += np.bincount(np.asarray(out.tokens) @ [16, 4, 1], minlength=64)
    counts[name] = seen
    assert chi_square_p(seen, law) > 1e-4, name
  np.testing.assert_array_equal(counts["plain"], counts["tree"])


def test_nothing_recompiles():
  base = script(PROMPTS, run())
  drafter = Scripted("chain")
  run(drafter=drafter, drafter_params=base)
  before = compilations()
  run(drafter=drafter, drafter_params=base * 0, seed=9, max_new_tokens=30, stop=[4])
  other = [[2] * 5, [3] * 9, [1] * 17]
  run(drafter=drafter, drafter_params=base, prompts=other, stop=[1, 2, 3], seed=[1, 2, 3])
  run(drafter=drafter, drafter_params=base, max_new_tokens=8, stream=lambda piece: None)
  run(prompts=other, seed=9)
  assert compilations() == before


def cut(tokens, stops):
  return next((tokens[: i + 1] for i, t in enumerate(tokens) if t in stops), tokens)


def test_stop_ids_cut_accepted_blocks():
  plain = run(sampler=PLAIN)
  oracle = dict(drafter=Scripted("chain"), drafter_params=script(PROMPTS, plain))
  inside = plain.tokens[0][6]  # tokens 5, 6, 7, 8 come from one accepted block
  for stops in ([inside], [plain.tokens[1][0]], list(range(13))):
    want = [cut(t, stops) for t in plain.tokens]
    assert run(sampler=PLAIN, stop=stops).tokens == want
    out = run(sampler=PLAIN, stop=stops, **oracle)
    assert out.tokens == want and out.lengths == [len(t) for t in want]
    assert sum(out.stats.row_steps) * out.stats.tokens_per_step == pytest.approx(
      sum(out.lengths) - 3
    )


def test_eos_is_the_default_stop():
  plain = run(sampler=PLAIN)
  eos = plain.tokens[0][4]
  model, params = target(eos=(eos,))
  default = generate(model, params, PROMPTS, max_new_tokens=NEW, sampler=PLAIN, seed=3)
  assert default.tokens == [cut(t, [eos]) for t in plain.tokens]
  never = generate(model, params, PROMPTS, max_new_tokens=NEW, sampler=PLAIN, seed=3, stop=None)
  assert never.tokens == plain.tokens


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6])
def test_max_new_tokens_is_never_exceeded(new):
  plain = run(max_new_tokens=new)
  assert plain.lengths == [new] * 3
  longer = run()
  assert plain.tokens == [t[:new] for t in longer.tokens]
  out = run(max_new_tokens=new, drafter=Scripted("chain"), drafter_params=script(PROMPTS, longer))
  assert out.tokens == plain.tokens


def test_stop_strings_cut_tokens_and_text_alike_for_every_drafter():
  plain = run(sampler=PLAIN, tokenizer=Letters())
  assert plain.text == [Letters().decode(t) for t in plain.tokens]
  needle = plain.text[0][5:8]
  want = []
  for text in plain.text:
    at = text.find(needle)
    want.append((text, len(text)) if at < 0 else (text[:at], at + len(needle)))
  oracle = dict(drafter=Scripted("chain"), drafter_params=script(PROMPTS, plain))
  for options in ({}, oracle, {**oracle, "stream": lambda piece: None, "interval": 1}):
    out = run(sampler=PLAIN, tokenizer=Letters(), stop=["zzz", needle], **options)
    assert list(zip(out.text, out.lengths)) == want
    assert out.tokens == [t[:n] for t, (_, n) in zip(plain.tokens, want)]
    assert sum(out.stats.row_steps) * out.stats.tokens_per_step == pytest.approx(
      sum(out.lengths) - 3
    )


@pytest.mark.parametrize("interval", [1, 3, None])
def test_streaming_yields_the_same_tokens(interval):
  plain = run(sampler=PLAIN, tokenizer=Letters())
  pieces = []
  out = run(
    sampler=PLAIN,
    tokenizer=Letters(),
    stream=pieces.append,
    interval=interval,
    drafter=Scripted("chain"),
    drafter_params=script(PROMPTS, plain),
  )
  assert out.tokens == plain.tokens and out.text == plain.text
  for row in range(3):
    mine = [p for p in pieces if p.row == row]
    assert [t for p in mine for t in p.tokens] == plain.tokens[row]
    assert "".join(p.text for p in mine) == plain.text[row]
    assert [p.done for p in mine] == [False] * (len(mine) - 1) + [True]
  if interval == 1:
    assert len(pieces) > 9


def test_streamed_text_never_takes_back_a_stop_string():
  plain = run(sampler=PLAIN, tokenizer=Letters())
  needle = plain.text[0][5:8]
  pieces = []
  out = run(sampler=PLAIN, tokenizer=Letters(), stop=needle, stream=pieces.append, interval=1)
  assert (
    "".join(p.text for p in pieces if p.row == 0)
    == out.text[0]
    == plain.text[0][: plain.text[0].find(needle)]
  )


def test_cache_filled_to_the_last_slot():
  """The room needed is a bucket itself: rounding the capacity up leaves no slack."""
  prompt, new, drafts = [1, 2, 3] * 32, 23, 7
  assert capacity_for(96, 96, new, drafts + 1, drafts) == 96 + new + drafts + 2
  plain = run(prompts=[prompt], max_new_tokens=new)
  out = run(
    prompts=[prompt],
    max_new_tokens=new,
    drafter=Scripted("chain", drafts=drafts),
    drafter_params=script([prompt], plain),
  )
  assert out.tokens == plain.tokens


def test_capacity_holds_every_write():
  for longest in range(1, 300, 7):
    for new in (1, 5, 100):
      for nodes, depth in ((1, 0), (8, 7), (64, 5)):
        size = capacity_for(-(-longest // 16) * 16, longest, new, nodes, depth)
        last_root = longest + new - 2  # position of the root at the last verify pass
        assert size >= last_root + nodes and size >= last_root + 1 + depth + 1
        assert size <= 1.25 * (longest + new + nodes + 16) + 64
  assert len({bucket(n) for n in range(1025, 2049)}) == 8


def test_prefill_chunks_change_nothing():
  prompt = (list(range(13)) * 4)[:50]
  want = run(prompts=[prompt, [3]], max_new_tokens=5)
  for chunk in (7, 16):
    assert run(prompts=[prompt, [3]], max_new_tokens=5, prefill_chunk=chunk).tokens == want.tokens


def test_profile_splits_decode_seconds():
  out = run(drafter=Scripted("chain"), drafter_params=jnp.zeros((3, 192), jnp.int32), profile=True)
  stats = out.stats
  assert 0 < stats.draft_seconds < stats.decode_seconds
  assert stats.draft_seconds + stats.verify_seconds == pytest.approx(stats.decode_seconds)
