# SPDX-License-Identifier: Apache-2.0
"""What holds for drafters that ride in the target's pass, besides what holds for every drafter."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_target import (
  VOCAB,
  batch_of,
  greedy_text,
  init,
  overfit_batch,
  randomized,
  replace,
  run,
  target,
  train,
)
from universal import Universal, assert_same

from jaxdec.decoding import generate
from jaxdec.drafting.base import Context, Drafter, Prompt, Target, TargetOutput
from jaxdec.mixers import AttentionConfig, GatedDeltaConfig, LinearAttentionConfig
from jaxdec.models import Decoder
from jaxdec.models.config import DecoderConfig, LayerConfig, MLPConfig
from pallas_kernels.testing import COMPILE_ONCE


@functools.cache
def hybrid(delta=True) -> Target:
  """Three layers: linear attention, the gated delta rule (or linear attention), attention."""
  linear = LinearAttentionConfig(num_heads=2, head_dim=8)
  gated = GatedDeltaConfig(num_heads=2, head_dim=8)
  mixers = linear, gated if delta else linear, AttentionConfig(4, 2, 8, window=6)
  layers = tuple(LayerConfig(m, MLPConfig(48)) for m in mixers)
  model = Decoder(DecoderConfig(vocab_size=VOCAB, dim=32, layers=layers, max_length=512))
  make = jax.jit(lambda rng: nn.unbox(model.init(rng, jnp.zeros((1, 4), jnp.int32))["params"]))
  params = dict(make(jax.random.key(0)))
  params["embed"] = jax.tree.map(lambda x: x * 50, params["embed"])
  return Target(model, params, None)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _read(model, params, arrays, capture):
  """State, hidden and features after reading ``text[b, :lengths[b]]``."""
  text, lengths = arrays
  index = jnp.arange(text.shape[1])[None]
  positions = jnp.where(index < lengths[:, None], index, -1)
  state = model.init_state(*text.shape)
  out = model.apply(
    {"params": params}, text, state, positions, method="extend", capture=capture, logits=False
  )
  rows = jnp.arange(text.shape[0])
  hidden, *features = (x[rows, lengths - 1][:, None] for x in (out.hidden, *out.features))
  return out.state, TargetOutput(hidden, tuple(features))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(drafter, model, params, target_params, state, prompt, output):
  fresh = drafter.init_state(prompt.root.shape[0], 64)
  return drafter.start(params, fresh, prompt, output, Target(model, target_params, state))


def started(drafter, params, t, text, lengths):
  """The drafter's state after a prompt, and the context of its first step."""
  text, lengths = jnp.asarray(text), jnp.asarray(lengths, jnp.int32)
  root = text[jnp.arange(text.shape[0]), lengths]
  state, output = _read(t.model, t.params, (text, lengths), drafter.capture)
  context = Context(
    root=root, length=lengths, history=text, target=Target(t.model, t.params, state), sampler=None
  )
  prompt = Prompt(text, lengths, root)
  return _start(drafter, t.model, params, t.params, state, prompt, output), context


@functools.partial(jax.jit, static_argnums=(0, 3))
def forced(drafter, params, arrays, depths, context):
  """Logits of every depth, the text's own tokens fed as drafts."""
  state, text = arrays
  rows = jnp.arange(text.shape[0])
  logits, carry = drafter.first(params, state, context)
  step, out = drafter.step(params, state, context), [logits]
  for level in range(1, depths):
    fed = text[rows, context.length + level][:, None]
    logits, carry = step(carry, level, fed, np.zeros(1, np.int32))
    out.append(logits[:, 0])
  return out


class Probing(Universal):
  """Derive as ``Universal``; the target's state after the prompt is there at the start."""

  options = {"anchors": None}  # noqa: RUF012
  reached = 0.99  # accuracy at every depth on a text learned by heart

  def test_train_step_equals_serve_step(self):
    """Logits at probes behind a text's slots are those of probes behind the state after them."""
    drafter, t = self.make(), target()
    self.check_parity(drafter, t, self.params(drafter))

  def check_parity(self, drafter, t, params):
    length = 12
    text = np.random.default_rng(0).integers(0, VOCAB, length)
    trained = self.logits_of(drafter, params, t, batch_of([text]))
    slots = length - 1 - drafter.num_heads
    texts, lengths = np.tile(text, (slots, 1)), np.arange(1, slots + 1)
    state, context = started(drafter, params, t, texts, lengths)
    served = forced(drafter, params, (state, jnp.asarray(texts)), drafter.num_heads, context)
    for depth in range(drafter.num_heads):
      assert_same(served[depth], trained[depth][0, :slots], f"depth {depth + 1}")

  def logits_of(self, drafter, params, t, batch):
    """The training graph's logits by depth, ``[B,A,V]``."""

    @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
    def logits(params, target_params, output):
      t_ = Target(t.model, target_params, None)
      examples = drafter.examples(params, t_, output, batch, None)
      return [drafter.head(params, t_, e.depth, e.states) for e in examples]

    return logits(params, t.params, run(t, batch, drafter.capture))

  def test_state_equals_a_fresh_start_on_the_text_so_far(self):
    """Probes of the last accepted node are those hung behind the same text read anew."""
    drafter, t = self.tree_drafter(), target()
    self.check_state(drafter, t, self.params(drafter))

  def check_state(self, drafter, t, params):
    prompt = [3, 1, 4, 1, 5]
    out = generate(
      t.model, t.params, [prompt], max_new_tokens=14, drafter=drafter, drafter_params=params,
      stop=None,
    )  # fmt: skip
    text = np.array([[*prompt, *out.tokens[0]]])
    fresh, _ = started(drafter, params, t, text, [text.shape[1] - 1])
    known = int(out.drafter_state.available[0])
    assert known >= 1
    assert_same(out.drafter_state.hidden[:, :known], fresh.hidden[:, :known])

  def test_nodes_are_what_they_are_without_probes(self):
    """Logits, and the target's state after a commit of any path."""
    for t in (target(), hybrid()):
      drafter = self.tree_drafter()
      params = randomized(init(drafter, t), scale=0.5)
      text = np.random.default_rng(1).integers(0, VOCAB, (2, 12))
      state, context = started(drafter, params, t, text, [7, 10])

      @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
      def both(params, state, context, drafter=drafter):
        tree, _ = drafter.propose(params, state, context, jax.random.key(0))
        path = jnp.tile(jnp.asarray([[0, 1]]), (2, 1))
        count = jnp.asarray([2, 1])
        outs = drafter.verify(params, tree, context), Drafter.verify(drafter, {}, tree, context)
        target = context.target
        states = [
          target.model.apply(
            {"params": target.params}, target.state, out.pending, path, count, method="commit"
          )
          for out in outs
        ]
        return [out.logits for out in outs], states, outs[0].hidden

      logits, states, hidden = both(params, state, context)
      assert hidden.shape[1] > logits[0].shape[1] == drafter.num_nodes
      np.testing.assert_allclose(logits[0], logits[1], atol=1e-5, rtol=1e-5)
      jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *states)

  @pytest.mark.slow
  def test_hybrid_targets(self):
    """Recurrent layers take probes as nodes of a tree: lossless, and drafts of a fresh start."""
    t, drafter = hybrid(), self.tree_drafter()
    params = randomized(init(drafter, t), scale=0.5)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    common = dict(max_new_tokens=12, stop=None)
    alone = generate(t.model, t.params, prompts, **common)
    out = generate(t.model, t.params, prompts, drafter=drafter, drafter_params=params, **common)
    assert out.tokens == alone.tokens
    self.check_state(drafter, t, params)
    self.check_parity(self.make(), hybrid(delta=False), params)

  def test_groups_are_blind_to_each_other(self):
    """Probes behind some slots are what they are when all slots carry them."""
    drafter, t = self.make(), target()
    params = self.params(drafter)
    batch = batch_of(np.random.default_rng(2).integers(0, VOCAB, (1, 10)))

    @functools.partial(jax.jit, compiler_options=COMPILE_ONCE)
    def forced_at(params, slots):
      return drafter.forced(params, t, batch, slots)

    every = forced_at(params, jnp.arange(8)[None])
    some = forced_at(params, jnp.asarray([[2, 7]]))
    for key, hidden in some.items():
      np.testing.assert_allclose(hidden, every[key][:, [2, 7]], atol=1e-5)

  @pytest.mark.slow
  def test_learns_one_text_by_heart(self):
    """Decoding accepts, step by step, exactly the drafts that the training graph gets right."""
    t, length, start = target(seed=1), 96, 8
    drafter = self.make(**{**self.overfit_options, "anchors": 32})
    text = greedy_text(t, range(1, 1 + start), length)
    batch = overfit_batch(text)
    params, _ = train(drafter, t, batch, self.steps, self.learning_rate)
    drafter = replace(drafter, anchors=None)
    # All slots, those of the end too, whose drafts reach beyond the text.
    longer = batch_of([np.concatenate([text, np.zeros(5, np.int32)])])
    drafts = [np.argmax(x[0], axis=-1) for x in self.logits_of(drafter, params, t, longer)]
    labels = np.concatenate([text, np.full(5, -1)])
    right = np.stack([drafts[k][: length - 1] == labels[k + 2 :][: length - 1] for k in range(3)])
    for k in range(3):
      assert np.mean(right[k, start - 1 : length - 2 - k]) >= self.reached
    at, steps = start, 0
    while at < length - 1:  # ``at`` tokens read, the next one is the root
      at, steps = at + 1 + int(np.sum(np.cumprod(right[:, at - 1]))), steps + 1
    out = generate(
      t.model, t.params, [[int(x) for x in text[:start]]], max_new_tokens=length - start,
      drafter=drafter, drafter_params=params, stop=None,
    )  # fmt: skip
    assert out.tokens[0] == [int(x) for x in text[start:]]
    assert out.stats.row_steps == (steps,)
