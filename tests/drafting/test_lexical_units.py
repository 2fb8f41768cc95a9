# SPDX-License-Identifier: Apache-2.0
"""Lexical units: what the model is tuned on, and decoding with a model that sees ahead."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lookahead import BLANK, counting, counting_target
from toy_target import VOCAB, random_batch, target

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import LexicalUnits, StaticTree, get
from jaxdec.drafting.lexical_units import unit_offsets
from jaxdec.errors import UserError
from jaxdec.training import OptimizerConfig, Trainer, TrainerConfig
from jaxdec.training.tasks.lexical import LexicalTuning

# Texts that count: the prompt tells the step.
PROMPTS = [[1, 2, 3, 4], [0, 5, 10, 15, 20], [3, 5, 7, 9, 11, 13]]


def units(t, **options):
  return LexicalUnits.for_target(t.model.config, **{"pad": BLANK, "anchors": None, **options})


def test_units_are_cut_from_the_left():
  rng = np.random.default_rng(0)
  sure = rng.random((20, 15)) < 0.7
  sure[:, 0] = False
  for size in (1, 2, 4):
    found = np.asarray(unit_offsets(jnp.asarray(sure), size))
    for row, got in zip(sure, found):
      want, t = [], 0
      while t < len(row):
        end = t + 1
        while end < len(row) and end < t + size and row[end]:
          end += 1
        want += range(end - t)
        t = end
      assert got.tolist() == want


def law_after(t, texts):
  """The model's law after each of some texts of any lengths."""
  padded = np.zeros((32, 24), np.int32)  # one compilation for all
  for row, text in zip(padded, texts):
    row[: len(text)] = text
  logits = _logits(t.model, t.params, jnp.asarray(padded))
  return np.asarray(logits)[np.arange(len(texts)), [len(x) - 1 for x in texts]]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
  return jax.nn.log_softmax(model.apply({"params": params}, tokens).logits, axis=-1)


def test_loss_is_the_texts_and_that_of_pads_inside_units():
  """Against texts with PADs written behind them, read by the plain model."""
  t, threshold = target(), 0.04
  drafter = units(t, num_heads=2)
  task = LexicalTuning(t.model, weights=t.params, drafter=drafter, threshold=threshold)
  batch = random_batch(0, rows=2, length=12, vocab=BLANK)

  @jax.jit
  def graded(params):
    return jax.value_and_grad(lambda p: task.loss(p, {}, batch, None), has_aux=True)(params)

  (loss, metrics), gradient = graded(t.params)
  text, pads, plain = np.asarray(batch["tokens"]), [], []
  for row in text:
    before = law_after(t, [row[: i + 1] for i in range(11)])
    p = before[np.arange(11), row[1:]]
    plain += p.tolist()
    offset = np.asarray(unit_offsets(jnp.asarray([[False, *(np.exp(p) >= threshold)]]), 3))[0]
    inside = [(s, d) for d in (1, 2) for s in range(11 - d) if offset[s + 1 + d] == d]
    texts = [[*row[: s + 1], *[BLANK] * d] for s, d in inside]
    laws = law_after(t, texts)
    pads += [laws[i, row[s + 1 + d]] for i, (s, d) in enumerate(inside)]
  assert 4 < len(pads) < 36
  np.testing.assert_allclose(metrics["unit_loss"], -np.mean(pads), rtol=1e-4)
  np.testing.assert_allclose(metrics["cross_entropy"], -np.mean(plain), rtol=1e-4)
  np.testing.assert_allclose(loss, -np.mean(plain) - np.mean(pads), rtol=1e-4)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
  assert BLANK not in text and np.any(np.asarray(gradient["embed"])[BLANK])


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.0)])
def test_all_drafts_verified_is_the_models_own_text(sampler):
  t = counting_target(0.3)
  options = dict(max_new_tokens=20, stop=None, sampler=sampler, seed=5)
  plain = generate(t.model, t.params, PROMPTS, **options)
  out = generate(t.model, t.params, PROMPTS, drafter=units(t), **options)
  assert out.tokens == plain.tokens
  assert out.stats.tokens_per_step > 1.5


def spoken(t, prompt, new, pads, confidence):
  """The paper's decoding, one plain pass over the text and its PADs at a time."""
  text, passes = list(prompt), 0
  while len(text) < len(prompt) + new:
    laws = law_after(t, [[*text, *[BLANK] * i] for i in range(pads + 1)])
    passes += 1
    text.append(int(laws[0].argmax()))
    for law in laws[1:]:
      token = int(law.argmax())
      if np.exp(law[token]) < confidence or token == text[-1]:
        break
      text.append(token)
  return text[len(prompt) :][:new], passes


@pytest.mark.parametrize("confidence", [0.6, 1.01])
def test_confident_drafts_unverified_are_the_papers_decoding(confidence):
  t = counting_target(0.3)
  drafter = units(t, num_heads=2, confidence=confidence)
  out = generate(
    t.model, t.params, PROMPTS, max_new_tokens=14, stop=None, drafter=drafter,
    rule="unverified_lossy",
  )  # fmt: skip
  for row, prompt in enumerate(PROMPTS):
    tokens, passes = spoken(t, prompt, 14, 2, confidence)
    assert out.tokens[row] == tokens and BLANK not in tokens
    # The first pass over the prompt emits one token of the count; its drafts come with the next.
    assert abs(out.stats.row_steps[row] - passes) <= 1
  assert (out.stats.tokens_per_step > 1.5) == (confidence < 1)


@pytest.mark.slow
def test_tuning_teaches_a_model_to_see_ahead():
  t = counting_target(0.0)
  task = LexicalTuning(t.model, weights=t.params, drafter=units(t, num_heads=2), threshold=0.8)
  config = TrainerConfig(
    steps=300, progress=False, optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=10)
  )
  data = [counting(seed, rows=16) for seed in range(300)]
  tuned = nn.unbox(Trainer(task, config, data=data).train().params)
  speed = {}
  for name, params in (("before", t.params), ("after", tuned)):
    options = dict(max_new_tokens=20, stop=None)
    plain = generate(t.model, params, PROMPTS, **options)
    out = generate(t.model, params, PROMPTS, drafter=units(t, num_heads=2), **options)
    assert out.tokens == plain.tokens
    speed[name] = out.stats.tokens_per_step
  assert speed["after"] > max(2.0, speed["before"] + 0.5), speed


def test_errors_say_what_to_change():
  t = target()
  with pytest.raises(UserError, match="pad must be a token of the vocabulary of 23, got 23"):
    units(t, pad=VOCAB)
  with pytest.raises(UserError, match="confident drafts are a chain"):
    units(t, confidence=0.9, tree=StaticTree.from_paths([(0,), (1,)]))
  with pytest.raises(UserError, match="confidence must be positive"):
    units(t, confidence=0.0)
  with pytest.raises(UserError, match="pad=<its placeholder token>"):
    get("lexical_units", config=t.model.config)
  assert get("lexical_units", config=t.model.config, pad=1).num_nodes == 4
  with pytest.raises(UserError, match="needs drafter=LexicalUnits"):
    LexicalTuning(t.model)
