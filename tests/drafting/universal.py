# SPDX-License-Identifier: Apache-2.0
"""What holds for every drafter, whatever its weights: one class of tests, derived per drafter.

    class TestHass(Universal):
      kind = Hass
      options = {"num_heads": 3}

The names of properties: greedy and sampled output identical to plain decoding (lossless); the
drafter's logits in the training graph equal those in the decoding graph (parity); its state after
some steps equals a fresh start on the text so far (cache); the target stays as it was (frozen); no
recompilation; and, slow, on one text learned by heart nearly every draft is accepted (overfit).
"""

from __future__ import annotations

import functools
from typing import Any

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
  random_batch,
  randomized,
  replace,
  run,
  target,
  train,
)

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting.base import Context, Prompt, Target
from jaxdec.drafting.checkpoint import from_config, to_config
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.training import Trainer, TrainerConfig
from jaxdec.training.tasks.distill import Distill

PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0), (0, 1, 2)]
SAMPLERS = {"greedy": Sampler(), "sampled": Sampler(0.7, top_p=0.8)}


@functools.cache
def plain(sampler: str, prompts: tuple, new_tokens: int) -> list[list[int]]:
  """What the target writes on its own."""
  t = target()
  return generate(
    t.model, t.params, [list(p) for p in prompts], max_new_tokens=new_tokens,
    sampler=SAMPLERS[sampler], stop=None, seed=5,
  ).tokens  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _start(drafter, params, target_params, prompt, output):
  state = drafter.init_state(prompt.tokens.shape[0], 64)
  return drafter.start(params, state, prompt, output, Target(target().model, target_params, None))


def start(drafter, params, t: Target, text, lengths) -> tuple[Any, Any]:
  """State and root after reading ``text[b, :lengths[b]]``; the root is the token that follows."""
  batch = batch_of(text)
  rows = jnp.arange(len(text))
  lengths = jnp.asarray(lengths)
  root = batch["tokens"][rows, lengths]
  output = run(t, batch, drafter.capture)
  if not drafter.needs_prompt_hidden:
    take = lambda x: x[rows, lengths - 1][:, None]  # noqa: E731
    output = output.replace(hidden=take(output.hidden), features=tuple(map(take, output.features)))
  output = output.replace(logits=None)
  return _start(drafter, params, t.params, Prompt(batch["tokens"], lengths, root), output), root


def forced_logits(drafter, params, t: Target, text, lengths, depths) -> list[np.ndarray]:
  """Draft logits of every depth, the text's own tokens fed as drafts."""
  state, root = start(drafter, params, t, text, lengths)
  lengths, text = jnp.asarray(lengths), jnp.asarray(text)
  rows = jnp.arange(text.shape[0])

  @jax.jit
  def draft(state, params):
    context = Context(root=root, length=lengths, history=text, target=t, sampler=None)
    logits, carry = drafter.first(params, state, context)
    step, out = drafter.step(params, state, context), [logits]
    for level in range(1, depths):
      fed = text[rows, lengths + level][:, None]
      logits, carry = step(carry, level, fed, np.zeros(1, np.int32))
      out.append(logits[:, 0])
    return out

  return draft(state, params)


def assert_same(ours, theirs, note: str = "") -> None:
  """Equal to 1e-5 of the largest number: float32 sums taken in another order (seen: 2e-6)."""
  bar = 1e-5 * max(1.0, float(np.max(np.abs(theirs))))
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=bar, err_msg=note)


class Universal:
  """Derive, set ``kind`` (a TrainedDrafter) and ``options``; override what differs."""

  kind: type
  options: dict[str, Any] = {}  # noqa: RUF012
  num_heads = 3
  overfit_options: dict[str, Any] = {"objective": "hard"}  # noqa: RUF012
  steps = 300  # of the overfit test
  learning_rate = 1e-2
  parity_depths: int | None = None  # depths compared; None: all trained

  @classmethod
  def make(cls, **options):
    """The drafter under test."""
    return cls.kind.for_target(
      target().model.config, **{"num_heads": cls.num_heads, **cls.options, **options}
    )

  @classmethod
  def params(cls, drafter, scale=0.5):
    """Random weights, no tensor zero."""
    return _params(drafter, scale)

  def tree_drafter(self):
    """The drafter with a bushy tree."""
    depth = min(3, self.make().depth_limit)
    return self.make(tree=StaticTree.from_paths([p for p in PATHS if len(p) <= depth]))

  @pytest.mark.parametrize("sampler", list(SAMPLERS))
  def test_lossless(self, sampler):
    """Token for token what the target writes, ragged prompts, random weights."""
    drafter, t = self.tree_drafter(), target()
    rng = np.random.default_rng(3)
    prompts = tuple(tuple(int(x) for x in rng.integers(0, VOCAB, n)) for n in (5, 11, 2))
    out = generate(
      t.model, t.params, [list(p) for p in prompts], max_new_tokens=21, sampler=SAMPLERS[sampler],
      drafter=drafter, drafter_params=self.params(drafter), stop=None, seed=5,
    )  # fmt: skip
    assert out.tokens == plain(sampler, prompts, 21)

  def test_train_step_equals_serve_step(self):
    """Logits of the training graph are those of the decoding graph on the same text."""
    drafter, t = self.make(), target()
    params, length = self.params(drafter), 12
    text = np.random.default_rng(0).integers(0, VOCAB, length)
    depths = self.parity_depths or drafter.num_heads
    trained = self.training_logits(drafter, params, t, text)
    slots = length - 1 - drafter.num_heads
    served = forced_logits(
      drafter, params, t, np.tile(text, (slots, 1)), np.arange(1, slots + 1), depths
    )
    for depth in range(depths):
      assert_same(served[depth], trained[depth][:slots], f"depth {depth + 1}")

  def training_logits(self, drafter, params, t, text) -> list[np.ndarray]:
    """Per depth ``[T-1-k, V]``: the training graph's logits at every slot of one text."""
    batch = batch_of([text])

    @jax.jit
    def logits(params, output):
      return [
        drafter.head(params, t, e.depth, e.states)[0]
        for e in drafter.examples(params, t, output, batch, None)
      ]

    return logits(params, run(t, batch, drafter.capture))

  def test_state_equals_a_fresh_start_on_the_text_so_far(self):
    """What was read in vain leaves no trace: the next drafts are those of a fresh drafter."""
    drafter, t = self.tree_drafter(), target()
    params = self.params(drafter)
    prompt = [3, 1, 4, 1, 5]
    out = generate(
      t.model, t.params, [prompt], max_new_tokens=14, drafter=drafter, drafter_params=params,
      stop=None,
    )  # fmt: skip
    text = np.array([[*prompt, *out.tokens[0]]])
    length = text.shape[1] - 1  # the last token is the root
    fresh, root = start(drafter, params, t, text, [length])
    context = Context(root=root, length=jnp.asarray([length]), history=text, target=t, sampler=None)
    first = jax.jit(lambda state: drafter.first(params, state, context)[0])
    assert_same(first(out.drafter_state), first(fresh))

  def test_target_is_frozen(self):
    drafter, t = self.make(), target()
    task = Distill(drafter, t.model, t.params)
    batch = batch_of(np.random.default_rng(1).integers(0, VOCAB, (2, 16)))
    params = self.params(drafter)

    @jax.jit
    def gradients(params, frozen):
      def loss(params, frozen):
        return task.loss(params, frozen, batch, jax.random.key(0))[0]

      return jax.grad(loss, argnums=(0, 1))(params, frozen)

    ours, targets = gradients(params, task.frozen)
    assert any(np.any(g) for g in jax.tree.leaves(ours))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(ours))
    assert not any(np.any(g) for g in jax.tree.leaves(targets))

  def test_packed_documents_do_not_leak(self):
    """The mean over two documents in one row is what each gives alone."""
    drafter, t = self.make(), target()
    params, rng = self.params(drafter), np.random.default_rng(0)
    a, b = rng.integers(0, VOCAB, 9), rng.integers(0, VOCAB, 11)

    def metrics(batch):
      loss = jax.jit(lambda p, o: drafter.loss(p, t, o, batch, None)[1])
      return loss(params, run(t, batch, drafter.capture))

    joint = metrics(batch_of([np.concatenate([a, b])], [[1] * 9 + [2] * 11]))
    alone = metrics(batch_of([a])), metrics(batch_of([b]))
    for k in range(1, len(joint["depth_loss"]) + 1):
      n, m = 9 - 1 - k, 11 - 1 - k
      expected = (n * alone[0]["depth_loss"][k - 1] + m * alone[1]["depth_loss"][k - 1]) / (n + m)
      np.testing.assert_allclose(joint["depth_loss"][k - 1], expected, rtol=1e-5)

  def test_configuration_round_trip(self):
    drafter = self.tree_drafter()
    assert from_config(to_config(drafter)) == drafter

  @pytest.mark.slow
  def test_target_is_bit_identical_after_training(self):
    """A step donates the drafter's buffers: none is the target's, of which a head may be a copy."""
    drafter, t = self.make(), target()
    before = jax.tree.map(np.array, t.params)
    batches = [random_batch(seed, 2, 16) for seed in range(3)]
    config = TrainerConfig(steps=3, progress=False)
    Trainer(Distill(drafter, t.model, t.params), config, data=batches).train()
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, t.params))

  @pytest.mark.slow
  def test_learns_one_text_by_heart(self):
    """Accuracy in training and acceptance in decoding agree: no index or feature is off by one."""
    t = target(seed=1)
    drafter = self.make(depth_decay=1.0, **self.overfit_options)
    text = greedy_text(t, range(1, 9), 256)
    params, metrics = train(drafter, t, overfit_batch(text), self.steps, self.learning_rate)
    assert np.all(np.asarray(metrics["top1"]) >= 0.99), metrics["top1"]
    chained = replace(drafter, tree=StaticTree.chain(self.num_heads))
    out = generate(
      t.model, t.params, [[int(x) for x in text[:8]]], max_new_tokens=len(text) - 8,
      drafter=chained, drafter_params=params, stop=None,
    )  # fmt: skip
    assert out.tokens[0] == [int(x) for x in text[8:]]
    assert out.stats.tokens_per_step >= 0.9 * (self.num_heads + 1)


@functools.cache
def _params(drafter, scale):
  return randomized(init(drafter, target()), scale=scale)
